"""Points of a curve of accuracy over label budgets, and the labels that one arm saves against another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CurvePoint:
    """One arm at one budget."""

    arm: str
    budget: int
    """Training records, 0 written out."""
    values: tuple[float, ...]
    """The task's metric on test, for each seed."""
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Saving:
    """What another arm reaches with `budget` labels, and the labels with which the pretrained model does."""

    budget: int
    metric: float
    labels: float | None
    """None: with all labels the pretrained model is still below it."""
    at_most: bool
    """The smallest budget that was measured is enough already."""

    def told(self) -> str:
        """In words."""
        if self.labels is None:
            return f"{self.metric:.3f}: not reached"
        factor, bound = self.budget / self.labels, ("at most ", "at least ") if self.at_most else ("", "")
        return f"{self.metric:.3f}: {bound[0]}{self.labels:,.0f} labels, a factor of {bound[1]}{factor:.1f}"


def savings(points: Sequence[CurvePoint], arm: str) -> list[Saving]:
    """For each budget of `arm` where the pretrained curve reaches its metric, on straight lines over the logarithm of
    the labels."""
    ours = sorted((p for p in points if p.arm == "pretrained"), key=lambda p: p.budget)
    theirs = sorted((p for p in points if p.arm == arm), key=lambda p: p.budget)
    return [saving(ours, point) for point in theirs]


def saving(ours: Sequence[CurvePoint], theirs: CurvePoint) -> Saving:
    """`ours` by rising budget."""
    reached = next((number for number, point in enumerate(ours) if point.mean >= theirs.mean), None)
    if reached is None:
        return Saving(theirs.budget, theirs.mean, None, False)
    after = ours[reached]
    if reached == 0:
        return Saving(theirs.budget, theirs.mean, float(after.budget), True)
    before = ours[reached - 1]
    share = (theirs.mean - before.mean) / (after.mean - before.mean)
    labels = math.exp(math.log(before.budget) + share * (math.log(after.budget) - math.log(before.budget)))
    return Saving(theirs.budget, theirs.mean, labels, False)
