"""One worker's life: put the parts together, train, and let the test split judge what validation chose."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from cluster.hardware.machine import Peak, cpu_name, device_here
from cluster.storage.uris import Store, open_store
from data.order.order import Order
from data.rows.evaluation_rows import EvaluationBatch, evaluation_batches
from data.rows.stream import TokenStream
from data.shards.manifest import Manifest, read_manifest
from data.tokens.tokenizer import read_tokenizer
from trainers.checkpoints.commit import CheckpointRecord
from trainers.checkpoints.keeping import checkpoint_at, claim_attempt, latest_checkpoint
from trainers.checkpoints.reader import CheckpointReader
from trainers.checkpoints.writer import CheckpointWriter
from trainers.engine.collectives import Workers, limit_collectives
from trainers.engine.engine import Engine
from trainers.evaluation.loss import Evaluation, evaluate
from trainers.evaluation.verdict import EXPORT, VERDICT, claim_test_split, record_verdict
from trainers.exported.folder import export
from trainers.exported.llama import rows_of_fused
from trainers.exported.replacing import foreign_problem
from trainers.model.backbone import build_hollow, initial_value
from trainers.model.compiling import seconds_compiled
from trainers.model.diverged import LOWER_RATE, DivergedModelError
from trainers.model.shape import flops_per_token
from trainers.objectives.kinds import objective_of
from trainers.objectives.objective import Objective
from trainers.optim.schedule import rate_factor
from trainers.pretraining.config import (
    PretrainConfig,
    evaluation_framing,
    model_of,
    run_store,
    watts_per_worker,
)
from trainers.pretraining.initial import initial_values
from trainers.pretraining.loop import SECTIONS, Ending, Parts, note, train
from trainers.pretraining.peak import keep_peak, peak_of_run
from trainers.recovery.clock import RunClock
from trainers.recovery.guard import Guard, name_documents
from trainers.recovery.heartbeat import GIL_GRACE_SECONDS, Heartbeat
from trainers.recovery.stopping import FAILURE, StopRequest, telling_final_errors
from trainers.reporting.live_metrics import LiveMetrics, event_log
from trainers.reporting.metrics import TRAINED, Meter, MetricsWriter, Record, finite


@dataclass(frozen=True)
class Task:
    """What a worker is sent."""

    config: PretrainConfig
    manifest_digest: str
    asked: float | None = None
    """When the driver began to ask for workers, by the run's clock."""
    judge: bool = True
    """Read the test split and export, once trained. A sweep's trials do neither."""
    init: str = ""
    """Digest of the model that `run.init_from` names; empty: it is not held against one."""


def work(arguments: dict[str, Any]) -> None:
    """Run on every worker of the group, torch.distributed up; `arguments["task"]` is a `Task`."""
    task: Task = arguments["task"]
    config = task.config
    run = run_store(config)
    clock = RunClock(run)
    torch.set_num_threads(config.cluster.threads)
    workers = Workers()
    if run.exists(FAILURE):
        return
    attempt = workers.broadcast(claim_attempt(run, workers.world_size) if workers.leads else 0)
    with telling_final_errors(run, workers), ExitStack() as stack:
        heartbeat = stack.enter_context(Heartbeat(config.heartbeat, run, rank=workers.rank, attempt=attempt))
        data = open_data(task)
        heartbeat.beat(0, "restore")
        newest = latest_checkpoint(
            run, rank=workers.rank, world_size=workers.world_size, gather=workers.gather, sections=SECTIONS
        )
        peak = workers.broadcast(find_peak(config, data, run) if workers.leads else None)
        # Before the engine is built: the pipeline takes seconds to start, and does so meanwhile.
        stream = stack.enter_context(open_stream(config, data, workers, newest.step if newest else 0))
        parts = assemble(task, data, peak, stream, newest, workers, run, attempt, heartbeat, clock, stack)
        limit_collectives(config.heartbeat.longest_seconds + GIL_GRACE_SECONDS)  # DeepSpeed's groups too
        ending = train(parts)
        stream.close()
        refuse_diverged(run, ending)
        if task.judge and not ending.stopped:
            conclude(parts, data, ending.step)


@dataclass(frozen=True)
class Data:
    """What a run is trained on."""

    corpus: Store
    manifest: Manifest
    order: Order


def open_data(task: Task) -> Data:
    """Read the manifest and plan the order."""
    config, batch = task.config, task.config.batch
    corpus = open_store(config.corpus.prepared)
    manifest = read_manifest(corpus, task.manifest_digest)
    order = Order(manifest, config.order, seq_len=batch.seq_len, rows_per_step=batch.rows_per_step)
    return Data(corpus, manifest, order)


def assemble(
    task: Task,
    data: Data,
    peak: Peak,
    stream: TokenStream,
    newest: CheckpointRecord | None,
    workers: Workers,
    run: Store,
    attempt: int,
    heartbeat: Heartbeat,
    clock: RunClock,
    stack: ExitStack,
) -> Parts:
    """Build the model, the engine and everything around them; what needs closing goes onto the stack."""
    config, order, manifest, corpus = task.config, data.order, data.manifest, data.corpus
    batch = config.batch
    # Lanes are dealt out whole; where they do not come out even, the last workers' share is filled up.
    rows = -(-order.lanes // workers.world_size) * order.rows_per_lane
    micro_batch_rows = config.engine.rows_per_pass(rows)
    model_config = model_of(config, manifest)
    values: Callable[[str, torch.Size], torch.Tensor] = partial(initial_value, model_config, config.run.seed)
    if config.run.init_from and newest is None:
        values = initial_values(config, model_config, task.init)
    model = build_hollow(model_config)
    model.activation_checkpointing = config.engine.activation_checkpointing
    engine = Engine(
        model,
        replace(config.engine, micro_batch_rows=micro_batch_rows),
        config.optimizer,
        partial(rate_factor, config.schedule, total_steps=config.run.steps),
        micro_batches=rows // micro_batch_rows,
        fused_rows=rows_of_fused(model_config, (name for name, _ in model.named_parameters())),
        values=values,
    )
    device, name = engine.device.type, device_name(engine.device)
    leads = workers.leads
    objective = objective_of(
        config.objective,
        read_tokenizer(corpus, manifest.tokenizer),
        boundary_id=manifest.boundary_id,
        document_mask=config.model.document_mask,
    )

    def documents(step: int) -> list[str]:
        rows_of_step = order.step_rows(step)
        return name_documents(corpus, manifest, rows_of_step.fragment, rows_of_step.start, batch.seq_len + 1)

    return Parts(
        config=config,
        objective=objective,
        identity={
            "manifest": manifest.digest,
            "tokenizer": manifest.tokenizer,
            "order": order.digest,
        },
        asked=task.asked,
        began=clock.started,
        workers=workers,
        order=order,
        engine=engine,
        micro_batch_rows=micro_batch_rows,
        stream=stream,
        newest=newest,
        validate=partial(
            evaluate_split,
            config,
            data,
            "validation",
            config.validation.max_rows,
            workers,
            engine,
            objective,
            heartbeat,
        ),
        meter=Meter(
            flops_per_token=flops_per_token(
                model_config, batch.seq_len, objective.target_share(batch.seq_len)
            ),
            peak_flops_per_second=peak.flops_per_second * workers.world_size,
            compiled=seconds_compiled,
        ),
        metrics=stack.enter_context(
            MetricsWriter(run, attempt, observers=observers(config, stack), now=clock.now)
        )
        if leads
        else None,
        writer=stack.enter_context(
            CheckpointWriter(
                run,
                config.checkpoint,
                rank=workers.rank,
                world_size=workers.world_size,
                attempt=attempt,
                resumed_step=newest.step if newest else 0,
            )
        ),
        guard=Guard(config.guard, documents) if leads else Guard(config.guard),
        heartbeat=heartbeat,
        run=run,
        stop_requested=stack.enter_context(StopRequest(run)) if leads else lambda: False,
        now=clock.now,
        hardware={
            "device": name,
            "watts": watts_per_worker(config, device, name),
            "peak_flops_per_second": peak.flops_per_second,
            "peak_source": peak.source,
            "peak_is_measured": peak.is_measured,
        },
    )


def find_peak(config: PretrainConfig, data: Data, run: Store) -> Peak:
    """The peak of worker 0's device. It is measured while all others wait, unless the run has kept it."""
    name = device_name(device_here())
    peak = peak_of_run(run, config, model_of(config, data.manifest), name)
    keep_peak(run, config, name, peak)
    return peak


def open_stream(config: PretrainConfig, data: Data, workers: Workers, step: int) -> TokenStream:
    """The rows of this worker from a step on."""
    return TokenStream(
        data.order,
        data.manifest,
        config.corpus.prepared,
        rank=workers.rank,
        world_size=workers.world_size,
        start_step=step,
        stop_step=config.run.steps,
        broadcast=workers.broadcast,
        framing=config.objective.framing,
    )


def observers(config: PretrainConfig, stack: ExitStack) -> list[Callable[[Record], None]]:
    """Who is told of each record at once: Prometheus, and the log where it is asked for."""
    live = stack.enter_context(LiveMetrics(config.run.name)).observe
    return [live, event_log(config.run.name, worker=0)] if config.run.log_events else [live]


def evaluate_split(
    config: PretrainConfig,
    data: Data,
    split: str,
    max_rows: int,
    workers: Workers,
    engine: Engine,
    objective: Objective,
    heartbeat: Heartbeat,
) -> Evaluation:
    """The loss on a fixed set of rows of a split; all workers call it together, between two steps."""
    batches = evaluation_batches(
        data.manifest,
        data.corpus,
        split,
        seq_len=config.batch.seq_len,
        rows_per_batch=engine.config.micro_batch_rows,
        rank=workers.rank,
        world_size=workers.world_size,
        max_rows=max_rows,
        framing=evaluation_framing(config, data.manifest),
    )
    return evaluate(engine, beating(batches, heartbeat, engine.num_steps), workers, objective)


def beating(batches: Iterable[EvaluationBatch], heartbeat: Heartbeat, step: int) -> Iterator[EvaluationBatch]:
    """The batches, each with a beat: a long evaluation is no hang."""
    for batch in batches:
        heartbeat.beat(step, "validate")
        yield batch


def refuse_diverged(run: Store, ending: Ending) -> None:
    """Raise `DivergedModelError`, on all workers alike, where training came to its end without a validation loss."""
    if not ending.stopped and not ending.selection.best_step:
        raise DivergedModelError(
            f"no validation of {run.uri} has a finite loss, so that there is no model to judge or export; {LOWER_RATE}"
        )


def conclude(parts: Parts, data: Data, step: int) -> None:
    """Judge the chosen checkpoint on the test split and export it, all of `step` steps done; what was done already is
    not done again.

    Raises:
        DivergedModelError: its loss on the test split is not finite.
    """
    run, workers, config = parts.run, parts.workers, parts.config
    note(parts, step, TRAINED)
    parts.heartbeat.beat(config.run.steps, "restore")
    # By asking worker 0 which one it is, the others wait until it has committed the last.
    record = checkpoint_at(
        run, "best", rank=workers.rank, world_size=workers.world_size, gather=workers.gather
    )
    best = CheckpointReader(run, record)
    if not workers.broadcast(run.exists(VERDICT)):
        if workers.leads:
            claim_test_split(run, record.name)
        parts.engine.load_state(best)
        parts.heartbeat.beat(best.step, "validate")
        found = evaluate_split(
            config, data, "test", 0, workers, parts.engine, parts.objective, parts.heartbeat
        )
        if not math.isfinite(found.loss):
            raise DivergedModelError(
                f"{record.name} of {run.uri} has no verdict: its loss on the test split is {found.loss}; {LOWER_RATE}"
            )
        if workers.leads:
            verdict = {"step": best.step, "checkpoint": record.name, **found.as_json()}
            record_verdict(run, finite(verdict))  # a perplexity may be beyond float64
            note(parts, step, "tested")
    if workers.leads:
        parts.heartbeat.beat(best.step, "export")
        tokenizer, target = read_tokenizer(data.corpus, data.manifest.tokenizer), run.child(EXPORT)
        export(
            best.values(),  # one at a time: the whole need not fit into this worker
            model_of(config, data.manifest),
            tokenizer,
            data.manifest.boundary_id,
            target,
            objective=config.objective,
            overwrite=not foreign_problem(target),
        )
        note(parts, step, "exported")


def device_name(device: torch.device) -> str:
    """What the hardware table calls this device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
