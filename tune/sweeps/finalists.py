"""Which points of a sweep are repeated with other seeds, and which of them wins: by mean and interval."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.configuration.stored_file import read_json
from cluster.storage.uris import Store
from trainers.tasks.metrics import seeds_interval
from tune.search.config import SweepRunConfig
from tune.search.space import Point
from tune.sweeps.folder import PUT_BACK
from tune.trials.records import TrialRecord, read_trials

SEARCHED = "searched.json"
"""Under which keys of `sweep` its search has come to an end: TPE may give up below `sweep.trials`, and would find other
points at a later start."""


@dataclass(frozen=True)
class Finalist:
    """A point and its validation scores over seeds."""

    point: Point
    scores: tuple[float, ...]
    mean: float
    low: float | None
    """None where its seeds say nothing of the spread."""
    high: float | None


def best_points(trials: Sequence[TrialRecord], seed: int, number: int) -> list[Point]:
    """The best points of the search. One that was stopped early is none: its score is not of a whole run."""
    ranked = sorted(
        (r for r in trials if r.seed == seed and r.status == "finished" and r.score is not None),
        key=lambda r: -(r.score or 0.0),
    )
    return [r.point for r in ranked[:number]]


def rank(points: Sequence[Point], seeds: Sequence[int], trials: Sequence[TrialRecord]) -> list[Finalist]:
    """Points by their mean over seeds, the best first. One that failed with a seed comes after all that did not: the
    mean of fewer seeds is a luckier one."""
    found = []
    for point in points:
        scores = tuple(
            r.score for r in trials
            if r.point == point and r.seed in seeds and r.status == "finished" and r.score is not None
        )  # fmt: skip
        found.append(Finalist(point, scores, *seeds_interval(scores)))
    return sorted(found, key=lambda finalist: (-len(finalist.scores), -finalist.mean))


def record_searched(store: Store, sweep: SweepRunConfig) -> None:
    """Write down that the search has ended and its best points have been repeated."""
    store.put(SEARCHED, json.dumps(sweep.choosing(), indent=2, allow_nan=False).encode())


def finalists_before(
    store: Store, sweep: SweepRunConfig, first_seed: int, *, judged: bool = False
) -> list[Finalist] | None:
    """What a search that has ended came to, the winner first; None where there is still to search.

    Args:
        judged: The test split has judged the winner, which a version did that did not write the end of a search down.
    """
    if not judged:
        if not store.exists(SEARCHED):
            return None
        if read_json(store, SEARCHED, dict[str, Any], PUT_BACK) != sweep.choosing():
            return None
    trials = read_trials(store)
    seeds = [first_seed + number for number in range(sweep.seeds)]
    return rank(best_points(trials, first_seed, sweep.best), seeds, trials) or None
