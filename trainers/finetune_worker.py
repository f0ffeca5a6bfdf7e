"""One worker's fine-tuning of one seed: put the parts together, train, judge what validation chose, export it.

`work` runs on each worker of a Ray Train group. `work_alone` is the same in this process as a group of one: with few
labels, starting Ray costs more than the training does, and a sweep's trial has a process of its own already.
"""

import copy
import ctypes
import json
import math
import os
import platform
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from cluster.config import to_dict, to_yaml
from cluster.storage import Store, open_store
from data.tokens import fingerprint_of
from trainers.checkpoint import claim_attempt
from trainers.checkpoint_commit import FOLDER as CHECKPOINTS
from trainers.checkpoint_writer import CheckpointWriter
from trainers.collectives import Workers
from trainers.engine import Engine
from trainers.export import Exported
from trainers.finetune_backbone import load_backbone, make_encoder
from trainers.finetune_config import FinetuneConfig, seed_store
from trainers.finetune_loop import FinetuneParts, OnValidation, Progress, train
from trainers.lora import merge_lora
from trainers.metrics import MetricsWriter
from trainers.run_folder import CONFIG
from trainers.schedule import rate_factor
from trainers.task import TaskConfig
from trainers.task_batches import RecordOrder
from trainers.task_data import PreparedTask, choose_budget, labels_in
from trainers.task_evaluation import answers_to, class_weights, evaluate_together, score_of
from trainers.task_export import export_task_model
from trainers.task_metrics import Answer, bootstrap_interval, measure
from trainers.task_model import TaskModel, rate_scales
from trainers.task_records import Example
from trainers.verdict import EXPORT, VERDICT, claim_test_split, record_verdict

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as malloc.h of glibc has them
RESULT, ORIGIN = "result.json", "origin.json"
ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class FinetuneOrder:
    """What a worker is sent."""

    config: FinetuneConfig
    prepared: PreparedTask
    seed: int
    backbone: str
    """Digest of what lies behind `backbone.uri`."""
    judge: bool = True
    """Read the test split once, at the end. A sweep's trials do not: they do not even load it."""
    keep_model: bool = True
    """Export the chosen model."""


def work(arguments: dict[str, Any]) -> None:
    """Run on every worker of a group, torch.distributed up; `arguments["task"]` is a `FinetuneOrder`."""
    finetune_seed(arguments["task"], lambda step, score: None)


def work_alone(order: FinetuneOrder, on_validation: OnValidation = lambda step, score: None) -> None:
    """The same in this process, which forms a group of one."""
    form_group_of_one()
    keep_freed_memory()
    finetune_seed(order, on_validation)


def keep_freed_memory() -> None:
    """Keep freed memory in this process, as `trainers/run.py` does for Ray's workers by their environment: else each
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


def finetune_seed(order: FinetuneOrder, on_validation: OnValidation) -> None:
    """Train, then judge and export; what was done already is not done again."""
    run, config = seed_store(order.config, order.seed), order.config
    torch.set_num_threads(config.cluster.threads)
    workers = Workers()
    attempt = workers.broadcast(claim_attempt(run) if workers.leads else 0)
    exported = load_backbone(config, order.seed)
    with ExitStack() as stack:
        parts, num_validated = assemble(order, workers, run, attempt, exported, on_validation, stack)
        if workers.leads:
            # Not before the parts fit together: until then a mistake in the configuration can be corrected.
            run.put(CONFIG, to_yaml(replace(config, run=replace(config.run, seeds=(order.seed,)))).encode())
            run.put(ORIGIN, json.dumps(origin_of(order.prepared, order.backbone)).encode())
        at = train(parts)
    if workers.leads:
        conclude(order, run, parts, at, num_validated)


def training_records(order: FinetuneOrder) -> tuple[list[Example], list[Example]]:
    """What trains, and what validates: as the budget and the validation's limit have it."""
    config = order.config
    examples = choose_budget(
        order.prepared.task, order.prepared.read("train"), config.batch.label_budget, order.seed
    )
    validation = choose_budget(
        order.prepared.task, order.prepared.read("validation"), config.validation.max_rows, seed=0
    )
    return examples, validation


def scale_of(task: TaskConfig, examples: list[Example]) -> tuple[float, float]:
    """Mean and deviation of a regression's targets: heads start near zero, and learn at unit scale."""
    if task.kind != "regression":
        return 0.0, 1.0
    targets = np.array([example.target for example in examples])
    return float(targets.mean()), float(targets.std()) or 1.0


def assemble(
    order: FinetuneOrder,
    workers: Workers,
    run: Store,
    attempt: int,
    exported: Exported,
    on_validation: OnValidation,
    stack: ExitStack,
) -> tuple[FinetuneParts, int]:
    """Encode the records, build model and engine; what needs closing goes onto the stack. Also the number of records
    that validate."""
    config, task = order.config, order.prepared.task
    examples, validation = training_records(order)
    encoder = make_encoder(config, task, exported, scale_of(task, examples))
    encoded, encoded_validation = encoder.encode(examples), encoder.encode(validation)
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

    def validate() -> Any:
        with engine.evaluating() as module:
            return evaluate_together(
                module,  # type: ignore[arg-type]
                encoder,
                validation,
                encoded_validation,
                workers,
                rows_per_batch=2 * config.engine.micro_batch_rows,
                device=engine.device,
                max_new_tokens=0 if task.judged_by == "loss" else config.validation.max_new_tokens,
            )

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
        class_weights_C=class_weights(task, examples, labels_in) if weighted else None,
        validate=validate,
        on_validation=on_validation,
        metrics=stack.enter_context(MetricsWriter(run, attempt)) if workers.leads else None,
        writer=stack.enter_context(
            CheckpointWriter(
                run, config.checkpoint, rank=workers.rank, world_size=workers.world_size, attempt=attempt
            )
        ),
        run=run,
    )
    return parts, len(validation)


def origin_of(prepared: PreparedTask, backbone: str) -> dict[str, str]:
    """What a run learns, and from which weights; whether they are still the same decides if it may go on."""
    return {"task": prepared.digest, "backbone": backbone}


def identity_of(order: FinetuneOrder) -> dict[str, Any]:
    """What a checkpoint belongs to."""
    sections = to_dict(order.config)
    tokenizer = fingerprint_of(open_store(order.config.backbone.uri).read("tokenizer.json"))
    kept = {name: sections[name] for name in ("backbone", "adapt", "batch", "optimizer", "schedule")}
    return {"task": order.prepared.digest, "weights": order.backbone, "tokenizer": tokenizer, **kept}


# --- once trained ---


def conclude(
    order: FinetuneOrder, run: Store, parts: FinetuneParts, at: Progress, num_validated: int
) -> None:
    """Write down what was found; judge and export the chosen model where that is wanted. Worker 0 alone."""
    if at.weights is None:
        raise RuntimeError(f"no validation of {run.uri} gave a number; lower optimizer.learning_rate")
    model, boundary_id = chosen_model(order, at)
    result = {
        "seed": order.seed,
        **origin_of(order.prepared, order.backbone),
        "metric": order.prepared.task.judged_by,
        "best_step": at.choice.best_step,
        "steps": at.step,
        "score": at.choice.best_score,
        "validation": at.choice.metrics,
        "train_records": len(parts.train),
        "validation_records": num_validated,
    }
    if order.judge and not run.exists(VERDICT):
        claim_test_split(run, f"step-{at.choice.best_step:08d}")
        examples = order.prepared.read_test()
        verdict = answer(order, parts, model, examples)
        run.put(ANSWERS, verdict.pop("answers"))
        record_verdict(run, {"step": at.choice.best_step, **verdict})
    if run.exists(VERDICT):
        result["test"] = json.loads(run.read(VERDICT))
    if order.keep_model:
        export_task_model(model, parts.encoder, boundary_id, run.child(EXPORT))
    run.put(RESULT, json.dumps(result, indent=2).encode())
    for info in [
        *run.list(f"{CHECKPOINTS}/"),
        *run.list("best/"),
    ]:  # the run is finished: nobody goes on from them
        run.delete(info.path)


def chosen_model(order: FinetuneOrder, at: Progress) -> tuple[TaskModel, int]:
    """The model with the weights that validation chose, adapters merged, float32 on the CPU; and the id of the token
    that frames a document."""
    exported = load_backbone(order.config, order.seed)
    model = TaskModel(exported.model, order.prepared.task, order.config.adapt, order.seed)
    parameters = dict(model.named_parameters())
    assert at.weights is not None
    with torch.no_grad():
        for name, tensor in at.weights.items():
            parameters[name].copy_(tensor)
    merge_lora(model)
    return model.eval(), exported.boundary_id


@torch.inference_mode()
def answer(
    order: FinetuneOrder, parts: FinetuneParts, model: TaskModel, examples: list[Example]
) -> dict[str, Any]:
    """Metrics of the model on records, with a bootstrap interval of the task's metric, and every answer; in the
    precision that validation chose it in."""
    device, config = parts.engine.device, order.config
    encoder = replace(parts.encoder, truncate=True)
    encoded = encoder.encode(examples)
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    found, losses, weights = answers_to(
        copy.deepcopy(model).to(device, dtype),
        encoder,
        examples,
        encoded,
        rows_per_batch=2 * config.engine.micro_batch_rows,
        device=device,
        max_new_tokens=config.validation.max_new_tokens,
    )
    task, values = encoder.task, [one.value for one in found]
    described: dict[str, Any] = {
        "metrics": score_of(task, examples, found, losses, weights).metrics,
        "records": len(examples),
        "truncated": sum(row.truncated for row in encoded),
        "answers": answer_lines(examples, found),
    }
    if task.judged_by != "loss":

        def of_rows(rows: np.ndarray) -> float:
            return measure(task, [examples[i] for i in rows], [values[i] for i in rows])[task.judged_by]

        described["interval"] = bootstrap_interval(of_rows, len(examples), resamples=200)
    return described


def answer_lines(examples: list[Example], answers: list[Answer]) -> bytes:
    """JSON lines of records, targets and answers."""
    lines = [
        {
            "id": example.id,
            "text": example.text,
            "pair": example.pair,
            "target": example.target,
            "answer": answer.value,
            "confidence": None if math.isnan(answer.confidence) else answer.confidence,
        }
        for example, answer in zip(examples, answers, strict=True)
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
