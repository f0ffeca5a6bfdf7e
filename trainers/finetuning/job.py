"""What a worker is sent for one seed's run: what it learns, from which weights, and of which records."""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cluster.configuration.config import to_dict, to_yaml
from cluster.storage.uris import Store, open_store
from data.tokens.tokenizer import fingerprint_of
from trainers.finetuning.backbone import ORIGIN
from trainers.finetuning.config import FinetuneConfig
from trainers.pretraining.run_folder import CONFIG
from trainers.tasks.encoding import Encoded, Encoder
from trainers.tasks.evaluation import answer_tokens
from trainers.tasks.labels import lacking_labels, one_label
from trainers.tasks.records import Example
from trainers.tasks.splits import PreparedTask, choose_budget
from trainers.tasks.task import Draw, TaskConfig


@dataclass(frozen=True)
class FinetuneOrder:
    """What a worker is sent."""

    config: FinetuneConfig
    prepared: PreparedTask
    seed: int
    backbone: str
    """What lies behind `backbone.uri`, as the run has it written down."""
    judge: bool = True
    """Read the test split once, at the end. A sweep's trials do not: they do not even load it."""
    keep_model: bool = True
    """Export the chosen model."""
    weights: str = ""
    """Digest that the backbone has wherever it is loaded; empty: it is not held against one."""
    conclude: bool = True
    """Judge and export once trained. Of several seeds none is, before all are trained and fit to be."""


def origin_of(prepared: PreparedTask, backbone: str) -> dict[str, str]:
    """What a run learns, what chooses and judges, and from which weights; whether they are still the same decides if it
    may go on. None of it stands in a key: a task file may change in place, and a backbone too."""
    task = prepared.task
    return {
        "task": prepared.digest,
        "metric": task.judged_by,
        "prompt": to_yaml(task.prompt),
        "backbone": backbone,
    }


def write_start(run: Store, order: FinetuneOrder) -> None:
    """Write down what the run is."""
    config = order.config
    run.put(CONFIG, to_yaml(replace(config, run=replace(config.run, seeds=(order.seed,)))).encode())
    run.put(ORIGIN, json.dumps(origin_of(order.prepared, order.backbone), allow_nan=False).encode())


def identity_of(order: FinetuneOrder) -> dict[str, Any]:
    """What a checkpoint belongs to."""
    sections = to_dict(order.config)
    tokenizer = fingerprint_of(open_store(order.config.backbone.uri).read("tokenizer.json"))
    kept = {name: sections[name] for name in ("backbone", "adapt", "batch", "optimizer", "schedule")}
    if order.config.batch.draw == draw_before(order.config, order.prepared):
        del kept["batch"]["draw"]  # an older run's checkpoints have none
    origin = origin_of(order.prepared, order.backbone)
    origin["weights"] = origin.pop("backbone")  # the section of that name is among the kept ones
    return {**origin, "tokenizer": tokenizer, **kept}


def draw_before(config: FinetuneConfig, prepared: PreparedTask) -> Draw:
    """How a run drew its records that is older than `batch.draw`: labels took turns wherever a record has one. Where
    all records are taken it is the same either way."""
    limits = {"train": config.batch.label_budget, "validation": config.validation.max_rows}
    draws = any(0 < limit < prepared.counts[split] for split, limit in limits.items())
    return "balanced" if draws and one_label(prepared.task) else config.batch.draw


def drawn(order: FinetuneOrder) -> dict[str, Any]:
    """How the records of a run were drawn, and the labels that no training record has."""
    task = order.prepared.task
    draw = order.config.batch.draw if one_label(task) else "random"
    return {"draw": draw, "lacking_labels": lacking_labels(task, training_records(order)[0])}


def training_records(order: FinetuneOrder) -> tuple[list[Example], list[Example]]:
    """What trains, and what validates: as the budget and the validation's limit have it."""
    config, task = order.config, order.prepared.task
    draw, limits = config.batch.draw, (config.batch.label_budget, config.validation.max_rows)
    examples = choose_budget(task, order.prepared.read("train"), limits[0], order.seed, draw)
    return examples, choose_budget(task, order.prepared.read("validation"), limits[1], 0, draw)


def encode_all(
    order: FinetuneOrder, encoder: Encoder, examples: list[Example], validation: list[Example]
) -> tuple[list[Encoded], list[Encoded]]:
    """What trains and what validates, encoded. Raises `ConfigError` for records that do not fit."""
    found = encoder.encode(examples), encoder.encode(validation)
    if new_tokens := tokens_to_write(order):
        encoder.ask(
            validation, answer_tokens(new_tokens, encoder.max_tokens)
        )  # refused now, not once trained
    return found


def tokens_to_write(order: FinetuneOrder) -> int:
    """Tokens of an answer that validation has written; 0 where it needs none."""
    task = order.prepared.task
    writes = task.kind == "generation" and task.judged_by != "loss"
    return order.config.validation.max_new_tokens if writes else 0


def scale_of(task: TaskConfig, examples: list[Example]) -> tuple[float, float]:
    """Mean and deviation of a regression's targets: heads start near zero, and learn at unit scale."""
    if task.kind != "regression":
        return 0.0, 1.0
    targets = np.array([example.target for example in examples])
    return float(targets.mean()), float(targets.std()) or 1.0
