"""Steps that would harm the model are refused by every worker alike, and say which documents were in them."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage.uris import open_store
from data.shards.manifest import Fragments, Manifest
from data.shards.shards import ShardWriter
from trainers.recovery.guard import Guard, GuardConfig, TrainingDiverged, name_documents

CONFIG = GuardConfig(window_steps=8, warmup_steps=4, max_skipped_in_a_row=3, max_skipped=5)


def warm_guard(config: GuardConfig = CONFIG, **options) -> Guard:
    guard = Guard(config, **options)
    for step in range(4):
        assert guard.check(step, 4.0, 1.0) is None
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (math.nan, 1.0, "loss is nan"),
        (math.inf, 1.0, "loss is inf"),
        (4.0, math.nan, "gradient norm is nan"),
        (4.0, math.inf, "gradient norm is inf"),
    ],
)
def test_what_is_not_finite_is_refused_from_the_first_step_on(loss: float, norm: float, reason: str) -> None:
    assert Guard(CONFIG).check(0, loss, norm).reason == reason


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (
            4.0,
            20.1,
            "gradient norm 20.1 is more than guard.max_norm_ratio=20 times the median 1 of the last 4 steps",
        ),
        (
            6.1,
            1.0,
            "loss 6.1000 is more than guard.max_loss_rise=2 above the median 4.0000 of the last 4 steps",
        ),
    ],
)
def test_an_explosion_is_refused_and_what_is_within_the_limit_is_not(
    loss: float, norm: float, reason: str
) -> None:
    assert warm_guard().check(4, 6.0, 20.0) is None
    assert warm_guard().check(4, loss, norm).reason == reason


def test_before_the_warm_up_any_finite_step_is_accepted() -> None:
    guard = Guard(CONFIG)
    assert all(guard.check(step, 11.0 - step, 10.0**step) is None for step in range(4))


def test_zero_switches_a_limit_off() -> None:
    guard = warm_guard(GuardConfig(window_steps=8, warmup_steps=4, max_norm_ratio=0, max_loss_rise=0))
    assert guard.check(4, 1e6, 1e9) is None


def test_refused_steps_do_not_move_what_later_ones_are_compared_with() -> None:
    guard = warm_guard()
    for step in range(4, 7):
        assert guard.check(step, 4.0, 1_000.0) is not None
    assert guard.check(7, 4.0, 20.0) is None


def test_too_many_refusals_in_a_row_stop_the_run_with_the_documents_named() -> None:
    guard = warm_guard(name_documents=lambda step: [f"document-of-step-{step}"])
    for step in range(4, 7):
        assert guard.check(step, math.nan, 1.0).documents == (f"document-of-step-{step}",)
    with pytest.raises(
        TrainingDiverged, match=r"4 steps refused, guard.max_skipped_in_a_row=3 .*document-of-step-7"
    ):
        guard.check(7, math.nan, 1.0)


def test_too_many_refusals_in_all_stop_the_run() -> None:
    guard = warm_guard()
    for step in range(4, 14, 2):
        guard.check(step, math.nan, 1.0)
        guard.check(step + 1, 4.0, 1.0)
    with pytest.raises(TrainingDiverged, match=r"6 steps refused, guard.max_skipped=5"):
        guard.check(14, math.nan, 1.0)


def outcomes(guard: Guard, numbers: list[tuple[float, float]], first_step: int) -> list[str | None]:
    """The reason of each refused step and None for each accepted one, up to the one that stops the run."""
    found = []
    for step, (loss, norm) in enumerate(numbers, first_step):
        try:
            refusal = guard.check(step, loss, norm)
        except TrainingDiverged as stop:
            return [*found, str(stop)]
        found.append(refusal and refusal.reason)
    return found


@given(
    numbers=st.lists(st.tuples(st.floats(0, 20), st.floats(0, 1_000) | st.just(math.nan)), max_size=40),
    resumed_after=st.integers(0, 40),
)
def test_a_resumed_run_refuses_exactly_what_an_unbroken_one_does(numbers, resumed_after: int) -> None:
    unbroken = outcomes(Guard(CONFIG), numbers, 0)
    resumed_after = min(resumed_after, max(0, len(unbroken) - 1))
    first, second = Guard(CONFIG), Guard(CONFIG)
    before = outcomes(first, numbers[:resumed_after], 0)
    second.load(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert before + outcomes(second, numbers[resumed_after:], resumed_after) == unbroken


def test_the_documents_of_rows_are_those_with_a_token_in_them(tmp_path) -> None:
    store = open_store(str(tmp_path))
    options = {"split": "train", "source": "plays", "token_dtype": "uint16", "fragment_tokens": 30}
    with ShardWriter(store, **options) as writer:
        for name, length in (("a", 10), ("b", 10), ("c", 10), ("d", 25)):
            writer.add(name, np.arange(length), num_bytes=length)
        (written,) = writer.finish()
    columns = {**written.fragments, "shard": [0] * len(written.fragments["row_group"])}
    manifest = Manifest(
        tokenizer="0" * 16, vocab_size=100, boundary_id=0, token_dtype="uint16", sources=("plays",),
        shards=(written.shard,), fragments=Fragments.from_columns(columns), duplicates={}, set_aside={},
    )  # fmt: skip
    assert len(manifest.fragments) == 2  # a, b, c and then d

    def named(*rows: tuple[int, int]) -> list[str]:
        fragments, starts = np.array(rows).T
        return name_documents(store, manifest, fragments, starts, row_tokens=9)

    assert named((0, 0)) == ["a"]
    assert named((0, 1)) == ["a"]  # tokens 1 to 9
    assert named((0, 2)) == ["a", "b"]
    assert named((0, 10)) == ["b"]
    assert named((0, 19)) == ["b", "c"]
    assert named((1, 3), (0, 21), (1, 12)) == ["d", "c"]


def test_configuration_problems_name_key_value_and_remedy() -> None:
    config = GuardConfig(window_steps=10, warmup_steps=20, max_norm_ratio=0.5, max_loss_rise=-1)
    problems = list(config.problems("guard"))
    assert len(problems) == 3
    assert "guard.warmup_steps=20" in problems[0] and "at most: 10" in problems[0]
    assert "guard.max_norm_ratio=0.5" in problems[1]
    assert "guard.max_loss_rise=-1" in problems[2]
    assert not list(GuardConfig().problems("guard"))
