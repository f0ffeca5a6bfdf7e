import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainers.optim.schedule import ScheduleConfig, rate_factor

KINDS = ("cosine", "linear", "warmup_stable_decay", "constant")
schedules = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(KINDS),
    warmup_steps=st.integers(0, 50),
    decay_fraction=st.floats(0.01, 1.0),
    final_fraction=st.floats(0.0, 1.0),
)


@given(schedules, st.integers(1, 400))
def test_rate_rises_to_the_peak_and_never_rises_again(config: ScheduleConfig, total_steps: int) -> None:
    factors = [
        rate_factor(config, step, total_steps) for step in range(total_steps + config.warmup_steps + 10)
    ]
    warmup = factors[: config.warmup_steps]
    assert warmup == sorted(warmup) and all(f > 0 for f in warmup)
    if warmup:
        assert warmup[-1] == 1.0
    rest = factors[config.warmup_steps :]
    assert rest == sorted(rest, reverse=True)
    assert all(0 <= f <= 1 for f in factors)


@given(schedules, st.integers(60, 400))
def test_last_step_has_the_final_share_and_later_ones_keep_it(
    config: ScheduleConfig, total_steps: int
) -> None:
    expected = 1.0 if config.kind == "constant" else config.final_fraction
    assert rate_factor(config, total_steps - 1, total_steps) == pytest.approx(expected)
    assert rate_factor(config, total_steps + 1_000, total_steps) == pytest.approx(expected)


def test_cosine_equals_the_schedule_of_torch() -> None:
    total, warmup = 120, 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=0.1)
    config = ScheduleConfig(kind="cosine", warmup_steps=warmup, final_fraction=0.1)
    for step in range(warmup, total):
        optimizer.step()
        reference.step()
        assert rate_factor(config, step, total) == pytest.approx(reference.get_last_lr()[0])


def test_plateau_lasts_until_the_decay_begins() -> None:
    config = ScheduleConfig(
        kind="warmup_stable_decay", warmup_steps=10, decay_fraction=0.2, final_fraction=0.0
    )
    factors = [rate_factor(config, step, 100) for step in range(100)]
    assert set(factors[9:80]) == {1.0}
    assert factors[80:] == pytest.approx([1 - k / 20 for k in range(1, 21)])


def test_linear_loses_the_same_at_each_step() -> None:
    config = ScheduleConfig(kind="linear", warmup_steps=0, final_fraction=0.0)
    factors = [1.0] + [rate_factor(config, step, 8) for step in range(8)]
    assert all(math.isclose(a - b, 1 / 8) for a, b in zip(factors, factors[1:], strict=False))


def test_impossible_values_are_all_named() -> None:
    config = ScheduleConfig(warmup_steps=-1, decay_fraction=0.0, final_fraction=2.0)
    problems = list(config.problems("schedule"))
    assert [p.split("=")[0] for p in problems] == [
        "schedule.warmup_steps",
        "schedule.decay_fraction",
        "schedule.final_fraction",
    ]
