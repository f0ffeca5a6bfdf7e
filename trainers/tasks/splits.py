"""The records of a task, split once and for all into one file per split.

What trains reads `train.jsonl` and `validation.jsonl`; `test.jsonl` is opened by the final judgement alone (law
L6), so that not even its rows are loaded before. The folder is named by all that it was made from.
"""

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NotRequired

import numpy as np
import pydantic
from typing_extensions import TypedDict

from cluster.configuration.config import to_dict
from cluster.configuration.stored_file import WITH_OTHER_KEYS, checksum_of, read_json
from cluster.console.errors import ConfigError
from cluster.storage.uris import Store, lies_in
from data.curation.near_duplicates import VERSION, group_near_duplicates
from data.reading.clean import content_hash
from data.reading.splits import KEEPING_ORDER, keyed_points
from trainers.stored.metric_records import Count
from trainers.tasks.labels import (
    checked_labels,
    one_label,
    unvalidated_labels,
    warn_of_alike,
    warn_of_unvalidated,
)
from trainers.tasks.records import Example, read_examples, to_lines
from trainers.tasks.stored_records import read_split
from trainers.tasks.task import SPLITS, Draw, TaskConfig

logger = logging.getLogger(__name__)

RECORD = "task.json"
CONTRADICTIONS = "contradictions.jsonl"


REMADE = "delete the folder that it lies in, and run the same command again: the split is made anew"


class SplitCounts(TypedDict):
    train: Count
    validation: Count
    test: Count


@pydantic.with_config(WITH_OTHER_KEYS)
class SplitRecord(TypedDict):
    """`task.json`."""

    labels: list[str]
    counts: SplitCounts
    left_out: dict[str, Count]
    unvalidated: NotRequired[list[str]]
    checksums: NotRequired[dict[str, str]]
    """Of the splits' files; an older record has none."""
    near_duplicates: NotRequired[Count]
    """`data.curation.near_duplicates.VERSION` that the records were split by; an older record has none."""


@dataclass(frozen=True)
class PreparedTask:
    """A task whose splits are made; its labels are filled in."""

    task: TaskConfig
    store: Store
    digest: str
    """Of the records and of how they were split."""
    counts: Mapping[str, int]
    """Records of each split."""
    left_out: Mapping[str, int]
    """Records that are in no split, by reason."""
    checksums: Mapping[str, str] = field(default_factory=dict)
    """Of the splits' files."""

    def read(self, split: str) -> list[Example]:
        """The examples of train or validation; the test split is refused, see `read_test`."""
        assert split in ("train", "validation"), split
        return self._examples(split)

    def read_test(self) -> list[Example]:
        """The examples that judge. Call `trainers.evaluation.verdict.claim_test_split` first."""
        return self._examples("test")

    def _examples(self, split: str) -> list[Example]:
        return read_split(
            self.store, f"{split}.jsonl", self.task, REMADE,
            count=self.counts[split], checksum=self.checksums.get(split, ""),
        )  # fmt: skip


def prepare_task(task: TaskConfig, prepared: Store) -> PreparedTask:
    """Read, check and split the records into `prepared`, unless that was done.

    Raises:
        ConfigError: records that are no examples, an empty split, or labels that do not fit.
    """
    for uri in places_of(task).values():
        if lies_in(prepared.uri, uri):
            raise ConfigError(
                [
                    f"run.prepared={prepared.uri} lies in {uri}, the records of {task.name}: its splits would be read "
                    "as records; choose a folder beside it"
                ]
            )
    given = read_given(task)
    warn_of_alike(task, given)
    agreeing, contradicting = without_contradictions(task, given)
    digest, store = place_of_split(task, prepared, given, contradicting)
    if store.exists(RECORD):
        record = read_json(store, RECORD, SplitRecord, REMADE)
        task = replace(task, labels=tuple(record["labels"]))
        warn_of_unvalidated(task, record.get("unvalidated", []))
        checksums = record.get("checksums", {})
        return PreparedTask(task, store, digest, record["counts"], record["left_out"], checksums)
    splits, left_out = (
        keep_apart(task, agreeing) if task.data.train else split_by_content(task, agreeing["uri"])
    )
    task = checked_labels(task, splits)
    unvalidated = unvalidated_labels(task, splits)
    warn_of_unvalidated(task, unvalidated)
    contents = {name: to_lines(splits[name]) for name in SPLITS}
    for name, content in contents.items():
        store.put(f"{name}.jsonl", content)
    store.put(CONTRADICTIONS, to_lines(contradicting))
    counts = {name: len(splits[name]) for name in SPLITS}
    reasons = {"contradiction": len(contradicting)} | {key: len(some) for key, some in left_out.items()}
    record = {"labels": task.labels, "counts": counts, "left_out": reasons, "task": to_dict(task)}
    checksums = {name: checksum_of(content) for name, content in contents.items()}
    record |= {"unvalidated": unvalidated, "checksums": checksums, "near_duplicates": VERSION}
    store.put(RECORD, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False).encode())
    return PreparedTask(task, store, digest, counts, reasons, checksums)


def read_given(task: TaskConfig) -> dict[str, list[Example]]:
    """The examples of each place that the task names."""
    return {key: read_examples(task, uri) for key, uri in places_of(task).items()}


def places_of(task: TaskConfig) -> dict[str, str]:
    """The places that the task names, by key."""
    uris = {key: getattr(task.data, key) for key in ("uri", *SPLITS)}
    return {key: uri for key, uri in uris.items() if uri}


def place_of_split(
    task: TaskConfig,
    prepared: Store,
    given: Mapping[str, Sequence[Example]],
    contradicting: Sequence[Example],
) -> tuple[str, Store]:
    """Digest and folder of the split: of one by an earlier version if there is one, for runs have begun with it."""
    former = digest_of(task, given, contradicting, version=1)
    store = prepared.child(f"{task.name}-{former}")
    if store.exists(RECORD):
        logger.warning(
            "%s: goes on with the split in %s, made when texts that differ in punctuation or width could fall into two "
            "splits; delete that folder to split anew, for new runs",
            task.name,
            store.uri,
        )
        return former, store
    digest = digest_of(task, given, contradicting)
    return digest, prepared.child(f"{task.name}-{digest}")


def digest_of(
    task: TaskConfig,
    given: Mapping[str, Sequence[Example]],
    contradicting: Sequence[Example],
    version: int = VERSION,
) -> str:
    """Name the split: 12 hexadecimal digits of the task, without its prompt and metric, and all records."""
    described = to_dict(task)
    kept = {key: described[key] for key in ("kind", "multi_label", "labels", "split")}
    kept |= {"near_duplicates": version} if version > 1 else {}  # the first stood in no name
    digest = hashlib.blake2b(json.dumps(kept, sort_keys=True, allow_nan=False).encode(), digest_size=6)
    for key, examples in given.items():
        digest.update(key.encode() + to_lines(examples))
    if (
        task.data.train
    ):  # given splits were once searched for contradictions one by one, under this name without them
        digest.update(to_lines(contradicting))
    return digest.hexdigest()


# --- who goes where ---

Left = dict[str, list[Example]]


def question_of(example: Example) -> str:
    """What makes two examples one question: case and blanks aside all of it, for punctuation may decide a label."""
    return " ".join(example.content.lower().split())


def without_contradictions(
    task: TaskConfig, given: Mapping[str, Sequence[Example]]
) -> tuple[dict[str, list[Example]], list[Example]]:
    """The examples whose content has one label, wherever they are given, and the others.

    Several answers to one question, or several people's numbers, may all be right: of those none contradicts another.
    """
    targets: dict[str, set[str]] = defaultdict(set)
    for example in (example for examples in given.values() for example in examples if task.has_labels):
        targets[question_of(example)].add(_written(example.target))
    contrary = {content for content, several in targets.items() if len(several) > 1}
    agreeing: dict[str, list[Example]] = {name: [] for name in given}
    contradicting: list[Example] = []
    for name, examples in given.items():
        for example in examples:
            out = question_of(example) in contrary
            (contradicting if out else agreeing[name]).append(example)
    return agreeing, contradicting


def _written(target: Any) -> str:
    return json.dumps(target, sort_keys=True, allow_nan=False)


def without_repetitions(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """The first example of each content and target, contents together, and the others. Several answers to one question
    stay, and being of one content never fall into two splits."""
    same: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        same[question_of(example)].append(example)
    kept: list[Example] = []
    repeated: list[Example] = []
    for group in same.values():
        first: dict[str, Example] = {}
        for example in group:
            first.setdefault(_written(example.target), example)
        kept += first.values()
        repeated += [example for example in group if all(example is not one for one in first.values())]
    return kept, repeated


def split_by_content(task: TaskConfig, examples: Sequence[Example]) -> tuple[dict[str, list[Example]], Left]:
    """Deal groups of near-duplicates to the splits by the smallest content hash of a group: neither the order
    of the records nor other groups have a say."""
    kept, repeated = without_repetitions(examples)
    groups = group_near_duplicates([example.content for example in kept], task.split.similarity)
    hashes = [content_hash(question_of(example).encode()) for example in kept]
    leader: dict[int, bytes] = {}
    for group, content in zip(groups.tolist(), hashes, strict=True):
        leader[group] = min(content, leader.get(group, content))
    words = np.array([int.from_bytes(leader[group][:8], "little") for group in groups.tolist()], np.uint64)
    points = keyed_points(words, task.split.seed)
    splits: dict[str, list[Example]] = {name: [] for name in SPLITS}
    for example, point in zip(kept, points, strict=True):
        in_test, in_either = point < task.split.test, point < task.split.test + task.split.validation
        splits["test" if in_test else "validation" if in_either else "train"].append(example)
    refuse_one_group(task, splits, groups)
    return splits, {"repeated": repeated}


def refuse_one_group(task: TaskConfig, splits: Mapping[str, Sequence[Example]], groups: np.ndarray) -> None:
    """Raise `ConfigError` where a split is empty because most texts are near-duplicates, as templated ones are."""
    shares = {"validation": task.split.validation, "test": task.split.test, "train": 1.0}
    empty = [name for name in SPLITS if shares[name] and not splits[name]]
    largest = int(np.unique(groups, return_counts=True)[1].max(initial=0))
    if empty and 1 < largest > len(groups) / 2:
        found = f"{largest:,} of {len(groups):,} texts of {task.name} are one group of near-duplicates"
        why = f"which two splits never share, so that {' and '.join(empty)} would be empty"
        remedy = (
            f"raise split.similarity={task.split.similarity:g} (1: equal texts alone), or give more records"
        )
        raise ConfigError([f"{found}, {why}; {remedy}"])


def keep_apart(
    task: TaskConfig, given: Mapping[str, Sequence[Example]]
) -> tuple[dict[str, list[Example]], Left]:
    """Given splits, without the records whose near-duplicate is in a split that matters more (test, then
    validation); splits that are not given are taken from train by content."""
    fractions = replace(
        task.split,
        validation=0.0 if "validation" in given else task.split.validation,
        test=0.0 if "test" in given else task.split.test,
    )
    splits, left_out = split_by_content(replace(task, split=fractions), given["train"])
    for name in ("validation", "test"):
        if name in given:
            splits[name], repeated = without_repetitions(given[name])
            left_out["repeated"] += repeated
    owners = [(name, example) for name in KEEPING_ORDER for example in splits[name]]
    groups = group_near_duplicates([example.content for _, example in owners], task.split.similarity)
    owner_of: dict[int, str] = {}
    apart: dict[str, list[Example]] = {name: [] for name in SPLITS}
    for (name, example), group in zip(owners, groups.tolist(), strict=True):
        if owner_of.setdefault(group, name) == name:
            apart[name].append(example)
        else:
            left_out.setdefault(f"near-duplicate across splits, in {name}", []).append(example)
    return apart, left_out


def choose_budget(
    task: TaskConfig, examples: Sequence[Example], budget: int, seed: int, draw: Draw = "random"
) -> list[Example]:
    """That many examples, a keyed draw: a larger budget of the same seed holds every smaller one. 0 keeps all.

    At random some labels may be lacking. `balanced` lets labels take turns where an example has one, as long as there
    are any.
    """
    if not budget or budget >= len(examples):
        return list(examples)
    words = [int.from_bytes(content_hash(example.content.encode())[:8], "little") for example in examples]
    order = np.argsort(keyed_points(np.array(words, np.uint64), seed + 1), kind="stable").tolist()
    if draw == "balanced" and one_label(task):
        turn: Counter[str] = Counter()
        rank = {}
        for index in order:
            rank[index] = turn[examples[index].target]
            turn[examples[index].target] += 1
        order.sort(key=lambda index: rank[index])
    return [examples[index] for index in order[:budget]]


def target_text(target: Any) -> str:
    """A target as people read it."""
    if isinstance(target, dict):
        return target["text"]
    return ", ".join(map(str, target)) if isinstance(target, list) else str(target)
