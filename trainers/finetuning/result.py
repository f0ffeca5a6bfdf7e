"""What a fine-tuning command came to."""

from dataclasses import dataclass
from typing import Annotated, Any, NotRequired

import pydantic
from pydantic import Field
from typing_extensions import TypedDict

from cluster.configuration.stored_file import WITH_OTHER_KEYS, DamagedFileError, place_of, read_json
from cluster.storage.uris import Store
from trainers.stored.metric_records import Count
from trainers.stored.run_files import PUT_BACK
from trainers.tasks.task import Draw

RESULT = "result.json"
Metrics = dict[str, float | None]


@pydantic.with_config(WITH_OTHER_KEYS)
class TaskVerdict(TypedDict):
    """`test.json`: what the test split says of the chosen model."""

    step: Count
    metrics: Metrics
    records: Count
    truncated: Count
    interval: NotRequired[Annotated[list[float], Field(min_length=2, max_length=2)]]


@pydantic.with_config(WITH_OTHER_KEYS)
class SeedResult(TypedDict):
    """`result.json`: what one seed came to."""

    seed: int
    best_step: Count
    steps: Count
    validation: Metrics
    train_records: Count
    validation_records: Count
    test: NotRequired[TaskVerdict]
    draw: NotRequired[Draw]
    """Of an older run: labels in turn."""
    lacking_labels: NotRequired[list[str]]
    """That no training record has."""


def read_result(run: Store, metric: str) -> dict[str, Any]:
    """What a finished run came to. Raises `DamagedFileError`, also where it has no such metric."""
    result = read_json(run, RESULT, SeedResult, PUT_BACK, not_finite=True)
    measured = [result["validation"], *([result["test"]["metrics"]] if "test" in result else [])]
    if any(each.get(metric) is None for each in measured):
        raise DamagedFileError(place_of(run, RESULT), f"it has no {metric}", PUT_BACK)
    return result


@dataclass(frozen=True)
class FinetuneResult:
    """What all seeds came to."""

    metric: str
    seeds: list[dict[str, Any]]
    """`result.json` of each seed."""

    def values(self, split: str) -> list[float]:
        """The metric of each seed on validation, or on test where that was read."""
        return [
            (seed[split]["metrics"] if split == "test" else seed[split])[self.metric]
            for seed in self.seeds
            if split in seed
        ]
