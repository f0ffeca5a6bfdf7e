"""What a sweep is judged by: scores are turned so that more is better, people are shown the metric itself."""

from dataclasses import dataclass
from typing import Protocol


class Measured(Protocol):
    """What is searched for, and the metric that scores it: a task, or a `Measure`."""

    @property
    def name(self) -> str: ...

    @property
    def judged_by(self) -> str: ...

    def oriented(self, value: float) -> float:
        """A score, of which more is better, as the metric; and the other way round."""


@dataclass(frozen=True)
class Measure:
    """A metric of which less is better."""

    name: str
    judged_by: str

    def oriented(self, value: float) -> float:
        return -value
