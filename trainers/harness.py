"""A task as EleutherAI's lm-eval reads it, put to an exported model by lm-eval and by this project: do both agree?

    python trainers/harness.py --model runs/NAME/export --task trainers/tasks/movies.yaml --shots 0 4

`make lm-eval` runs it where lm-eval is installed. The task stays in the output folder, for lm-eval's own command too:
`lm_eval --model hf --model_args pretrained=FOLDER,dtype=float32,add_bos_token=True --include_path …`. Exits with
status 1 where the two differ.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import yaml
from rich.table import Table

from cluster.configuration.config import run_entry
from cluster.console.errors import ConfigError
from cluster.console.terminal import Terminal
from cluster.hardware.machine import device_here
from cluster.limits.bounds import whole_number
from cluster.storage.uris import open_store
from trainers.evaluation.scoring import number_problems
from trainers.exported.folder import Exported, load_exported
from trainers.exported.local_copy import local_copy
from trainers.tasks.few_shot import (
    WRITTEN,
    FewShotConfig,
    cannot_be_asked,
    choose_asked,
    choose_shots,
    log_likelihoods,
    questions,
)
from trainers.tasks.splits import PreparedTask, prepare_task
from trainers.tasks.task import load_task

NOTE = """\
acc_norm is lm-eval's measure, here and there: a log-likelihood divided by its answer's characters. It is not what
evaluate.py calls per_token, which divides by tokens."""
MAX_NATS_APART = 0.01
"""Of log-likelihoods in float32. A model that knows nothing is as accurate either way."""


@dataclass(frozen=True)
class Asked:
    """One task with one number of shots, as both sides are asked it."""

    name: str
    shots: int
    prompts: list[str]
    """With their solved records; a record each."""
    answers: list[str]
    """To choose from, as they stand after a prompt."""
    golds: list[int]
    """The right one of them; a record each."""


@dataclass(frozen=True)
class Scores:
    """What one side found."""

    sums: np.ndarray
    """Log-likelihood of each answer after each prompt, [records, answers]."""
    accuracy: float
    acc_norm: float
    """Accuracy where each log-likelihood is divided by its answer's characters."""


def main(argv: Sequence[str] | None = None) -> None:
    options = parsed(argv)
    if importlib.util.find_spec("lm_eval") is None:
        raise SystemExit("harness.py: lm-eval is not installed here; `make lm-eval` brings it along")
    folder = Path(options.output).resolve()
    settings = {key: getattr(options, key) for key in ("seed", "max_rows", "rows_per_batch")}
    prepared = prepare_task(load_task(options.task), open_store(options.prepared))
    source = local_copy(open_store(options.model))
    exported = load_exported(source)
    all_asked = [
        ask_of(exported, prepared, FewShotConfig(shots=n, **settings)) for n in dict.fromkeys(options.shots)
    ]
    exported.model.to(device_here())
    ours = [our_scores(exported, asked, options.rows_per_batch) for asked in all_asked]
    for asked in all_asked:
        put_lm_eval_task(folder, asked)
    model = source.uri.removeprefix("file://")
    theirs = lm_eval_scores(folder, model, all_asked, options.rows_per_batch)
    Terminal().print(table_of(all_asked, ours, theirs))
    print(NOTE)
    if problems := [
        line for three in zip(all_asked, ours, theirs, strict=True) for line in differences(*three)
    ]:
        raise SystemExit("\n".join(problems))


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="URI", help="folder of an exported decoder")
    parser.add_argument("--task", required=True, metavar="FILE", help="task file with labels")
    parser.add_argument(
        "--shots", type=whole_number, nargs="+", default=[0], metavar="N", help="solved records (default: 0)"
    )
    parser.add_argument(
        "--seed", type=whole_number, default=0, help="of the choice of solved records (default: 0)"
    )
    parser.add_argument(
        "--max-rows", type=whole_number, default=0, metavar="N", help="of validation; 0, the default: all"
    )
    parser.add_argument("--rows-per-batch", type=whole_number, default=16, metavar="N", help="default: 16")
    parser.add_argument(
        "--prepared", default="corpora/tasks/prepared", metavar="URI", help="folder of split tasks"
    )
    parser.add_argument("--output", default="runs/lm-eval", metavar="FOLDER", help="for what lm-eval reads")
    options = parser.parse_args(argv)
    if problems := number_problems(options):
        parser.error("; ".join(problems))
    return options


def ask_of(exported: Exported, prepared: PreparedTask, config: FewShotConfig) -> Asked:
    """What `evaluate.py --task` asks of the validation split.

    Raises:
        ConfigError: a model or a task that cannot be asked, or one whose answers are written freely.
    """
    task = prepared.task
    problems = list(cannot_be_asked(exported, task, config))
    if task.kind in WRITTEN:
        problems.append(
            f"kind={task.kind} writes its answer; only a choice of labels is compared with lm-eval"
        )
    if problems:
        raise ConfigError(problems)
    examples = choose_asked(prepared, config)
    prompts, answers = questions(task, choose_shots(prepared, config), examples)
    golds = [task.labels.index(example.target) for example in examples]
    return Asked(f"{task.name}-{config.shots}-shots", config.shots, prompts, answers, golds)


def our_scores(exported: Exported, asked: Asked, rows_per_batch: int) -> Scores:
    sums, _ = log_likelihoods(exported, asked.prompts, asked.answers, rows_per_batch)
    golds, characters = np.array(asked.golds), np.array([len(answer) for answer in asked.answers])
    right, right_by_characters = sums.argmax(axis=1) == golds, (sums / characters).argmax(axis=1) == golds
    return Scores(sums, float(right.mean()), float(right_by_characters.mean()))


def put_lm_eval_task(folder: Path, asked: Asked) -> None:
    """Write the questions, one a line, and the task file that leads lm-eval to them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / f"{asked.name}.jsonl"
    with lines.open("w", encoding="utf-8") as file:
        for prompt, gold in zip(asked.prompts, asked.golds, strict=True):
            row = {"prompt": prompt, "choices": asked.answers, "gold": gold}
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    described = {
        "task": asked.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(lines)}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        # Names of columns: lm-eval takes these as they are, where a template would be rendered.
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",  # the choices bring what stands before an answer
        "num_fewshot": 0,  # the prompts hold their solved records
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
    }
    (folder / f"{asked.name}.yaml").write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")


def lm_eval_scores(folder: Path, model: str, all_asked: Sequence[Asked], rows_per_batch: int) -> list[Scores]:
    """What lm-eval finds with transformers' model of the same folder, without a network.

    The boundary that opens each text in training opens each prompt: add_bos_token.
    """
    os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"), "1")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    import lm_eval  # here: it is in no other environment than its own, and reads the variables above
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": "float32", "add_bos_token": True},
        tasks=[asked.name for asked in all_asked],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=rows_per_batch,
        device=str(device_here()),
        bootstrap_iters=0,
    )
    return [scores_in(found, asked) for asked in all_asked]


def scores_in(found: Mapping[str, Any], asked: Asked) -> Scores:
    """One task's scores in what lm-eval found, which has to have put the very same texts to the model."""
    samples = sorted(found["samples"][asked.name], key=lambda sample: sample["doc_id"])
    texts = [[tuple(text) for text in sample["arguments"]] for sample in samples]
    assert texts == [[(prompt, answer) for answer in asked.answers] for prompt in asked.prompts]
    sums = np.array([[response[0] for response in sample["filtered_resps"]] for sample in samples])
    metrics = found["results"][asked.name]
    return Scores(sums, metrics["acc,none"], metrics["acc_norm,none"])


def nats_apart(ours: Scores, theirs: Scores) -> float:
    return float(np.abs(ours.sums - theirs.sums).max())


def differences(asked: Asked, ours: Scores, theirs: Scores) -> list[str]:
    """A line for each number that is not the same on both sides."""
    pairs = {"acc": (ours.accuracy, theirs.accuracy), "acc_norm": (ours.acc_norm, theirs.acc_norm)}
    found = [
        f"{asked.name}: {what} is {one:.4f} here and {other:.4f} by lm-eval"
        for what, (one, other) in pairs.items()
        if abs(one - other) > 1e-9  # means of the same zeros and ones
    ]
    if (apart := nats_apart(ours, theirs)) > MAX_NATS_APART:
        found.append(
            f"{asked.name}: log-likelihoods are up to {apart:.3g} nats apart, more than {MAX_NATS_APART}"
        )
    return found


def table_of(all_asked: Sequence[Asked], ours: Sequence[Scores], theirs: Sequence[Scores]) -> Table:
    # Two lines a heading: the table then fits into 80 columns.
    accuracies = [f"{what}\n{side}" for what in ("acc", "acc_norm") for side in ("here", "lm-eval")]
    table = Table("shots", "rows", *accuracies, "rows\napart", "nats\napart")
    for asked, our, their in zip(all_asked, ours, theirs, strict=True):
        rows_apart = int((our.sums.argmax(axis=1) != their.sums.argmax(axis=1)).sum())
        numbers = [f"{each:.4f}" for each in (our.accuracy, their.accuracy, our.acc_norm, their.acc_norm)]
        apart = [f"{rows_apart:,}", f"{nats_apart(our, their):.1e}"]
        table.add_row(str(asked.shots), f"{len(asked.golds):,}", *numbers, *apart)
    return table


if __name__ == "__main__":
    run_entry(main, ValueError)  # a model or task that does not fit
