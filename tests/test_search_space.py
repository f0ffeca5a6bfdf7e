"""Search spaces: what they propose lies within them; mistakes are named before a trial starts."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import ConfigError, from_dict
from trainers.finetune_config import FinetuneConfig
from tune.proposals import Proposals, key_of
from tune.search_space import parse_space, with_point

BASE = from_dict(FinetuneConfig, {"run": {"task": "t.yaml"}, "backbone": {"uri": "model"}})
SPACE = {
    "optimizer.learning_rate": {"loguniform": [1e-5, 1e-3]},
    "adapt.train": {"choice": ["full", "lora"]},
    "adapt.lora_rank": {"choice": [4, 16], "if": {"adapt.train": "lora"}},
    "batch.rows_per_step": {"int": [8, 64]},
    "adapt.dropout": {"uniform": [0.0, 0.3]},
}


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
    assert len(space.grid()) == (1 + 2) * 3  # full has no rank; a range gives three values


def test_a_sweep_goes_on_after_what_is_known():
    space = parse_space(SPACE, BASE)
    first = Proposals(space, "random", 10, 0, [])
    points = [first.propose() for _ in range(4)]
    again = Proposals(space, "random", 10, 0, [(p, 0.5) for p in points[:3]] + [(points[3], None)])
    assert again.left == 6
    later = [again.propose() for _ in range(6)]
    assert again.propose() is None
    assert not {key_of(p) for p in later} & {key_of(p) for p in points}


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
        ("adapt.train", {"choice": ["full", "all"]}, 'adapt.train="all" is not'),
        ("adapt.dropout", {"uniform": [0.3, 0.1]}, "two ends of a range"),
        ("adapt.dropout", {"uniform": [0.3, 1.5]}, "adapt.dropout=1.5 must be"),
        ("optimizer.learning_rate", {"loguniform": [0, 1]}, "must be above 0"),
        ("batch.rows_per_step", {"int": [8, 16.5]}, "must be whole numbers"),
        ("adapt.dropout", {"normal": [0, 1]}, "must be one of {choice"),
        ("adapt.lora_rank", {"choice": [4], "if": {"adapt.train": "lora"}}, "does not stand before it"),
    ],
)
def test_mistakes_are_named(key, described, message):
    with pytest.raises(ConfigError, match=message):
        parse_space({key: described}, BASE)
