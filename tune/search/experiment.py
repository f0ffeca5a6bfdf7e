"""What a sweep searches over, as the trials see it: something that is trained at a point and comes to a score."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.storage.uris import Store
from tune.search.space import Point

DRIVER = {"cpu": 0.0, "gpu": 0.0, "memory": 1 << 20}
"""Resources of a trial whose own process only drives Ray Train's workers: Tune refuses to reserve nothing at all."""

Report = Callable[[float, float, Mapping[str, float]], None]
"""Called with each validation: the share of the steps that are done, the score, and all that was measured."""


@dataclass(frozen=True)
class Score:
    """What a trial came to."""

    score: float
    """On the validation split; more is better."""
    metrics: Mapping[str, float]


class Experiment(Protocol):
    """Travels to the trials' processes, so it holds configurations and places, no data."""

    @property
    def resources(self) -> Mapping[str, float]:
        """`cpu` and `gpu` of a trial's own process; Ray Train's workers, where it has some, have their own."""

    def changed(self) -> str | None:
        """What the trials start from that is no longer what the first of them started from, in one line; asked where a
        trial has failed, for that is no fault of its point."""

    def train(self, folder: Store, point: Point, seed: int, report: Report) -> Score:
        """Train from where the trial's folder is, reading no test record. Any error is the point's own fault, but
        for those of `tune.trials.trials.PASSING`, also if Ray Train wraps them."""
