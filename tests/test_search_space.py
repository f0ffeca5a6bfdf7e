"""Search spaces: what they propose lies within them; mistakes are named before a trial starts."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.configuration.config import from_dict
from cluster.console.errors import ConfigError
from cluster.limits.bounds import LARGEST_INTEGER
from trainers.finetuning.config import FinetuneConfig
from tune.search.config import SweepRunConfig, grid_problem
from tune.search.proposals import Proposals, key_of
from tune.search.space import Dimension, SearchSpace, parse_space, with_point

BASE = from_dict(FinetuneConfig, {"run": {"task": "t.yaml"}, "backbone": {"uri": "model"}})
SPACE = {
    "optimizer.learning_rate": {"loguniform": [1e-5, 1e-3]},
    "adapt.train": {"choice": ["full", "lora"]},
    "adapt.lora_rank": {"choice": [4, 16], "if": {"adapt.train": "lora"}},
    "batch.rows_per_step": {"int": [8, 64]},
    "adapt.dropout": {"uniform": [0.0, 0.3]},
}


@pytest.mark.parametrize("search", ["random", "tpe"])
@pytest.mark.parametrize("seed", [-1, 2**32, LARGEST_INTEGER])
def test_a_search_takes_every_seed(search, seed):
    assert Proposals(parse_space(SPACE, BASE), search, 1, seed, []).propose() is not None


@pytest.mark.slow
@settings(deadline=None, max_examples=20)
@given(search=st.sampled_from(["random", "grid", "tpe"]), seed=st.integers(0, 1_000))
def test_every_point_lies_in_the_space_and_is_another(search, seed):
    proposals = Proposals(parse_space(SPACE, BASE), search, 12, seed, [])
    points = []
    while (point := proposals.propose()) is not None:
        points.append(point)
        proposals.learn(point, -abs(math.log(point["optimizer.learning_rate"] / 1e-4)))
    assert len(points) == 12 == len({key_of(point) for point in points})
    for point in points:
        assert 0.999e-5 <= point["optimizer.learning_rate"] <= 1.001e-3
        assert isinstance(point["batch.rows_per_step"], int) and 8 <= point["batch.rows_per_step"] <= 64
        assert 0 <= point["adapt.dropout"] <= 0.3
        assert ("adapt.lora_rank" in point) == (point["adapt.train"] == "lora")
        with_point(BASE, point)


def test_a_grid_is_every_combination_once():
    space = parse_space(
        {key: SPACE[key] for key in ("adapt.train", "adapt.lora_rank", "adapt.dropout")}, BASE
    )
    # Full has no rank; a range gives three values.
    assert len(space.grid()) == space.num_points() == (1 + 2) * 3


def test_a_grid_that_no_machine_could_hold_is_counted():
    ranges = [Dimension(f"range-{n}", "uniform", (0.0, 1.0), {}) for n in range(30)]
    space = SearchSpace((Dimension("warmup", "choice", (1, 1, 2), {}), *ranges))
    assert space.num_points() == 2 * 3**30  # a choice that stands twice is one
    assert grid_problem(SweepRunConfig(search="tpe", trials=4), space) is None
    assert "of the grid's 411,782,264,189,298 points" in grid_problem(
        SweepRunConfig(search="grid", trials=4), space
    )


def test_every_value_is_tried_where_its_conditions_hold():
    space = parse_space(
        {
            "adapt.train": {"choice": ["full", "lora"]},
            "adapt.lora_rank": {"choice": [4, 16], "if": {"adapt.train": "lora"}},
            "adapt.lora_alpha": {"choice": [8.0], "if": {"adapt.lora_rank": 16}},
        },
        BASE,
    )
    assert [(dimension.key, value, *point.values()) for dimension, value, point in space.corners()] == [
        ("adapt.train", "full", "full"),
        ("adapt.train", "lora", "lora", 4),
        ("adapt.lora_rank", 4, "lora", 4),
        ("adapt.lora_rank", 16, "lora", 16, 8.0),
        ("adapt.lora_alpha", 8.0, "lora", 16, 8.0),
    ]


def test_a_value_is_held_against_what_its_condition_asks_for():
    space = {
        "batch.min_steps": {"choice": [5, 50]},
        "batch.max_steps": {"choice": [20], "if": {"batch.min_steps": 5}},
    }
    assert len(parse_space(space, BASE).dimensions) == 2  # the base's 30 steps at least are those of no trial


@pytest.mark.parametrize("number", [10, 150])
def test_random_points_after_a_restart_are_those_of_an_unbroken_sweep(number):
    space = parse_space(SPACE, BASE)
    whole = Proposals(space, "random", number, 3, [])
    unbroken = [whole.propose() for _ in range(number)]
    known = number - 4
    again = Proposals(
        space, "random", number, 3, [(p, 0.5) for p in unbroken[: known - 1]] + [(unbroken[known - 1], None)]
    )
    assert again.left == 4
    assert [again.propose() for _ in range(5)] == [*unbroken[known:], None]


def test_a_resumed_trials_score_is_learnt_and_one_that_is_no_number_is_a_failure():
    space = parse_space({"optimizer.learning_rate": {"loguniform": [1e-6, 1.0]}}, BASE)

    def proposed(score):
        """What TPE proposes after 20 points, the best of which was adopted from an earlier start."""
        rates = [10 ** (-6 + 6 * i / 20) for i in range(20)]
        proposals = Proposals(
            space, "tpe", 30, 0, [({"optimizer.learning_rate": rate}, -10.0 - rate) for rate in rates]
        )
        best = proposals.adopt({"optimizer.learning_rate": 0.03})
        proposals.learn(best, score)
        return [proposals.propose() for _ in range(3)]

    assert proposed(5.0) != proposed(None) == proposed(math.nan)


def test_a_grid_larger_than_the_sweep_is_refused():
    space = parse_space({"adapt.train": SPACE["adapt.train"], "adapt.dropout": SPACE["adapt.dropout"]}, BASE)
    assert "leave out 2 of the grid's 6 points" in grid_problem(
        SweepRunConfig(search="grid", trials=4), space
    )
    assert grid_problem(SweepRunConfig(search="grid", trials=6), space) is None
    assert grid_problem(SweepRunConfig(search="random", trials=4), space) is None


def test_tpe_comes_nearer_to_the_best_than_chance():
    space = parse_space({"optimizer.learning_rate": {"loguniform": [1e-6, 1.0]}}, BASE)

    def nearest(search, seed):
        proposals, distances = Proposals(space, search, 40, seed, []), []
        while (point := proposals.propose()) is not None:
            distances.append(abs(math.log10(point["optimizer.learning_rate"]) + 2))
            proposals.learn(point, -distances[-1])
        return sum(distances[20:]) / 20

    assert sum(nearest("tpe", seed) for seed in range(3)) < 0.5 * sum(
        nearest("random", seed) for seed in range(3)
    )


@pytest.mark.parametrize(
    ("key", "described", "message"),
    [
        (
            "optimizer.learning_rat",
            {"choice": [1]},
            "not a key of the configuration; nearest: optimizer.learning_rate",
        ),
        ("run.name", {"choice": ["a"]}, "space.run.name cannot be varied"),
        ("validation.max_rows", {"choice": [10, 20]}, "validation.* says how trials are scored"),
        ("adapt.train", {"choice": ["full", "all"]}, 'adapt.train="all" is not'),
        ("adapt.dropout", {"uniform": [0.3, 0.1]}, "two ends of a range"),
        ("adapt.dropout", {"uniform": [0.3, 1.5]}, "adapt.dropout=1.5 must be"),
        ("optimizer.learning_rate", {"loguniform": [0, 1]}, "must be above 0"),
        ("batch.rows_per_step", {"int": [8, 16.5]}, "must be whole numbers"),
        ("batch.rows_per_step", {"uniform": [8, 64]}, "batch.rows_per_step takes no fractions; write {int"),
        ("batch.rows_per_step", {"loguniform": [8, 64]}, "takes no fractions"),
        ("backbone.from_scratch", {"int": [False, True]}, "two ends of a range"),
        ("backbone.from_scratch", {"uniform": [0, 1]}, "takes no fractions"),
        ("adapt.dropout", {"uniform": [math.nan, 0.3]}, "two ends of a range"),
        ("adapt.dropout", {"uniform": [0.0, math.inf]}, "is not finite"),
        ("adapt.dropout", {"choice": [0.1, math.nan]}, "is not finite"),
        ("adapt.dropout", {"normal": [0, 1]}, "must be one of {choice"),
        ("adapt.lora_rank", {"choice": [4], "if": {"adapt.train": "lora"}}, "does not stand before it"),
    ],
)
def test_mistakes_are_named(key, described, message):
    with pytest.raises(ConfigError, match=message):
        parse_space({key: described}, BASE)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"adapt.train": "lore"}, "adapt.train is never 'lore'; it is one of .'full', 'lora'."),
        ({"adapt.dropout": 0.5}, "adapt.dropout is never 0.5"),
        ("adapt.train", "must be a mapping"),
    ],
)
def test_a_condition_that_never_holds_is_named(condition, message):
    space = {
        "adapt.train": {"choice": ["full", "lora"]},
        "adapt.dropout": {"uniform": [0.0, 0.3]},
        "adapt.lora_rank": {"choice": [4], "if": condition},
    }
    with pytest.raises(ConfigError, match=message):
        parse_space(space, BASE)
