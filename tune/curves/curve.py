"""Points of a curve of accuracy over label budgets, and the labels that one arm saves against another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class CurvePoint:
    """One arm at one budget."""

    arm: str
    budget: int
    """Training records, 0 written out."""
    values: tuple[float, ...]
    """The task's metric on test, for each seed."""
    mean: float
    low: float | None
    high: float | None
    validated: int = 0
    """Records that choose, whose labels are known too."""
    lacking: tuple[int, ...] = ()
    """Labels of the task that no training record has, for each seed."""


@dataclass(frozen=True)
class Saving:
    """What another arm reaches with `budget` labels, and the labels with which the pretrained model does."""

    budget: int
    metric: float
    labels: float | None
    """None: with all labels the pretrained model is still below it."""
    at_most: bool
    """The smallest budget that was measured is enough already."""
    interval: tuple[float, float | None] | None = None
    """95 % interval of the labels: 0, where the smallest budget is in it, None, where all labels are. No interval where
    the seeds say nothing of the spread."""

    def told(self) -> str:
        """In words."""
        if self.labels is None:
            return f"{self.metric:.3f}: not reached"
        factor, bound = self.budget / self.labels, ("at most ", "at least ") if self.at_most else ("", "")
        told = f"{self.metric:.3f}: {bound[0]}{self.labels:,.0f} labels, a factor of {bound[1]}{factor:.1f}"
        return told if self.interval is None else f"{told} ({self.factors_told(*self.interval)})"

    def factors_told(self, fewest: float, most: float | None) -> str:
        """The interval of the factor; an end that lies beyond the budgets is unknown."""
        return " to ".join(f"{self.budget / end:.1f}" if end else "?" for end in (most, fewest))


def savings(points: Sequence[CurvePoint], arm: str) -> list[Saving]:
    """For each budget of `arm` where the pretrained curve reaches its metric, on straight lines over the logarithm of
    the labels."""
    ours = sorted((p for p in points if p.arm == "pretrained"), key=lambda p: p.budget)
    theirs = sorted((p for p in points if p.arm == arm), key=lambda p: p.budget)
    return [saving(ours, point) for point in theirs]


def saving(ours: Sequence[CurvePoint], theirs: CurvePoint) -> Saving:
    """`ours` by rising budget.

    The labels' interval is where that of the difference holds 0, as Fieller (1954) has it of a quotient: the lines
    through the ends of the differences' Welch intervals reach 0 at its ends.
    """
    budgets = [point.budget for point in ours]
    differences = [point.mean - theirs.mean for point in ours]
    labels = first_reached(budgets, differences)
    found = Saving(theirs.budget, theirs.mean, labels, labels == budgets[0])
    halves = [half_width(point.values, theirs.values) for point in ours]
    if any(half is None for half in halves):
        return found
    upper, lower = (
        [difference + sign * (half or 0.0) for difference, half in zip(differences, halves, strict=True)]
        for sign in (1, -1)
    )
    fewest, most = (first_reached(budgets, each) for each in (upper, lower))
    if fewest is None:
        return found  # surely below with all labels
    return replace(found, interval=(0.0 if fewest == budgets[0] else fewest, most))


def first_reached(budgets: Sequence[int], differences: Sequence[float]) -> float | None:
    """Where the straight lines through the differences, over the logarithm of the budgets, first reach 0."""
    reached = next((number for number, difference in enumerate(differences) if difference >= 0), None)
    if not reached:
        return None if reached is None else float(budgets[0])
    before, after = differences[reached - 1 : reached + 1]
    return math.exp(float(np.interp(0, (before, after), np.log(budgets[reached - 1 : reached + 1]))))


def half_width(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Of the 95 % interval of a difference of means, by Welch's t; None where the values say nothing of the spread."""
    if min(len(ours), len(theirs)) < 2 or len(set(ours)) + len(set(theirs)) < 3:
        return None
    from scipy import stats

    variances = [float(np.var(each, ddof=1)) / len(each) for each in (ours, theirs)]
    freedom = sum(variances) ** 2 / sum(
        variance**2 / (len(each) - 1) for variance, each in zip(variances, (ours, theirs), strict=True)
    )
    return float(stats.t.ppf(0.975, freedom) * math.sqrt(sum(variances)))
