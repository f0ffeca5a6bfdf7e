"""Learning rate as a pure function of the step: a resumed run needs no schedule state."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Shape of the learning rate over a run, as a share of each parameter group's peak."""

    kind: Literal["cosine", "linear", "warmup_stable_decay", "constant"] = "cosine"
    """What follows the warm-up: half a cosine (Loshchilov & Hutter 2017), a straight line, a plateau and then
    a straight line (Hu et al. 2024, section 4), or a plateau alone."""
    warmup_steps: int = 100
    """Steps of linear warm-up; the first step already trains, at 1 / warmup_steps of the peak. 0: none."""
    decay_fraction: float = 0.2
    """Share of all steps that the decay of warmup_stable_decay takes, at the end of the run."""
    final_fraction: float = 0.1
    """Rate of the last step, as a share of the peak; `constant` does not use it."""

    def problems(self, at: str) -> Iterator[str]:
        """Yield a line for each value that no run can have."""
        if self.warmup_steps < 0:
            yield f"{at}.warmup_steps={self.warmup_steps} must be 0 or more"
        if not 0 < self.decay_fraction <= 1:
            yield f"{at}.decay_fraction={self.decay_fraction} must be above 0 and at most 1"
        if not 0 <= self.final_fraction <= 1:
            yield f"{at}.final_fraction={self.final_fraction} must be from 0 to 1"


def rate_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Return the share of the peak rate, in [0, 1], for the update that follows `step` finished steps.

    The peak is reached by update `warmup_steps - 1`, the final share by update `total_steps - 1`; later ones
    keep it.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    begin = config.warmup_steps
    if config.kind == "warmup_stable_decay":
        begin = max(begin, total_steps - round(config.decay_fraction * total_steps))
    # Steps of the decay are numbered 1..num_decay, so that the plateau's last step still has the peak.
    num_decay = max(1, total_steps - begin)
    progress = min(1.0, max(0, step - begin + 1) / num_decay)
    descent = (1 - math.cos(math.pi * progress)) / 2 if config.kind == "cosine" else progress
    return 1.0 - (1.0 - config.final_fraction) * descent
