from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.order.mixture import Mixture, least_prime_not_dividing


@st.composite
def mixtures(draw, max_segments=3):
    lanes = draw(st.integers(1, 12))
    num_sources = draw(st.integers(1, 4))
    weights = st.lists(
        st.sampled_from([0.0, 0.001, 0.2, 1.0, 3.7]), min_size=num_sources, max_size=num_sources
    ).filter(any)
    starts = [0, *sorted(draw(st.sets(st.integers(1, 60), max_size=max_segments - 1)))]
    schedule = [(start, draw(weights)) for start in starts]
    rows_per_step = lanes * draw(st.integers(1, 6))
    mixture = Mixture(
        rows_per_step=rows_per_step, lanes=lanes, schedule=schedule, seed=draw(st.integers(0, 99))
    )
    return mixture, rows_per_step, lanes, schedule


def weights_at(schedule, step):
    weights = [weights for start, weights in schedule if start <= step][-1]
    return np.array(weights) / sum(weights)


def counts(sources, num_sources):
    return np.bincount(np.asarray(sources).ravel(), minlength=num_sources)


@given(mixtures(), st.integers(0, 10_000_000))
def test_each_step_has_each_sources_share_to_within_one_row(case, step):
    mixture, rows_per_step, lanes, schedule = case
    weights = weights_at(schedule, step)
    taken = counts(mixture.sources(step, np.arange(lanes)), len(weights))
    assert taken.sum() == rows_per_step
    assert np.all(np.abs(taken - weights * rows_per_step) < 1 + 1e-6)


@given(mixtures(), st.integers(0, 120))
def test_closed_form_counts_equal_counting(case, step):
    mixture, _, lanes, schedule = case
    num_sources = len(schedule[0][1])
    for lane in range(lanes):
        counted = counts(mixture.sources(np.arange(step), lane), num_sources)
        assert mixture.counts_before(step, lane).tolist() == counted.tolist()


@given(mixtures(max_segments=1), st.integers(0, 10**9), st.integers(1, 50))
def test_counts_far_into_a_run_go_on_step_by_step(case, start, num_steps):
    mixture, _, lanes, schedule = case
    steps = np.arange(start, start + num_steps + 1)
    before = mixture.counts_before(steps[:, None], np.arange(lanes))
    for i, (earlier, later) in enumerate(pairwise(before)):
        taken = [counts(row, len(schedule[0][1])) for row in mixture.sources(start + i, np.arange(lanes))]
        assert np.array_equal(later - earlier, taken)


@given(mixtures(max_segments=1), st.integers(1, 10**9))
def test_a_lanes_share_stays_even_over_any_number_of_steps(case, steps):
    mixture, rows_per_step, lanes, schedule = case
    weights = weights_at(schedule, 0)
    given_rows = mixture.counts_before(steps, np.arange(lanes))
    expected = weights * steps * mixture.rows_per_lane
    # Each digit of the step in base b adds at most b - 1 runs, each exact to within one row.
    base = least_prime_not_dividing(rows_per_step)
    digits = int(np.ceil(np.log(steps + 1) / np.log(base)))
    rounding = 1e-9 * steps * rows_per_step
    assert np.all(np.abs(given_rows - expected) <= (base - 1) * digits + rounding)


def test_a_source_rarer_than_one_row_a_step_comes_at_regular_distances():
    mixture = Mixture(rows_per_step=16, lanes=16, schedule=[(0, [0.99, 0.01])], seed=1)
    steps = np.flatnonzero((mixture.sources(np.arange(2_000)[:, None], np.arange(16)) == 1).any(axis=(1, 2)))
    # 0.16 rows a step: 320 in 2,000 steps, one in 6.25 steps on average, never three times that apart.
    assert len(steps) == pytest.approx(320, abs=3)
    assert np.diff(steps).max() <= 18


def test_a_change_of_weights_holds_from_its_step_on():
    mixture = Mixture(rows_per_step=8, lanes=4, schedule=[(0, [1, 0]), (5, [0, 1])], seed=0)
    assert set(mixture.sources(4, np.arange(4)).ravel()) == {0}
    assert set(mixture.sources(5, np.arange(4)).ravel()) == {1}
    assert mixture.counts_before(7, np.arange(4)).tolist() == [[10, 4]] * 4


def test_steps_beyond_the_period_are_refused():
    mixture = Mixture(rows_per_step=8, lanes=4, schedule=[(0, [1])], seed=0)
    with pytest.raises(ValueError, match="steps lie in"):
        mixture.counts_before(mixture.period, 0)


@pytest.mark.parametrize(("number", "prime"), [(1, 2), (16, 3), (6, 5), (24, 5), (30, 7), (35, 2)])
def test_the_base_shares_no_factor_with_the_batch(number, prime):
    assert least_prime_not_dividing(number) == prime
