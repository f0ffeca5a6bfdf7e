import math

import pytest

from trainers.task import TaskConfig
from trainers.task_records import Example
from tune.baselines import linear, majority
from tune.curve import CurvePoint, saved


def point(arm: str, budget: int, mean: float) -> CurvePoint:
    return CurvePoint(arm, budget, (mean,), mean, mean, mean)


def test_the_factor_is_read_off_the_line_over_the_logarithm_of_the_labels() -> None:
    points = [point("pretrained", 10, 0.5), point("pretrained", 1_000, 0.9), point("scratch", 1_000, 0.7)]
    found = saved(points, "scratch")
    assert (
        found is not None and found["labels"] == pytest.approx(100) and found["factor"] == pytest.approx(10)
    )


def test_no_factor_is_told_where_pretraining_never_reaches_the_control() -> None:
    assert saved([point("pretrained", 10, 0.5), point("linear", 10, 0.6)], "linear") is None
    assert saved([point("pretrained", 10, 0.6), point("linear", 100, 0.6)], "linear")["factor"] == 10  # type: ignore[index]


def test_the_linear_model_learns_words_and_the_majority_does_not() -> None:
    task = TaskConfig(name="t", kind="classification", labels=("a", "b"))
    rows = [
        Example(str(i), f"{'good' if i % 3 else 'bad'} thing {i}", "", [], "a" if i % 3 else "b")
        for i in range(90)
    ]
    train, validation, test = rows[:40], rows[40:60], rows[60:]
    assert linear(task, train, validation, test)["accuracy"] == 1.0
    assert math.isclose(majority(task, train, test)["accuracy"], 2 / 3)
