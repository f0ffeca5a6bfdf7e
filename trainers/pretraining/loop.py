"""The training loop: one worker's way from the newest checkpoint to the last step.

A step's rows and learning rate are pure functions of its number; everything else that it depends on (weights,
moments, the guard's memory, what validation found) stands in the checkpoint. So an interrupted run goes on as if it
had not been interrupted.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from cluster.hardware.machine import used_memory_bytes
from cluster.storage.uris import Store
from data.order.order import Order
from trainers.checkpoints.commit import CheckpointRecord
from trainers.checkpoints.reader import CheckpointReader
from trainers.checkpoints.writer import CheckpointWriter
from trainers.engine.collectives import Workers
from trainers.engine.engine import Engine, StepOutcome
from trainers.evaluation.loss import Evaluation
from trainers.evaluation.selection import Selection, record_best
from trainers.objectives.objective import Objective, micro_batches, on_device, step_numbers
from trainers.pretraining.config import PretrainConfig
from trainers.recovery.guard import Guard, Refusal, guarded_step
from trainers.recovery.heartbeat import Heartbeat
from trainers.reporting.metrics import Meter, MetricsWriter

if TYPE_CHECKING:  # it needs Ray, which the loop does not
    from data.rows.stream import StepRows, TokenStream

LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Parts:
    """What a worker trains with; `trainers/pretraining/worker.py` puts it together."""

    config: PretrainConfig
    objective: Objective
    identity: dict[str, Any]
    """What a checkpoint must have been made with to be gone on from: digests of the order, the tokenizer, …"""
    asked: float | None
    """When the driver began to ask for workers, unix time, if it said so."""
    began: float
    """When this worker started, unix time."""
    workers: Workers
    order: Order
    engine: Engine
    micro_batch_rows: int
    stream: "TokenStream"
    """This worker's rows of the steps that are left."""
    newest: CheckpointRecord | None
    """The checkpoint to go on from; None starts at step 0."""
    validate: Callable[[], Evaluation]
    meter: Meter
    metrics: MetricsWriter | None
    """Worker 0 has one."""
    writer: CheckpointWriter
    guard: Guard
    heartbeat: Heartbeat
    run: Store
    stop_requested: Callable[[], bool]
    """Whether this worker was asked to save and end."""
    now: Callable[[], float] = time.time
    """The run's clock."""
    hardware: dict[str, Any] = field(default_factory=dict)
    """Of this worker, for the record: `device`, `watts` that it is taken to draw, and its peak. The driver may have
    another."""


SECTIONS = ("identity", "guard", "selection")
"""Of a checkpoint's trainer's state: what `restore` needs."""


@dataclass(frozen=True)
class Ending:
    """Where a worker's training ended: all steps done, validation gave up, or asked to stop."""

    step: int
    selection: Selection
    stopped: bool


def train(parts: Parts) -> Ending:
    """Train from the newest checkpoint on. Every worker of the run calls this at the same time."""
    config, workers = parts.config, parts.workers
    first, selection = restore(parts)
    step = first
    stopped, ended = False, step >= config.run.steps or selection.gives_up(config.validation)
    while not ended:
        rows = next_rows(parts, step, starting=step == first)
        sums, counts = forward_backward(parts, rows)
        waits = workers.apart(rows.wait_seconds)
        told = workers.sum([*halves(rows.digest), parts.stop_requested(), *waits, *sums])
        stopped, waits, sums = told[2] > 0, told[3 : 3 + len(waits)], told[3 + len(waits) :]
        numbers = step_numbers(parts.objective.terms, sums, counts)
        outcome, refusal = guarded_step(parts.engine, parts.guard, step, numbers["loss"])
        step += 1
        parts.meter.waited(max(waits))  # all wait for the one that waits longest
        record_step(parts, step, numbers, outcome, refusal, joined(told[0], told[1]))
        selection = validate_and_save(parts, step, selection, stopped)
        ended = stopped or step == config.run.steps or selection.gives_up(config.validation)
    parts.heartbeat.beat(step, "save")
    parts.writer.finish()
    return Ending(step, selection, stopped)


def restore(parts: Parts) -> tuple[int, Selection]:
    """Load the newest checkpoint, if any; returns the finished steps and what validation had found.

    Raises:
        ValueError: the checkpoint was made with other data, another tokenizer or another model.
    """
    record = parts.newest
    if record is None:
        step, selection = 0, Selection()
    else:
        differing = [
            f"{key}: {record.run['identity'].get(key)} there, {value} here"
            for key, value in parts.identity.items()
            if record.run["identity"].get(key) != value
        ]
        if differing:
            raise ValueError(
                f"checkpoint {record.name} does not belong to this configuration ({'; '.join(differing)}); "
                "give back what was changed, or choose a new run.name"
            )
        parts.engine.load_state(CheckpointReader(parts.run, record))
        parts.guard.load(record.run["guard"])
        step, selection = record.step, Selection.from_json(record.run["selection"])
        if parts.workers.leads and selection.best_step == step:
            record_best(
                parts.run, selection, record.name
            )  # cut off between the commit and this, it may be missing
    name = record.name if record else None
    world_size = parts.workers.world_size
    times = {"asked": parts.asked, "began": parts.began, "saved": record and record.run.get("time")}
    note(parts, step, "start", world_size=world_size, checkpoint=name, **times, **parts.hardware)
    parts.heartbeat.beat(step, "compile")
    return step, selection


def next_rows(parts: Parts, step: int, starting: bool) -> "StepRows":
    """This worker's rows of a step. Until the first ones are there the run is starting, and no step waits."""
    with parts.meter.apart() if starting else nullcontext():
        rows = next(parts.stream)
    assert rows.step == step, (rows.step, step)
    return replace(rows, wait_seconds=0.0) if starting else rows


def forward_backward(parts: Parts, rows: "StepRows") -> tuple[list[float], list[float]]:
    """Add up the gradients of this worker's rows.

    Returns:
        By term: the sum of these rows' losses, in nats, and the targets of the global batch.
    """
    engine, objective, batch = parts.engine, parts.objective, parts.config.batch
    inputs = objective.inputs(rows)
    counts = objective.global_targets(batch.rows_per_step, batch.seq_len)
    if counts is None:
        counts = parts.workers.sum(objective.targets(inputs))
    sums_K = torch.zeros(len(objective.terms), device=engine.device)
    for micro_batch in micro_batches(on_device(inputs, engine.device), parts.micro_batch_rows):
        # Over the targets of the global batch: sums over micro-batches and workers then make its mean.
        loss = objective.loss(engine, micro_batch, counts)
        engine.backward(loss.total)
        sums_K += loss.sums_K
    return sums_K.tolist(), counts


def validate_and_save(parts: Parts, step: int, selection: Selection, stopped: bool) -> Selection:
    """Validate and save where either is due after `step` steps; a better validation is always saved.

    A run that is stopped only saves: a validation that no schedule asked for could change what is chosen, and whoever
    stops a run may not wait for it.
    """
    config, better = parts.config, False
    last = step == config.run.steps
    if last or step % config.validation.every_steps == 0:
        with parts.meter.apart():
            parts.heartbeat.beat(step, "validate")
            found = parts.validate()
        selection = selection.after(step, found, config.validation)
        better = selection.best_step == step
        if parts.metrics:
            parts.metrics.write({"step": step, "validation": found.as_json()})
    ending = last or stopped or selection.gives_up(config.validation)
    if ending or better or step % config.checkpoint.every_steps == 0:
        parts.heartbeat.beat(step, "save")
        run = {
            "identity": parts.identity,
            "guard": parts.guard.state(),
            "selection": selection.as_json(),
            "time": parts.now(),
        }
        seconds = parts.writer.save(
            step,
            parts.engine.local_state(),
            run,
            # A run that goes on from a checkpoint has the records of all steps before it.
            before_commit=parts.metrics.flush if parts.metrics else lambda: None,
            on_commit=on_commit(parts, step, selection),
        )
        parts.meter.stalled(max(parts.workers.sum(parts.workers.apart(seconds))))
    parts.heartbeat.beat(step)
    return selection


def on_commit(parts: Parts, step: int, selection: Selection) -> Callable[[str], None]:
    """What the writer's thread of worker 0 does once the checkpoint exists."""

    def committed(name: str) -> None:
        if selection.best_step == step:
            record_best(parts.run, selection, name)
        note(parts, step, "checkpoint", name=name, best=selection.best_step == step)

    return committed


def record_step(
    parts: Parts,
    step: int,
    numbers: dict[str, float],
    outcome: StepOutcome,
    refusal: Refusal | None,
    digest: int,
) -> None:
    """Hand the step's numbers to the metrics; worker 0 alone keeps them."""
    batch = parts.config.batch
    record = parts.meter.finish(
        step,
        tokens=batch.rows_per_step * batch.seq_len,
        **numbers,
        lr=outcome.lr,
        grad_norm=outcome.grad_norm,
        memory_bytes=used_memory_bytes(parts.engine.device.type),
        epoch=max(parts.order.epochs_before(step).values()),
        digest=f"{digest:016x}",
    )
    if parts.metrics:
        parts.metrics.write(record)
    if refusal:
        note(parts, step, "skipped", reason=refusal.reason, documents=list(refusal.documents))


def note(parts: Parts, step: int, event: str, **details: Any) -> None:
    """Write an event into the run's metrics."""
    if parts.metrics:
        parts.metrics.write({"step": step, "event": event, **details})


def halves(digest: int) -> Iterator[int]:
    """A 64-bit digest as two numbers whose sums over the workers float64 holds exactly."""
    yield digest & LOW_32
    yield digest >> 32


def joined(low: float, high: float) -> int:
    """The sum modulo 2**64 of digests whose halves were summed."""
    return (int(low) + (int(high) << 32)) % (1 << 64)
