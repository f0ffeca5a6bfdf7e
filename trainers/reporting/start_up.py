"""Start-up that happens inside of steps: compilation, and what an attempt's first step takes beyond a usual one.

The second is how Google's ml-goodput tells start-up from training: a first step also allocates, loads kernels and
connects the workers. Records of older runs have no `compile_seconds`; of them that rule alone is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from trainers.reporting.metrics import Record

USUAL_STEPS = 50
"""Steps after an attempt's first one whose median is a usual step."""


def compiled_in(step: Record) -> float:
    """Seconds of a step that went into compiling; not those in which another worker waited for data or storage."""
    return max(0.0, min(step.get("compile_seconds", 0.0), _not_waited(step)))


def computed_in(step: Record) -> float:
    """Seconds of a step without compiling, waits and stalls."""
    return _not_waited(step) - compiled_in(step)


def _not_waited(step: Record) -> float:
    seconds: float = step["step_seconds"] - step["data_wait_seconds"] - step["checkpoint_stall_seconds"]
    return seconds


@dataclass
class FirstStep:
    """An attempt's first step, and those after it that tell what a usual one takes: seconds as `computed_in`."""

    number: int
    seconds: float
    following: list[float] = field(default_factory=list)

    def follow(self, seconds: float) -> None:
        if len(self.following) < USUAL_STEPS:
            self.following.append(seconds)

    def excess(self, others: Sequence[float] = ()) -> float:
        """Seconds beyond a usual step of this attempt or, where it did no second one, of the `others`."""
        usual = self.following or others
        return max(0.0, self.seconds - median(usual)) if usual else 0.0
