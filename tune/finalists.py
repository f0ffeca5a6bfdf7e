"""Which points of a sweep are repeated with other seeds, and which of them wins: by mean and interval."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainers.task_metrics import seeds_interval
from tune.search_space import Point
from tune.trial_records import TrialRecord


@dataclass(frozen=True)
class Finalist:
    """A point and its validation scores over seeds."""

    point: Point
    scores: tuple[float, ...]
    mean: float
    low: float
    high: float


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
