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


def saved(points: Sequence[CurvePoint], arm: str) -> dict[str, float] | None:
    """Where the pretrained curve reaches what `arm` does with most labels: that metric, the labels that it takes (on
    a straight line over the logarithm of the labels) and the factor saved. None where it never does."""
    theirs = max((p for p in points if p.arm == arm), key=lambda p: p.budget)
    ours = sorted((p for p in points if p.arm == "pretrained"), key=lambda p: p.budget)
    for before, after in zip([None, *ours[:-1]], ours, strict=True):
        if after.mean >= theirs.mean:
            needed = float(after.budget)
            if before is not None:
                share = (theirs.mean - before.mean) / (after.mean - before.mean)
                needed = math.exp(
                    math.log(before.budget) + share * (math.log(after.budget) - math.log(before.budget))
                )
            return {"metric": theirs.mean, "labels": needed, "factor": theirs.budget / needed}
    return None


def told(factor: dict[str, float] | None) -> str:
    """A factor in words."""
    if factor is None:
        return "none; with all labels the pretrained model is still below it"
    labels = f"{factor['labels']:,.0f} labels"
    return f"a factor of {factor['factor']:.1f} ({factor['metric']:.4f} is reached with about {labels})"
