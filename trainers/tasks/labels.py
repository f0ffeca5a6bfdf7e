"""The labels of a task: which there are, how often each stands in a split, and what is said where a split lacks one."""

import logging
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from cluster.console.errors import ConfigError
from trainers.tasks.records import Example
from trainers.tasks.task import SPLITS, TaskConfig

logger = logging.getLogger(__name__)


def labels_in(task: TaskConfig, examples: Sequence[Example]) -> Counter[str]:
    """How often each label (or tag) stands in the examples."""
    several = several_labels(task)
    return Counter(
        label for example in examples for label in (example.target if several else [example.target])
    )


def several_labels(task: TaskConfig) -> bool:
    """Whether a record has a list of labels or tags."""
    return task.multi_label or task.kind == "token_classification"


def one_label(task: TaskConfig) -> bool:
    """Whether a record has one label, so that labels may take turns in a draw."""
    return task.has_labels and not several_labels(task)


def lacking_labels(task: TaskConfig, examples: Sequence[Example]) -> list[str]:
    """Labels of the task that no example has, as of a few that were drawn at random."""
    if not task.has_labels:
        return []
    counts = labels_in(task, examples)
    return [label for label in task.labels if not counts[label]]


def checked_labels(task: TaskConfig, splits: Mapping[str, Sequence[Example]]) -> TaskConfig:
    """The task with its labels filled in; `ConfigError` for an empty split or labels that do not fit."""
    problems = [
        f"the {name} split of {task.name} is empty; {_remedy(task, name)}"
        for name in SPLITS
        if not splits[name]
    ]
    if task.has_labels and not problems:
        counts = {name: labels_in(task, splits[name]) for name in SPLITS}
        labels = task.labels or tuple(sorted(counts["train"]))
        task = replace(task, labels=labels)
        if not labels:
            problems.append(f"no record of train has a label (columns.label={task.columns.label}); add some")
        problems += list(_label_problems(task, counts))
    if problems:
        raise ConfigError(problems)
    return task


def _remedy(task: TaskConfig, name: str) -> str:
    if getattr(task.data, name):
        return (
            f"all records of data.{name} were left out as contradictions or near-duplicates of another split"
        )
    return "raise its fraction under split, or give more records"


def _label_problems(task: TaskConfig, counts: Mapping[str, Counter[str]]) -> Iterator[str]:
    for name in SPLITS:
        for label in sorted(set(counts[name]) - set(task.labels)):
            where = f"{counts[name][label]:,} records of {name} have the label {label!r}"
            yield f"{where}, which is not among {list(task.labels)}; correct labels or the records"
    if len(task.labels) == 1 and not task.multi_label:
        yield f"all records have the label {task.labels[0]!r}: nothing is to be told apart; add records of another"
    for label in task.labels:
        if not counts["train"][label]:
            yield f"no record of train has the label {label!r}; remove it from labels, or add records"
        elif not counts["validation"][label] and not several_labels(task):
            remedy = _validation_remedy(task)
            yield f"no record of validation has the label {label!r}, so nothing could choose by it; {remedy}"


def unvalidated_labels(task: TaskConfig, splits: Mapping[str, Sequence[Example]]) -> list[str]:
    """Labels that no record of validation has. Of tasks with one label a record that is refused before; of the others
    it is not, for a rare label or tag, never alone in its record, need not fall into each split."""
    return lacking_labels(task, splits["validation"])


def warn_of_alike(task: TaskConfig, given: Mapping[str, Sequence[Example]]) -> None:
    """Name labels that only blanks around them, width, composition or case tell apart: each is a class of its own."""
    if not task.has_labels:
        return
    counts = sum((labels_in(task, examples) for examples in given.values()), Counter[str]())
    for group in alike(counts, tags=task.kind == "token_classification"):
        look_alike = len({unicodedata.normalize("NFC", label) for label in group}) < len(group)
        written = ascii if look_alike else repr
        named = ", ".join(f"{written(label)} ({number:,})" for label, number in sorted(group.items()))
        logger.warning(
            "%s: the labels %s are as many classes, and differ in case, blanks, width or composition alone; if they "
            "are one, write them alike in the records",
            task.name,
            named,
        )


def alike(counts: Mapping[str, int], tags: bool = False) -> list[Counter[str]]:
    """Labels that are equal when stripped and folded (NFKC, case), with their counts. Of tags (B-PER) the parts before
    and behind the first hyphen are compared, each with its like: B-PER and I-per are of two kinds of entity."""
    groups: dict[tuple[bool, str], Counter[str]] = defaultdict(Counter)
    for label, number in counts.items():
        prefix, hyphen, entity = label.partition("-") if tags else ("", "", label)
        parts = ((True, prefix), (False, entity)) if hyphen else ((False, label),)
        for is_prefix, part in parts:
            folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", part).casefold()).strip()
            groups[is_prefix, folded][part] += number
    return [group for group in groups.values() if len(group) > 1]


def warn_of_unvalidated(task: TaskConfig, labels: Sequence[str]) -> None:
    if labels:
        logger.warning(
            "%s: no record of validation has the labels %s, %d of %d, so nothing can choose by them; %s",
            task.name,
            ", ".join(map(repr, labels)),
            len(labels),
            len(task.labels),
            _validation_remedy(task),
        )


def _validation_remedy(task: TaskConfig) -> str:
    if task.data.validation:
        return "add such records to data.validation"
    return "raise split.validation, or change split.seed"
