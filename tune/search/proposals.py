"""Which points a sweep tries: drawn at random, from a grid, or by Optuna's TPE from what is known so far.

All three are remade from the records of finished trials, so that a sweep whose driver died goes on as it was.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import optuna
from optuna.trial import TrialState, create_trial

from tune.search.space import Dimension, Point, SearchSpace

Search = Literal["random", "grid", "tpe"]
SEEDS = 2**32
"""Number of seeds that Optuna's generator (numpy's RandomState) accepts: 0 to 2**32 - 1. A larger one is reduced."""
REPEATS = 100
"""Draws in a row that propose nothing new, after which a space of choices is taken for exhausted."""


class Proposals:
    """Up to `number` points, each another one; `learn` tells what a point came to."""

    def __init__(
        self,
        space: SearchSpace,
        search: Search,
        number: int,
        seed: int,
        known: Sequence[tuple[Point, float | None]],
    ) -> None:
        """`known`: points of an earlier start with their scores (None: failed); they count towards `number`."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        sampler = (
            optuna.samplers.TPESampler(
                seed=(seed + len(known)) % SEEDS, multivariate=True, group=True, constant_liar=True
            )
            if search == "tpe"
            else optuna.samplers.RandomSampler(seed=seed % SEEDS)
        )
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._grid = space.grid() if search == "grid" else None
        self._asked: dict[str, optuna.trial.Trial | None] = {}
        self._earlier: set[str] = set()
        self._left = number
        for point, score in known:
            self.adopt(point)
            self.learn(point, score)

    def propose(self) -> Point | None:
        """The next point; None when there is none left."""
        if self._left <= 0:
            return None
        if self._grid is not None:
            point = next((point for point in self._grid if key_of(point) not in self._asked), None)
            if point is not None:
                self._asked[key_of(point)] = None
                self._left -= 1
            return point
        repeats = 0
        while repeats < REPEATS:
            trial = self._study.ask()
            point = self._space.point(partial(suggest, trial))
            if key_of(point) not in self._asked:
                self._asked[key_of(point)] = trial
                self._left -= 1
                return point
            self._study.tell(trial, state=TrialState.FAIL)
            # The generator of random points starts anew, and first draws those of the earlier start.
            repeats += key_of(point) not in self._earlier
            self._earlier.discard(key_of(point))
        self._left = 0
        return None

    @property
    def left(self) -> int:
        """How many are still to be proposed, at most."""
        if self._grid is None:
            return max(0, self._left)
        return min(max(0, self._left), sum(key_of(point) not in self._asked for point in self._grid))

    def adopt(self, point: Point) -> Point:
        """Count a point that was begun by an earlier start as proposed now."""
        self._left -= 1
        self._asked[key_of(point)] = None
        self._earlier.add(key_of(point))
        return point

    def learn(self, point: Point, score: float | None) -> None:
        """Take in the score of a point; None, or what is no finite number, if it failed."""
        score = score if score is not None and math.isfinite(score) else None
        trial = self._asked[key_of(point)]
        if trial is None:
            self._study.add_trial(as_trial(self._space, point, score))
        else:
            state = TrialState.FAIL if score is None else TrialState.COMPLETE
            self._study.tell(trial, score, state=state)


def suggest(trial: optuna.trial.Trial, dimension: Dimension) -> Any:
    """Optuna's value for a key."""
    if dimension.kind == "choice":
        return trial.suggest_categorical(dimension.key, dimension.values)
    low, high = dimension.values
    if dimension.kind == "int":
        return trial.suggest_int(dimension.key, low, high)
    return trial.suggest_float(dimension.key, low, high, log=dimension.kind == "loguniform")


def as_trial(space: SearchSpace, point: Point, score: float | None) -> optuna.trial.FrozenTrial:
    """What Optuna knows of a point that was tried."""
    distributions = {d.key: d.distribution for d in space.dimensions if d.key in point}
    state = TrialState.FAIL if score is None else TrialState.COMPLETE
    return create_trial(params=dict(point), distributions=distributions, value=score, state=state)


def key_of(point: Point) -> str:
    """The same for equal points."""
    return repr(sorted(point.items()))
