"""What tests of fine-tuning share: a small backbone and task in a folder, and runs on them, here or as a command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from task_files import put_backbone, put_lines, put_task, sentences

from cluster.configuration.config import from_dict
from cluster.sessions.session import PROJECT
from cluster.storage.uris import Store, open_store
from tests.small_run import start_command
from trainers.finetuning.config import FinetuneConfig
from trainers.reporting.metrics import read_metrics, steps_of
from trainers.tasks.evaluation import answers_to
from trainers.tasks.export import load_task_model
from trainers.tasks.metrics import Answer
from trainers.tasks.records import Example

QUICK = {
    "batch": {"rows_per_step": 16, "min_steps": 120, "epochs": 1.0},
    "engine": {"precision": "fp32", "zero_stage": 0, "micro_batch_rows": 8},
    "optimizer": {"learning_rate": 0.01},
    "validation": {"times": 3},
}
SHORT = {"rows_per_step": 16, "min_steps": 6, "max_steps": 6, "epochs": 1.0}


def put_place(folder: Path) -> Path:
    """A folder with a backbone and a task that has something to learn."""
    uri = put_lines(folder / "records.jsonl", sentences(400))
    put_task(folder / "task.yaml", name="t", kind="classification", data={"uri": uri})
    put_backbone(folder / "model")
    return folder


def settings(place: Path, name: str, **changes: Any) -> dict[str, Any]:
    sections: dict[str, Any] = {key: dict(value) for key, value in QUICK.items()}
    for key, value in changes.items():
        sections.setdefault(key, {}).update(value)
    places = {"storage": str(place / "runs"), "prepared": str(place / "prepared")}
    sections["run"] = places | {"name": name, "task": str(place / "task.yaml")} | sections.get("run", {})
    sections["backbone"] = {"uri": str(place / "model")} | sections.get("backbone", {})
    return sections


def config(place: Path, name: str, **changes: Any) -> FinetuneConfig:
    return from_dict(FinetuneConfig, settings(place, name, **changes))


def command(place: Path, name: str, changes: dict[str, Any]) -> list[str]:
    """The command line of the same run."""
    flat = [
        (f"{section}.{key}", value)
        for section, keys in settings(place, name, **changes).items()
        for key, value in keys.items()
    ]
    arguments = [
        part
        for key, value in flat
        for part in (f"--{key}", str(value).lower() if value is True else str(value))
    ]
    return [sys.executable, str(PROJECT / "trainers" / "finetune.py"), *arguments]


def start(place: Path, name: str, changes: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start the command; what it prints goes to NAME.txt."""
    return start_command(command(place, name, changes), place / f"{name}.txt")


def run_of(place: Path, name: str, seed: int = 0) -> Store:
    return open_store(str(place / "runs")).child(f"{name}/seed-{seed}")


def losses_of(run: Store) -> list[float]:
    return [record["loss"] for record in steps_of(read_metrics(run))]


def judged_answers(run: Store) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.read("answers.jsonl").decode().split("\n") if line]


def answers_again(export: Store, answers: list[dict[str, Any]], max_new_tokens: int = 64) -> list[Answer]:
    """What the exported model answers to records that were judged."""
    model, encoder = load_task_model(export)
    examples = [
        Example(a["id"], a["text"], a["pair"], a["text"].split(" ") if "token" in model.kind else [], None)
        for a in answers
    ]
    with torch.inference_mode():
        return answers_to(
            model, encoder, examples, encoder.encode(examples), rows_per_batch=7, device=torch.device("cpu"),
            max_new_tokens=max_new_tokens,
        )[0]  # fmt: skip
