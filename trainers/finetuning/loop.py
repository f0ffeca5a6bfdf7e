"""One worker's fine-tuning: from the newest checkpoint, or the pretrained weights, to the step that validation
chooses.

The engine, the checkpoints and the schedule are those of pretraining. The loop is not: a labelled set fits into memory,
so that no stream is needed and a batch is chosen by index, and validation chooses by the task's metric. The best
weights stay in memory and reach the storage with the next checkpoint: a run of a minute writes none on the way.
"""

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from cluster.storage.uris import Store
from trainers.checkpoints.commit import is_checkpoint_file
from trainers.checkpoints.keeping import latest_checkpoint
from trainers.checkpoints.reader import CheckpointReader
from trainers.checkpoints.writer import CheckpointWriter
from trainers.engine.collectives import Workers
from trainers.engine.engine import Engine, StepOutcome
from trainers.exported.model_files import read_weights
from trainers.finetuning.batches import RecordOrder
from trainers.finetuning.config import FinetuneConfig
from trainers.recovery.guard import Guard, guarded_step
from trainers.recovery.heartbeat import Heartbeat
from trainers.reporting.metrics import MetricsWriter
from trainers.tasks.encoding import Encoded, Encoder, collate
from trainers.tasks.evaluation import TaskScore
from trainers.tasks.heads import target_weight

OnValidation = Callable[[int, TaskScore], None]
"""Told of each validation: finished steps, and the score."""


@dataclass(frozen=True)
class Choice:
    """What validation has found so far; part of each checkpoint."""

    best_step: int = 0
    """Finished steps at the best score; 0 before the first validation."""
    best_score: float = -math.inf
    """The task's metric, turned so that more is better."""
    without_improvement: int = 0
    """Validations since the best one."""
    metrics: dict[str, float] = field(default_factory=dict)
    """All that was measured at the best step."""

    def after(self, step: int, found: TaskScore) -> "Choice":
        """What is known once `found` was measured after `step` steps; a score that is no number is none."""
        if found.score > self.best_score:
            return Choice(step, found.score, 0, found.metrics)
        return replace(self, without_improvement=self.without_improvement + 1)

    def as_json(self) -> dict[str, Any]:
        """For the checkpoint. JSON has no infinity."""
        return asdict(self) | {"best_score": self.best_score if self.best_step else None}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Choice":
        return cls(**stored) if stored["best_score"] is not None else cls()


@dataclass(frozen=True)
class FinetuneParts:
    """What a worker trains with; `trainers/finetuning/worker.py` puts it together."""

    config: FinetuneConfig
    seed: int
    identity: dict[str, Any]
    """What a checkpoint must have been made with to be gone on from."""
    total_steps: int
    workers: Workers
    engine: Engine
    encoder: Encoder
    train: Sequence[Encoded]
    order: RecordOrder
    micro_batches: int
    class_weights: Tensor | None
    """As `task_evaluation.class_weights` has them."""
    validate: Callable[[], TaskScore]
    on_validation: OnValidation
    metrics: MetricsWriter | None
    """Worker 0 has one."""
    writer: CheckpointWriter
    guard: Guard
    heartbeat: Heartbeat
    stop_requested: Callable[[], bool]
    """Whether this worker was asked to save and end."""
    run: Store


@dataclass
class Progress:
    """Where the loop stands; `weights` are the trained parameters of the best step, on worker 0."""

    step: int
    choice: Choice
    weights: dict[str, Tensor] | None
    stopped: bool = False
    """Asked to end before the last step, with all saved."""


def train(parts: FinetuneParts) -> Progress:
    """Train until the last step, until validation gives up, or until asked to stop. Every worker calls this at the
    same time.

    Raises:
        TrainingDiverged: too many steps whose loss or gradient is not finite.
    """
    config, at = parts.config, restore(parts)
    every = max(1, parts.total_steps // config.validation.times)
    ended = is_over(parts, at)
    while not (ended or at.stopped):
        started = time.perf_counter()
        share, tokens = forward_backward(parts, at.step)
        asked, loss = parts.workers.sum([parts.stop_requested(), share])
        outcome, refusal = guarded_step(parts.engine, parts.guard, at.step, loss)
        at.step += 1
        record_step(parts, at.step, loss, tokens, outcome, time.perf_counter() - started)
        if refusal:
            note(parts, at.step, "skipped", reason=refusal.reason, records=list(refusal.documents))
        if at.step == parts.total_steps or at.step % every == 0:
            validate(parts, at)
        ended = is_over(parts, at)
        at.stopped = asked > 0 and not ended
        if at.stopped or (at.step % config.checkpoint.every_steps == 0 and not ended):
            save(parts, at)
        parts.heartbeat.beat(at.step)
    parts.heartbeat.beat(at.step, "save")
    parts.writer.finish()
    return at


def is_over(parts: FinetuneParts, at: Progress) -> bool:
    """Whether nothing is left to train."""
    patience = parts.config.validation.patience
    return at.step >= parts.total_steps or 0 < patience <= at.choice.without_improvement


def restore(parts: FinetuneParts) -> Progress:
    """Load the newest good checkpoint and the weights that were best by then.

    Raises:
        ValueError: it was made of another task, backbone or configuration.
    """
    workers = parts.workers
    record = latest_checkpoint(
        parts.run,
        rank=workers.rank,
        world_size=workers.world_size,
        gather=workers.gather,
        sections=("identity", "choice"),
    )
    name = record.name if record else None
    note(parts, record.step if record else 0, "start", world_size=workers.world_size, checkpoint=name)
    if record is None:
        parts.heartbeat.beat(0, "compile")
        return Progress(0, Choice(), None)
    if record.run["identity"] != parts.identity:
        differing = sorted(k for k, v in parts.identity.items() if record.run["identity"].get(k) != v)
        raise ValueError(
            f"checkpoint {record.name} of {parts.run.uri} was made with another {', '.join(differing)}; give it "
            "back, or choose a new run.name"
        )
    parts.engine.load_state(CheckpointReader(parts.run, record))
    if "guard" in record.run:  # an older run has not written it down
        parts.guard.load(record.run["guard"])
    choice = Choice.from_json(record.run["choice"])
    weights = None
    if workers.leads and choice.best_step:
        weights = read_weights(parts.run, best_path(choice.best_step))
    parts.heartbeat.beat(record.step, "compile")
    return Progress(record.step, choice, weights)


def forward_backward(parts: FinetuneParts, step: int) -> tuple[float, int]:
    """Add up the gradients of this worker's records of a step; their loss, as a share of the global batch's
    mean, and the tokens of the global batch."""
    engine, workers, task = parts.engine, parts.workers, parts.encoder.task
    # Dropout too is a function of seed and step, so that a resumed run is the unbroken one.
    torch.manual_seed(int(np.random.SeedSequence([parts.seed, step, workers.rank]).generate_state(1)[0]))
    rows = [parts.train[index] for index in parts.order.rows(step)]
    whole = collate(task, rows, parts.encoder.pad_id)
    weight = target_weight(task.kind, whole, parts.class_weights) or 1.0
    class_weights = None if parts.class_weights is None else parts.class_weights.to(engine.device)
    total = 0.0
    for micro in micro_batches(rows, workers.rank, workers.world_size, parts.micro_batches):
        batch = collate(task, micro or rows[:1], parts.encoder.pad_id).to(engine.device)
        loss = engine(batch.tokens_BT, batch.mask_BT, batch.types_BT, batch.targets, class_weights)
        # A worker that has run out of records takes part in the same collectives with a loss of weight 0.
        loss = loss / weight if micro else loss * 0.0
        engine.backward(loss)
        total += loss.item()
    return total, sum(len(row.ids) for row in rows)


def micro_batches(
    rows: Sequence[Encoded], rank: int, world_size: int, number: int
) -> list[Sequence[Encoded]]:
    """This worker's rows in so many parts, some of them empty if need be."""
    mine = sorted(rows[rank::world_size], key=lambda row: len(row.ids))
    size = math.ceil(len(rows) / (world_size * number))
    return [mine[i * size : (i + 1) * size] for i in range(number)]


def record_step(
    parts: FinetuneParts, step: int, loss: float, tokens: int, outcome: StepOutcome, seconds: float
) -> None:
    """Hand the step's numbers to the metrics; worker 0 alone keeps them."""
    if parts.metrics:
        parts.metrics.write(
            {
                "step": step,
                "loss": loss,
                "lr": outcome.lr,
                "grad_norm": outcome.grad_norm,
                "tokens": tokens,
                "step_seconds": seconds,
                "tokens_per_second": tokens / seconds,
            }
        )


def note(parts: FinetuneParts, step: int, event: str, **details: Any) -> None:
    """Write an event into the run's metrics."""
    if parts.metrics:
        parts.metrics.write({"step": step, "event": event, **details})


@contextmanager
def beating(model: nn.Module, heartbeat: Heartbeat, step: int) -> Iterator[None]:
    """A beat whenever the model computes: long answers to many records are no hang."""
    hook = model.register_forward_pre_hook(lambda *_: heartbeat.beat(step, "validate"))
    try:
        yield
    finally:
        hook.remove()


def validate(parts: FinetuneParts, at: Progress) -> None:
    """Measure; where it is the best so far, keep the weights."""
    parts.heartbeat.beat(at.step, "validate")
    score = parts.validate()
    at.choice = at.choice.after(at.step, score)
    if at.choice.best_step == at.step:
        at.weights = trained_weights(parts)
    if parts.metrics:
        parts.metrics.write({"step": at.step, "validation": score.metrics | {"score": score.score}})
        parts.on_validation(at.step, score)


def trained_weights(parts: FinetuneParts) -> dict[str, Tensor]:
    """The trained parameters in float32, on worker 0; nothing on the others. Collective."""
    trained = {name for name, p in parts.engine.module.named_parameters() if p.requires_grad}
    return {name: p.to("cpu", copy=True) for name, p in parts.engine.full_parameters() if name in trained}


def save(parts: FinetuneParts, at: Progress) -> None:
    """Write a checkpoint, before its record the weights that it calls the best."""
    weights, choice = at.weights, at.choice
    parts.heartbeat.beat(at.step, "save")

    def put_best() -> None:
        if parts.metrics:
            parts.metrics.flush()
        if weights and choice.best_step and not parts.run.exists(best_path(choice.best_step)):
            parts.run.put(best_path(choice.best_step), safetensors.torch.save(weights))

    run = {"identity": parts.identity, "choice": choice.as_json(), "guard": parts.guard.state()}
    parts.writer.save(at.step, parts.engine.local_state(), run, before_commit=put_best)


def best_path(step: int) -> str:
    """Where the weights of the best step lie until the run is exported."""
    return f"best/step-{step:08d}.safetensors"


def is_state(path: str) -> bool:
    """Whether a path within a run's store is one of those that the run goes on from, and that go once it has ended."""
    return is_checkpoint_file(path) or bool(re.fullmatch(r"best/step-\d{8,}\.safetensors", path))
