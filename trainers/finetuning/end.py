"""The end of a fine-tuning run: what validation chose is kept, then judged and exported.

The chosen weights and `chosen.json` are on storage before the test split is claimed. A run that was cut off after
that does not train again, where it could come to another choice and claim a second time.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cluster.configuration.stored_file import DamagedFileError, checksum_of, place_of, read_json
from cluster.console.errors import ConfigError
from cluster.hardware.machine import device_here
from cluster.storage.uris import Store
from trainers.checkpoints.commit import FOLDER as CHECKPOINTS
from trainers.evaluation.verdict import (
    CLAIM,
    EXPORT,
    VERDICT,
    claim_test_split,
    record_verdict,
    refuse_other_claim,
)
from trainers.exported.folder import Exported
from trainers.exported.model_files import ModelFolderError, read_header, read_weights
from trainers.exported.replacing import foreign_problem
from trainers.finetuning.backbone import load_backbone, make_encoder, read_facts
from trainers.finetuning.job import FinetuneOrder, drawn, origin_of
from trainers.finetuning.loop import Choice, Progress, beating, best_path, is_state
from trainers.finetuning.result import RESULT, TaskVerdict
from trainers.model.backbone import Backbone
from trainers.model.diverged import LOWER_RATE, DivergedModelError
from trainers.model.lora import merge_lora
from trainers.pretraining.run_folder import CONFIG
from trainers.recovery.heartbeat import Heartbeat
from trainers.recovery.stopping import RunStopped
from trainers.reporting.metrics import finite
from trainers.stored.run_files import PUT_BACK
from trainers.tasks.bootstrap import judged_interval
from trainers.tasks.encoding import Encoder
from trainers.tasks.evaluation import answers_to, asked, score_of
from trainers.tasks.export import export_task_model
from trainers.tasks.heads import TaskModel
from trainers.tasks.metrics import Answer
from trainers.tasks.records import Example

CHOSEN = "chosen.json"
ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Chosen:
    """What training came to, beside the weights."""

    choice: Choice
    steps: int
    train_records: int
    validation_records: int
    scale: tuple[float, float]
    """Of a regression's targets."""
    weights: str = ""
    """Checksum of the file of chosen weights; empty where none was kept, and of runs of before."""


def keep_chosen(
    order: FinetuneOrder,
    run: Store,
    at: Progress,
    train_records: int,
    validation_records: int,
    encoder: Encoder,
) -> Chosen:
    """Put what was chosen on storage, the weights first where something is to be done with them.

    Raises:
        DivergedModelError: no validation had a score.
    """
    if at.weights is None:
        raise DivergedModelError(
            f"no validation of {run.uri} has a score, so that there is no model to judge or export: the outputs were "
            f"not finite; {LOWER_RATE}"
        )
    chosen = Chosen(at.choice, at.step, train_records, validation_records, encoder.scale)
    if order.judge or order.keep_model:
        content = safetensors.torch.save(at.weights)
        run.put(best_path(at.choice.best_step), content)
        chosen = replace(chosen, weights=checksum_of(content))
    run.put(CHOSEN, json.dumps(asdict(chosen), allow_nan=False).encode())
    return chosen


def read_chosen(order: FinetuneOrder, run: Store) -> Chosen | None:
    """What an earlier start kept; None before the end of training, or where it kept no weights and they are needed.

    Raises:
        DivergedModelError: an older version chose a model whose validation loss is not finite.
    """
    if not run.exists(CHOSEN):
        return None
    remedy = (
        f"where the run holds no {CLAIM}, delete it, and training goes on from the newest checkpoint; else choose a "
        "new run.name"
    )
    chosen: Chosen = read_json(run, CHOSEN, Chosen, remedy, not_finite=True)
    if not all(map(math.isfinite, chosen.choice.metrics.values())):
        raise DivergedModelError(
            f"{run.uri}/{CHOSEN} names step {chosen.choice.best_step:,}, where the model's outputs were not finite; "
            f"{LOWER_RATE}"
        )
    if (order.judge or order.keep_model) and not run.exists(best_path(chosen.choice.best_step)):
        return None
    return chosen


def check_chosen(order: FinetuneOrder, run: Store) -> None:
    """Hold what a trained run kept against what judging it takes: of several seeds each, before the first is judged.

    Raises:
        RunStopped: it was not trained to its end.
        DivergedModelError, DamagedFileError, ModelFolderError, TestSplitError, ConfigError: it cannot be judged.
    """
    if (chosen := read_chosen(order, run)) is None:
        raise RunStopped(run.uri)
    if not run.exists(CONFIG):
        raise ConfigError([f"{run.uri}/{CONFIG} is missing, which the run was begun with; {PUT_BACK}"])
    if run.exists(VERDICT):
        read_json(run, VERDICT, TaskVerdict, PUT_BACK, not_finite=True)
    if not (order.judge or order.keep_model):
        return
    with torch.device("meta"):
        backbone = Backbone(read_facts(order.config).shape)
        model = TaskModel(backbone, order.prepared.task, order.config.adapt, order.seed)
    path = best_path(chosen.choice.best_step)
    check_weights(model, read_header(run, path), f"{run.uri}/{path}")
    if chosen.weights and checksum_of(run.read(path)) != chosen.weights:
        raise DamagedFileError(place_of(run, path), f"its checksum is not that of {CHOSEN}", PUT_BACK)
    refuse_other_claim(run, checkpoint_of(chosen.choice.best_step))
    if problem := foreign_problem(run.child(EXPORT)):
        raise ConfigError([problem])


def check_weights(model: TaskModel, found: Mapping[str, Tensor], at: str) -> None:
    """Raise `ModelFolderError` unless these are the model's trained parameters, all of them, in their shapes."""
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tensor.shape for name, tensor in found.items()}
    if wrong := sorted(name for name in trained | shapes if trained.get(name) != shapes.get(name)):
        raise ModelFolderError(
            f"{at}: {wrong[0]} is missing, or is no trained parameter of such a shape; {PUT_BACK}"
        )


def conclude(order: FinetuneOrder, run: Store, chosen: Chosen, heartbeat: Heartbeat) -> None:
    """Write down what was found; judge and export the chosen model where that is wanted. Worker 0 alone."""
    step = chosen.choice.best_step
    result = {
        "seed": order.seed,
        **origin_of(order.prepared, order.backbone),
        "best_step": step,
        "steps": chosen.steps,
        "score": chosen.choice.best_score,
        "validation": chosen.choice.metrics,
        "train_records": chosen.train_records,
        "validation_records": chosen.validation_records,
        **drawn(order),
    }
    if order.judge or order.keep_model:
        heartbeat.beat(step, "restore")
        exported = load_backbone(order.config, order.seed, order.weights)
        encoder = make_encoder(order.config, order.prepared.task, exported, chosen.scale)
        model = chosen_model(order, run, exported, step)
        if order.judge and not run.exists(VERDICT):
            with beating(model.backbone, heartbeat, step):
                judge(order, run, step, model, encoder)
        if order.keep_model:
            heartbeat.beat(step, "export")
            target = run.child(EXPORT)
            export_task_model(
                model, encoder, exported.boundary_id, target, overwrite=not foreign_problem(target)
            )
    if run.exists(VERDICT):
        result["test"] = read_json(run, VERDICT, TaskVerdict, PUT_BACK, not_finite=True)
    run.put(RESULT, json.dumps(finite(result), indent=2, allow_nan=False).encode())
    # The run is finished: nobody goes on from them.
    for info in [*run.list(f"{CHECKPOINTS}/"), *run.list("best/")]:
        if is_state(info.path):
            run.delete(info.path)
    run.delete(CHOSEN)


def judge(order: FinetuneOrder, run: Store, step: int, model: TaskModel, encoder: Encoder) -> None:
    """Read the test split, for this checkpoint alone, and write down the answers and the verdict."""
    claim_test_split(run, checkpoint_of(step))
    verdict = answer(order, model, encoder, order.prepared.read_test())
    run.put(ANSWERS, verdict.pop("answers"))
    record_verdict(run, {"step": step, **verdict})


def checkpoint_of(step: int) -> str:
    """How a claim on the test split names the chosen weights."""
    return f"step-{step:08d}"


def chosen_model(order: FinetuneOrder, run: Store, exported: Exported, step: int) -> TaskModel:
    """The model with the weights that validation chose, adapters merged, float32 on the CPU."""
    model = TaskModel(exported.model, order.prepared.task, order.config.adapt, order.seed)
    parameters, found = dict(model.named_parameters()), read_weights(run, best_path(step))
    check_weights(model, found, f"{run.uri}/{best_path(step)}")
    with torch.no_grad():
        for name, tensor in found.items():
            parameters[name].copy_(tensor)
    merge_lora(model)
    return model.eval()


@torch.inference_mode()
def answer(
    order: FinetuneOrder, model: TaskModel, encoder: Encoder, examples: list[Example]
) -> dict[str, Any]:
    """Metrics of the model on records, with a bootstrap interval of the task's metric, and every answer; in float32, as
    the model is exported and as `predict` answers: bfloat16 would answer some records otherwise.

    Raises:
        DivergedModelError: outputs that are not finite.
    """
    device, config = device_here(), order.config
    encoder = replace(encoder, truncate=True)
    encoded = encoder.encode(examples)
    found, losses, weights = answers_to(
        model.to(device),
        encoder,
        examples,
        encoded,
        rows_per_batch=2 * config.engine.micro_batch_rows,
        device=device,
        max_new_tokens=config.validation.max_new_tokens,
    )
    task = encoder.task
    rows_asked = asked(encoder, examples, encoded, config.validation.max_new_tokens)
    score = score_of(task, examples, found, losses, weights)
    if not score.is_score:
        diverged = sum(not one.is_finite for one in found)
        raise DivergedModelError(
            f"the chosen model has no verdict: its outputs for {diverged:,} of {len(examples):,} test records, or "
            f"their loss, are not finite; {LOWER_RATE}"
        )
    described: dict[str, Any] = {
        "metrics": score.metrics,
        "records": len(examples),
        "truncated": sum(row.truncated for row in rows_asked),
        "answers": answer_lines(examples, found),
    }
    if task.judged_by != "loss":
        described["interval"] = judged_interval(task, examples, [one.value for one in found])
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
    return "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines).encode()
