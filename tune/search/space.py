"""What a sweep may vary: keys of the configuration of fine-tuning or pretraining, each with where its values come from.

optimizer.learning_rate: {loguniform: [1e-5, 3e-3]}
adapt.train: {choice: [full, lora]}
adapt.lora_rank: {choice: [4, 16], if: {adapt.train: lora}}     # only where that holds
batch.rows_per_step: {int: [8, 64]}                             # both ends included
adapt.dropout: {uniform: [0.0, 0.3]}
"""

import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import optuna

from cluster.configuration.config import from_dict, to_dict
from cluster.configuration.keys import keys_of, members, nearest
from cluster.console.errors import ConfigError
from trainers.finetuning.config import FinetuneConfig
from trainers.pretraining.config import PretrainConfig

KINDS = ("choice", "uniform", "loguniform", "int")
GRID_VALUES = 3
"""Values that a grid takes of a range: its ends and the middle."""

_WHERE = "says where a trial runs, not what it learns"
FIXED = {
    "run": _WHERE,
    "cluster": _WHERE,
    "checkpoint": _WHERE,
    "heartbeat": _WHERE,
    "validation": "says how trials are scored: they could not be compared",
}
"""Sections that no space varies, and why."""
PRETRAINING = ("optimizer.", "schedule.", "batch.rows_per_step", "order.weights.")
"""What a space over pretraining varies: tokens, model and objective stay, so that losses are comparable."""

Point = dict[str, Any]
"""A value for each key that is varied; keys whose condition does not hold are absent."""


@dataclass(frozen=True)
class Dimension:
    """One key, and its values."""

    key: str
    kind: str
    values: tuple[Any, ...]
    """All choices, or the two ends of a range."""
    condition: Mapping[str, Any]
    """Values that other keys must have."""

    def applies(self, point: Point) -> bool:
        return all(point.get(key) == value for key, value in self.condition.items())

    def can_be(self, value: Any) -> bool:
        """Whether a point may have this value here."""
        if self.kind == "choice":
            return value in self.values
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.values[0] <= value <= self.values[1]

    @property
    def distribution(self) -> optuna.distributions.BaseDistribution:
        """The same for Optuna."""
        if self.kind == "choice":
            return optuna.distributions.CategoricalDistribution(self.values)
        if self.kind == "int":
            return optuna.distributions.IntDistribution(*self.values)
        low, high = self.values
        return optuna.distributions.FloatDistribution(low, high, log=self.kind == "loguniform")

    def grid(self) -> Sequence[Any]:
        """All choices, each once; of a range GRID_VALUES evenly spaced ones."""
        if self.kind == "choice":
            return list({repr(value): value for value in self.values}.values())
        low, high = self.values
        shares = [number / (GRID_VALUES - 1) for number in range(GRID_VALUES)]
        if self.kind == "loguniform":
            # The ends as they are: an end that rounding moved out of the range is none of Optuna's values.
            middles = [math.exp(math.log(low) + s * (math.log(high) - math.log(low))) for s in shares[1:-1]]
            return [low, *middles, high]
        values = [low + share * (high - low) for share in shares]
        return sorted({round(value) for value in values}) if self.kind == "int" else values


@dataclass(frozen=True)
class SearchSpace:
    """Dimensions; a condition names only keys that stand before it."""

    dimensions: tuple[Dimension, ...]

    def point(self, suggest: Callable[[Dimension], Any]) -> Point:
        """Fill the keys in turn; those whose condition does not hold stay out."""
        point: Point = {}
        for dimension in self.dimensions:
            if dimension.applies(point):
                point[dimension.key] = suggest(dimension)
        return point

    def grid(self) -> list[Point]:
        """Every combination once."""
        points: list[Point] = [{}]
        for dimension in self.dimensions:
            points = [longer for point in points for longer in _with_each(point, dimension)]
        return points

    def num_points(self) -> int:
        """Of the grid, without making it: ranges multiply, so that fifteen of them are 14 million points."""
        deciding = {key for dimension in self.dimensions for key in dimension.condition}
        kinds: list[tuple[Point, int]] = [({}, 1)]  # what conditions ask for, and how many points have it
        for dimension in self.dimensions:
            if dimension.key in deciding:
                kinds = [(longer, n) for point, n in kinds for longer in _with_each(point, dimension)]
            else:
                kinds = [
                    (point, n * (len(dimension.grid()) if dimension.applies(point) else 1))
                    for point, n in kinds
                ]
        return sum(n for _, n in kinds)

    def corners(self) -> Iterator[tuple[Dimension, Any, Point]]:
        """A point of the space for each choice and each end of a range. Keys that its condition does not ask for have
        their first choice, or the upper end: at the lower one all weights may be zero."""
        by_key = {dimension.key: dimension for dimension in self.dimensions}
        usual = {d.key: d.values[0] if d.kind == "choice" else d.values[-1] for d in self.dimensions}
        for dimension in self.dimensions:
            wanted: Point = {}
            asked = list(dimension.condition.items())
            while asked:
                key, value = asked.pop()
                wanted[key] = value
                asked += by_key[key].condition.items()
            for value in dimension.values:
                fixed = usual | wanted | {dimension.key: value}
                yield dimension, value, self.point(lambda d, fixed=fixed: fixed[d.key])  # type: ignore[misc]


def _with_each(point: Point, dimension: Dimension) -> list[Point]:
    """The point with each value of the grid; as it is where the dimension does not apply."""
    if not dimension.applies(point):
        return [point]
    return [point | {dimension.key: value} for value in dimension.grid()]


def parse_space(space: Mapping[str, Any], base: FinetuneConfig | PretrainConfig) -> SearchSpace:
    """Read and check the YAML form against the configuration that it varies.

    Raises:
        ConfigError: one line for each mistake.
    """
    problems: list[str] = []
    if not space:
        problems.append("space is empty: name at least one key to vary, as optimizer.learning_rate")
    dimensions: list[Dimension] = []
    for key, described in space.items():
        found = list(_problems(type(base), key, described, {d.key: d for d in dimensions}))
        problems += found
        if not found:
            kind = next(kind for kind in KINDS if kind in described)
            dimensions.append(Dimension(key, kind, tuple(described[kind]), described.get("if") or {}))
    parsed = SearchSpace(tuple(dimensions))
    for _, _, point in parsed.corners():
        try:
            with_point(base, point)
        except ConfigError as error:
            problems += [f"space: {line}" for line in error.problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return parsed


def _problems(base: type, key: str, described: Any, before: Mapping[str, Dimension]) -> Iterator[str]:
    known = list(keys_of(base))
    if path_of(base, key) is None:
        yield f"space.{key} is not a key of the configuration; nearest: {nearest(key, known) or 'see --help'}"
    elif base is PretrainConfig and not key.startswith(PRETRAINING):
        yield f"space.{key} cannot be varied in pretraining; what can: {', '.join(PRETRAINING)}"
    elif reason := FIXED.get(key.partition(".")[0]):
        yield f"space.{key} cannot be varied: {key.partition('.')[0]}.* {reason}"
    kinds = [name for name in described if name != "if"] if isinstance(described, dict) else []
    if len(kinds) != 1 or kinds[0] not in KINDS:
        yield f"space.{key}={described!r} must be one of {', '.join(f'{{{kind}: […]}}' for kind in KINDS)}"
        return
    kind, values = kinds[0], described[kinds[0]]
    if not isinstance(values, list) or not values:
        yield f"space.{key}.{kind}={values!r} must be a list"
    elif kind != "choice":
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(values) != 2 or len(numbers) != 2 or not values[0] < values[1]:
            yield f"space.{key}.{kind}={values!r} must be the two ends of a range, the lower first"
        elif kind == "loguniform" and values[0] <= 0:
            yield f"space.{key}.loguniform={values!r} must be above 0"
        elif kind == "int" and not all(isinstance(v, int) for v in values):
            yield f"space.{key}.int={values!r} must be whole numbers"
        elif kind != "int" and not takes_fractions(base, key):
            yield f"space.{key}.{kind}={values!r}: {key} takes no fractions; write {{int: …}} or {{choice: …}}"
    yield from _condition_problems(key, described.get("if") or {}, before)


def _condition_problems(key: str, condition: Any, before: Mapping[str, Dimension]) -> Iterator[str]:
    if not isinstance(condition, dict):
        yield f"space.{key}.if={condition!r} must be a mapping of other keys to their values"
        return
    for other, value in condition.items():
        if other not in before:
            yield f"space.{key}.if names {other}, which does not stand before it in space"
        elif not before[other].can_be(value):
            found = list(before[other].values)
            yield f"space.{key}.if: {other} is never {value!r}; it is one of {found}, of a range its ends"


def path_of(base: type, key: str) -> list[str] | None:
    """The sections and names that lead to a key, also into a mapping, as order.weights.SOURCE; None if it is none."""
    known = keys_of(base)
    if key in known:
        return key.split(".")
    for name, declared in known.items():
        if key.startswith(f"{name}.") and typing.get_origin(declared.hint) is dict:
            return [*name.split("."), key.removeprefix(f"{name}.")]
    return None


def takes_fractions(base: type, key: str) -> bool:
    """Whether a key's value may be any number of a range; true of what is no key, and of a mapping's entries."""
    declared = keys_of(base).get(key)
    return declared is None or float in members(declared.hint)


Config = TypeVar("Config", bound=FinetuneConfig | PretrainConfig)


def with_point(base: Config, point: Point) -> Config:
    """The configuration with a point's values. Raises `ConfigError` where they do not fit."""
    merged = to_dict(base)
    for key, value in point.items():
        path = path_of(type(base), key)
        assert path is not None, key
        section = merged
        for part in path[:-1]:
            section = section[part]
        section[path[-1]] = value
    return from_dict(type(base), merged)
