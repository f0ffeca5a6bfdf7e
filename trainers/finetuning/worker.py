"""One worker's fine-tuning of one seed: put the parts together, and train; then comes `trainers/finetuning/end.py`.

`work` runs on each worker of a Ray Train group. `work_alone` is the same in this process as a group of one: with few
labels, starting Ray costs more than the training does, and a sweep's trial has a process of its own already. There the
heartbeat is not watched: no collective can hang, nobody would start the process anew, and Ctrl-Z is no hang.
"""

import ctypes
import gc
import math
import os
import platform
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from cluster.storage.uris import Store
from trainers.checkpoints.keeping import claim_attempt
from trainers.checkpoints.writer import CheckpointWriter
from trainers.engine.collectives import Workers, limit_collectives
from trainers.engine.engine import Engine
from trainers.exported.folder import Exported
from trainers.finetuning.backbone import load_backbone, make_encoder
from trainers.finetuning.batches import RecordOrder
from trainers.finetuning.config import seed_store
from trainers.finetuning.end import Chosen, conclude, keep_chosen, read_chosen
from trainers.finetuning.job import (
    FinetuneOrder,
    encode_all,
    identity_of,
    scale_of,
    tokens_to_write,
    training_records,
    write_start,
)
from trainers.finetuning.loop import FinetuneParts, OnValidation, beating, train
from trainers.optim.schedule import rate_factor
from trainers.recovery.guard import Guard
from trainers.recovery.heartbeat import GIL_GRACE_SECONDS, Heartbeat
from trainers.recovery.stopping import FAILURE, StopRequest, telling_final_errors
from trainers.reporting.metrics import MetricsWriter
from trainers.tasks.evaluation import class_weights, evaluate_together
from trainers.tasks.heads import TaskModel, rate_scales

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as malloc.h of glibc has them


def work(arguments: dict[str, Any]) -> None:
    """Run on every worker of a group, torch.distributed up; `arguments["task"]` is a `FinetuneOrder`."""
    order: FinetuneOrder = arguments["task"]
    run = seed_store(order.config, order.seed)
    if run.exists(FAILURE):
        return
    workers = Workers()
    attempt = workers.broadcast(claim_attempt(run, workers.world_size) if workers.leads else 0)
    watchdog = Heartbeat(order.config.heartbeat, run, rank=workers.rank, attempt=attempt)
    with telling_final_errors(run, workers), watchdog as heartbeat:
        finetune_seed(order, run, workers, attempt, heartbeat, lambda step, score: None)


def work_alone(order: FinetuneOrder, on_validation: OnValidation = lambda step, score: None) -> None:
    """The same in this process, which forms a group of one."""
    form_group_of_one()
    keep_freed_memory()
    run = seed_store(order.config, order.seed)
    attempt = claim_attempt(run)
    unwatched = Heartbeat(order.config.heartbeat, run, rank=0, attempt=attempt)
    try:
        finetune_seed(order, run, Workers(), attempt, unwatched, on_validation)
    finally:
        gc.collect()  # an engine stands in cycles: those of a curve's runs, kept, came to 8 GB


def keep_freed_memory() -> None:
    """Keep freed memory in this process, as `trainers/pretraining/driver.py` does for Ray's workers by their
    environment: else each
    large activation goes back to the kernel, which zeroes its pages again. A sixth of a step of 0.72 s."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def form_group_of_one() -> None:
    """Bring torch.distributed up with this process alone, without a port, as DeepSpeed and the collectives ask for.

    It stays up until the process ends: DeepSpeed keeps the first group that it sees for good.
    """
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed does not start without it
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def finetune_seed(
    order: FinetuneOrder,
    run: Store,
    workers: Workers,
    attempt: int,
    heartbeat: Heartbeat,
    on_validation: OnValidation,
) -> None:
    """Train, then judge and export where the order has it so; what was done already is not done again. A run that is
    asked to stop saves."""
    torch.set_num_threads(order.config.cluster.threads)
    chosen = workers.broadcast(read_chosen(order, run) if workers.leads else None)
    if chosen is None:
        chosen = train_seed(order, run, workers, attempt, heartbeat, on_validation)
    if chosen is not None and workers.leads and order.conclude:
        conclude(order, run, chosen, heartbeat)


def train_seed(
    order: FinetuneOrder,
    run: Store,
    workers: Workers,
    attempt: int,
    heartbeat: Heartbeat,
    on_validation: OnValidation,
) -> Chosen | None:
    """Train from where the run is to the end, and keep what validation chose: told to worker 0 alone, and to nobody of
    a run that was stopped."""
    exported = load_backbone(order.config, order.seed, order.weights)
    with ExitStack() as stack:
        parts, num_validated = assemble(
            order, workers, run, attempt, heartbeat, exported, on_validation, stack
        )
        limit_collectives(
            order.config.heartbeat.longest_seconds + GIL_GRACE_SECONDS
        )  # DeepSpeed's groups too
        if workers.leads:
            # Not before the parts fit together: until then a mistake in the configuration can be corrected.
            write_start(run, order)
        heartbeat.beat(0, "restore")
        at = train(parts)
    if at.stopped or not workers.leads:
        return None
    return keep_chosen(order, run, at, len(parts.train), num_validated, parts.encoder)


def assemble(
    order: FinetuneOrder,
    workers: Workers,
    run: Store,
    attempt: int,
    heartbeat: Heartbeat,
    exported: Exported,
    on_validation: OnValidation,
    stack: ExitStack,
) -> tuple[FinetuneParts, int]:
    """Encode the records, build model and engine; what needs closing goes onto the stack. Also the number of records
    that validate."""
    config, task = order.config, order.prepared.task
    examples, validation = training_records(order)
    encoder = make_encoder(config, task, exported, scale_of(task, examples))
    encoded, encoded_validation = encode_all(order, encoder, examples, validation)
    record_order = RecordOrder([len(row.ids) for row in encoded], config.batch.rows_per_step, order.seed)
    rows_per_worker = math.ceil(record_order.rows_per_step / workers.world_size)
    micro_batches = math.ceil(rows_per_worker / config.engine.micro_batch_rows)
    total_steps = config.batch.steps(len(examples))
    model = TaskModel(exported.model, task, config.adapt, order.seed)
    engine = Engine(
        model,
        config.engine,
        config.optimizer,
        partial(rate_factor, config.schedule, total_steps=total_steps),
        micro_batches=micro_batches,
        rate_scales=rate_scales(model, config.adapt.layer_decay),
    )
    stack.callback(engine.close)

    def validate() -> Any:
        with engine.evaluating() as module, beating(model.backbone, heartbeat, engine.num_steps):
            return evaluate_together(
                module,  # type: ignore[arg-type]
                encoder,
                validation,
                encoded_validation,
                workers,
                rows_per_batch=2 * config.engine.micro_batch_rows,
                device=engine.device,
                max_new_tokens=tokens_to_write(order),
            )

    def records(step: int) -> list[str]:
        return [examples[index].id for index in record_order.rows(step)]

    weighted = config.batch.class_weights and task.has_labels
    parts = FinetuneParts(
        config=config,
        seed=order.seed,
        identity=identity_of(order),
        total_steps=total_steps,
        workers=workers,
        engine=engine,
        encoder=encoder,
        train=encoded,
        order=record_order,
        micro_batches=micro_batches,
        class_weights=class_weights(task, examples) if weighted else None,
        validate=validate,
        on_validation=on_validation,
        metrics=stack.enter_context(MetricsWriter(run, attempt)) if workers.leads else None,
        writer=stack.enter_context(
            CheckpointWriter(
                run, config.checkpoint, rank=workers.rank, world_size=workers.world_size, attempt=attempt
            )
        ),
        guard=Guard(config.guard, records, "records") if workers.leads else Guard(config.guard),
        heartbeat=heartbeat,
        stop_requested=stack.enter_context(StopRequest(run)) if workers.leads else lambda: False,
        run=run,
    )
    return parts, len(validation)
