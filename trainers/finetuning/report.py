"""What a task holds before training, and what a fine-tuning run came to: tables and one page."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.table import Table

from cluster.configuration.stored_file import DamagedFileError, place_of, read_text
from cluster.storage.uris import Store
from trainers.finetuning.result import RESULT, FinetuneResult, read_result
from trainers.reporting.charts import ORANGE, Chart, draw_plain
from trainers.reporting.metrics import read_metrics, validations_of
from trainers.reporting.page import REPORT, page_environment
from trainers.stored.run_files import PUT_BACK
from trainers.tasks.encoding import Encoder
from trainers.tasks.labels import labels_in, one_label
from trainers.tasks.metrics import interval_told, same_text, seeds_interval, squad_scores
from trainers.tasks.splits import PreparedTask, target_text
from trainers.tasks.stored_records import read_answers
from trainers.tasks.task import TaskConfig

ERRORS_SHOWN = 30
"""Wrong answers on the page, the surest first."""
MOST_LABELS = 30
"""Labels of a confusion matrix; of more, the page shows the commonest confusions alone."""
CONFUSIONS_SHOWN = 30
"""Pairs of labels that were taken for each other, the commonest first."""


# --- before training ---


def task_tables(prepared: PreparedTask, encoder: Encoder) -> list[Table]:
    """Balance of the classes and lengths in tokens, as they are trained with (second texts, templates and answers
    included), of train and validation; of test the count alone."""
    task = prepared.task
    splits = {name: prepared.read(name) for name in ("train", "validation")}
    left_out = ", ".join(f"{number:,} {reason}" for reason, number in prepared.left_out.items() if number)
    counts = Table(title=f"{task.name}: {task.kind}, judged by {task.judged_by}")
    for column in ("split", "records", "median tokens", "longest", f"over {encoder.max_tokens:,}"):
        counts.add_column(column, justify="left" if column == "split" else "right")
    tables = [counts]
    whole = replace(encoder, max_tokens=sys.maxsize)
    for name, examples in splits.items():
        # Only measured here: what is too long is refused when the run is put together.
        lengths = [len(row.ids) for row in whole.encode(examples)]
        over = sum(length > encoder.max_tokens for length in lengths)
        counts.add_row(
            name, f"{len(examples):,}", f"{np.median(lengths):.0f}", f"{max(lengths):,}", f"{over:,}"
        )
    counts.add_row("test", f"{prepared.counts['test']:,}", "", "", "")
    if left_out:
        counts.caption = f"left out: {left_out}"
    if task.has_labels:
        balance = Table("label", *(f"{name} (share)" for name in splits))
        counted = {name: labels_in(task, examples) for name, examples in splits.items()}
        for label in task.labels:
            cells = [f"{c[label]:,} ({c[label] / max(1, sum(c.values())):.1%})" for c in counted.values()]
            balance.add_row(label, *cells)
        tables.append(balance)
    return tables


# --- after it ---


def results_table(result: FinetuneResult) -> Table:
    """One row a seed, and their mean with its interval."""
    table = Table(
        "seed", "best step", f"validation {result.metric}", f"test {result.metric}", "95 % interval"
    )
    for seed in result.seeds:
        test = seed.get("test")
        interval = test.get("interval") if test else None
        table.add_row(
            str(seed["seed"]),
            f"{seed['best_step']:,} of {seed['steps']:,}",
            f"{seed['validation'][result.metric]:.4f}",
            f"{test['metrics'][result.metric]:.4f}" if test else "not read",
            f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "",
        )
    if len(result.seeds) > 1:
        means = [
            seeds_interval(values) for split in ("validation", "test") if (values := result.values(split))
        ]
        cells = [f"{mean:.4f} ({interval_told(low, high)})" for mean, low, high in means]
        table.add_row("mean", "", *cells)
    return table


def write_task_report(run: Store, prepared: PreparedTask) -> str:
    """Make the page of one seed's run and put it there; returns its URI."""
    task = prepared.task
    result = read_result(run, task.judged_by)
    if "test" not in result:
        raise DamagedFileError(place_of(run, RESULT), "it has no verdict of the test split", PUT_BACK)
    answers = read_answers(run, "answers.jsonl", task, PUT_BACK)
    validations = [
        (r["step"], r["validation"].get(task.judged_by)) for r in validations_of(read_metrics(run))
    ]
    curve = [(step, value) for step, value in validations if value is not None]
    page = {
        "name": run.uri.rstrip("/").rpartition("/runs/")[2] or run.uri,
        "task": task,
        "result": result,
        "charts": [validation_chart(task, curve)] if curve else [],
        "confusion": confusion(task, answers),
        "confusions": confusions(task, answers),
        "errors": list(errors(task, answers)),
        "wrong": sum(not is_right(task, answer) for answer in answers),
        "prepared": prepared,
        "draws": list(draws(result, prepared)),
        "config": read_text(run, "config.yaml", PUT_BACK),
        "text": target_text,
    }
    run.put(REPORT, page_environment().get_template("task_report.html").render(page).encode())
    return f"{run.uri.rstrip('/')}/{REPORT}"


def draws(result: dict[str, Any], prepared: PreparedTask) -> Iterator[str]:
    """A sentence for each split of which some records were drawn, and one on labels that were not met in train."""
    for name in ("train", "validation"):
        given, there = result[f"{name}_records"], prepared.counts[name]
        if given < there:
            balanced = one_label(prepared.task) and result.get("draw", "balanced") == "balanced"
            how = f"balanced by all {there:,} labels of the pool" if balanced else f"at random of {there:,}"
            yield f"The {given:,} records of {name} were drawn {how}."
    if lacking := result.get("lacking_labels"):
        yield f"No training record has the labels {', '.join(lacking)}."


def validation_chart(task: TaskConfig, curve: Sequence[tuple[int, float]]) -> Chart:
    steps, values = zip(*sorted(dict(curve).items()), strict=True)

    def draw(axes: Any) -> None:
        axes.plot(steps, values, color=ORANGE, linewidth=1.4, marker="o", markersize=3)
        axes.set_xlim(0, None)

    return draw_plain(
        f"Validation {task.judged_by}", task.judged_by, "step", "After each validation of the run.", draw
    )


def is_right(task: TaskConfig, answer: dict[str, Any]) -> bool:
    """Whether an answer is the target, as the exact metrics of the kind have it; a number is never wrong, only off."""
    target, found = answer["target"], answer["answer"]
    if task.kind == "regression":
        return True
    if task.kind == "question_answering":
        return squad_scores(target["text"], found)["exact_match"] == 1
    if task.kind == "generation":
        return same_text(target, found)
    return set(found) == set(target) if task.multi_label else found == target


def confusion(task: TaskConfig, answers: Sequence[dict[str, Any]]) -> list[tuple[str, list[int]]]:
    """Rows of the confusion matrix: a target, and how often each label was answered; empty where there is none."""
    if not has_one_label(task) or len(task.labels) > MOST_LABELS:
        return []
    pairs = label_pairs(task, answers)
    return [(target, [pairs[target, found] for found in task.labels]) for target in task.labels]


def confusions(task: TaskConfig, answers: Sequence[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """Target, answer and how often, the commonest first, where the labels are too many for a matrix."""
    if not has_one_label(task) or len(task.labels) <= MOST_LABELS:
        return []
    wrong = [(*pair, number) for pair, number in label_pairs(task, answers).items() if pair[0] != pair[1]]
    return sorted(wrong, key=lambda each: (-each[2], each))[:CONFUSIONS_SHOWN]


def has_one_label(task: TaskConfig) -> bool:
    """Whether a text, or each word, has one label, so that another can be taken for it."""
    return task.has_labels and not task.multi_label


def label_pairs(task: TaskConfig, answers: Sequence[dict[str, Any]]) -> Counter[tuple[str, str]]:
    """How often each label was answered where each is right."""
    pairs: Counter[tuple[str, str]] = Counter()
    for answer in answers:
        several = task.kind == "token_classification"
        targets, found = (
            (answer["target"], answer["answer"]) if several else ([answer["target"]], [answer["answer"]])
        )
        pairs.update(zip(targets, found, strict=True))
    return pairs


def errors(task: TaskConfig, answers: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The wrong answers that the model was surest of; of numbers those furthest off."""
    if task.kind == "regression":
        ranked = sorted(answers, key=lambda answer: -abs(answer["answer"] - answer["target"]))
    else:
        wrong = [answer for answer in answers if not is_right(task, answer)]
        ranked = sorted(wrong, key=lambda answer: -(answer["confidence"] or 0))
    yield from ranked[:ERRORS_SHOWN]
