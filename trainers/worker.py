"""One worker's life: put the parts together, train, and let the test split judge what validation chose."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from cluster.hardware import peak_of
from cluster.storage import Store, open_store
from data.evaluation_rows import evaluation_batches
from data.manifest import Manifest, read_manifest
from data.order import Order, largest_divisor
from data.stream import TokenStream
from data.tokens import tokenizer_path
from trainers.checkpoint import checkpoint_at, claim_attempt
from trainers.checkpoint_reader import CheckpointReader
from trainers.checkpoint_writer import CheckpointWriter
from trainers.collectives import Workers
from trainers.config import PretrainConfig, model_of, run_store
from trainers.engine import Engine
from trainers.evaluation import Evaluation, evaluate
from trainers.export import export
from trainers.guard import Guard, name_documents
from trainers.heartbeat import Heartbeat
from trainers.llama import rows_of_fused
from trainers.loop import Parts, train
from trainers.metrics import Meter, MetricsWriter
from trainers.model import build
from trainers.schedule import rate_factor
from trainers.shape import flops_per_token
from trainers.stopping import StopRequest
from trainers.verdict import EXPORT, VERDICT, claim_test_split, record_verdict


@dataclass(frozen=True)
class Task:
    """What a worker is sent."""

    config: PretrainConfig
    manifest_digest: str


def work(arguments: dict[str, Any]) -> None:
    """Run on every worker of the group, torch.distributed up; `arguments["task"]` is a `Task`."""
    task: Task = arguments["task"]
    config = task.config
    torch.set_num_threads(config.cluster.threads)
    workers, run = Workers(), run_store(config)
    attempt = workers.broadcast(claim_attempt(run) if workers.leads else 0)
    with ExitStack() as stack:
        heartbeat = stack.enter_context(Heartbeat(config.heartbeat, run, rank=workers.rank, attempt=attempt))
        parts = assemble(task, workers, run, attempt, heartbeat, stack)
        ending = train(parts)
        if not ending.stopped:
            conclude(parts, task)


def assemble(
    task: Task, workers: Workers, run: Store, attempt: int, heartbeat: Heartbeat, stack: ExitStack
) -> Parts:
    """Build the model, the engine and everything around them; what needs closing goes onto the stack."""
    config, batch = task.config, task.config.batch
    corpus = open_store(config.corpus.prepared)
    manifest = read_manifest(corpus, task.manifest_digest)
    order = Order(manifest, config.order, seq_len=batch.seq_len, rows_per_step=batch.rows_per_step)
    # Lanes are dealt out whole; where they do not come out even, the last workers' share is filled up.
    rows = -(-order.lanes // workers.world_size) * order.rows_per_lane
    micro_batch_rows = largest_divisor(rows, config.engine.micro_batch_rows)
    model_config = model_of(config, manifest)
    model = build(
        model_config, config.run.seed, activation_checkpointing=config.engine.activation_checkpointing
    )
    engine = Engine(
        model,
        replace(config.engine, micro_batch_rows=micro_batch_rows),
        config.optimizer,
        partial(rate_factor, config.schedule, total_steps=config.run.steps),
        micro_batches=rows // micro_batch_rows,
        fused_rows=rows_of_fused(model_config, (name for name, _ in model.named_parameters())),
    )
    peak = peak_of(
        engine.device.type, device_name(engine.device), config.engine.precision, config.cluster.threads
    )
    leads = workers.leads

    def documents(step: int) -> list[str]:
        rows_of_step = order.step_rows(step)
        return name_documents(corpus, manifest, rows_of_step.fragment, rows_of_step.start, batch.seq_len + 1)

    return Parts(
        config=config,
        boundary_id=manifest.boundary_id,
        identity={
            "manifest": manifest.digest,
            "tokenizer": manifest.tokenizer,
            "order": order.digest,
        },
        workers=workers,
        order=order,
        engine=engine,
        micro_batch_rows=micro_batch_rows,
        open_stream=partial(open_stream, task, order, manifest, workers),
        validate=partial(
            evaluate_split,
            config,
            manifest,
            corpus,
            "validation",
            config.validation.max_rows,
            workers,
            engine,
        ),
        meter=Meter(
            flops_per_token=flops_per_token(model_config, batch.seq_len),
            peak_flops_per_second=peak.flops_per_second * workers.world_size,
        ),
        metrics=stack.enter_context(MetricsWriter(run, attempt)) if leads else None,
        writer=stack.enter_context(
            CheckpointWriter(
                run, config.checkpoint, rank=workers.rank, world_size=workers.world_size, attempt=attempt
            )
        ),
        guard=Guard(config.guard, documents) if leads else Guard(config.guard),
        heartbeat=heartbeat,
        run=run,
        stop_requested=stack.enter_context(StopRequest(run)) if leads else lambda: False,
    )


def open_stream(task: Task, order: Order, manifest: Manifest, workers: Workers, step: int) -> TokenStream:
    """The rows of this worker from a step on."""
    return TokenStream(
        order,
        manifest,
        task.config.corpus.prepared,
        rank=workers.rank,
        world_size=workers.world_size,
        start_step=step,
        stop_step=task.config.run.steps,
        broadcast=workers.broadcast,
    )


def evaluate_split(
    config: PretrainConfig,
    manifest: Manifest,
    corpus: Store,
    split: str,
    max_rows: int,
    workers: Workers,
    engine: Engine,
) -> Evaluation:
    """The loss on a fixed set of rows of a split; all workers call it together."""
    batches = evaluation_batches(
        manifest,
        corpus,
        split,
        seq_len=config.batch.seq_len,
        rows_per_batch=engine.config.micro_batch_rows,
        rank=workers.rank,
        world_size=workers.world_size,
        max_rows=max_rows,
    )
    return evaluate(engine, batches, workers, manifest.boundary_id, config.model.document_mask)


def conclude(parts: Parts, task: Task) -> None:
    """Judge the chosen checkpoint on the test split and export it; what was done already is not done again."""
    run, workers, config = parts.run, parts.workers, parts.config
    parts.heartbeat.beat(config.run.steps, "restore")
    corpus = open_store(config.corpus.prepared)
    manifest = read_manifest(corpus, task.manifest_digest)
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
        found = evaluate_split(config, manifest, corpus, "test", 0, workers, parts.engine)
        if workers.leads:
            record_verdict(run, {"step": best.step, "checkpoint": record.name, **found.as_json()})
    if workers.leads:
        parts.heartbeat.beat(best.step, "export")
        tokenizer = corpus.read(tokenizer_path(manifest.tokenizer))
        export(
            best.values(),  # one at a time: the whole need not fit into this worker
            model_of(config, manifest),
            tokenizer,
            manifest.boundary_id,
            run.child(EXPORT),
        )


def device_name(device: torch.device) -> str:
    """What the hardware table calls this device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
