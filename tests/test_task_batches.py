from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainers.finetuning.batches import RecordOrder


@given(num=st.integers(1, 60), rows=st.integers(1, 20), seed=st.integers(0, 5))
def test_every_record_is_trained_exactly_once_an_epoch(num: int, rows: int, seed: int) -> None:
    order = RecordOrder(range(num), rows, seed)
    size = order.rows_per_step * order.window_steps
    epochs = 2
    whole = -(-epochs * num // size) * order.window_steps
    counts = Counter(index for step in range(whole) for index in order.rows(step))
    # Whole windows: each record so often as there are whole epochs in them, or once more.
    assert set(counts) == set(range(num))
    assert max(counts.values()) - min(counts.values()) <= 1


@given(num=st.integers(1, 100), rows=st.integers(1, 40), seed=st.integers(0, 5))
def test_a_step_trains_different_records_however_few_there_are(num: int, rows: int, seed: int) -> None:
    order = RecordOrder([5] * num, rows, seed)  # of one length: sorting would bring copies together
    for step in range(4 * order.window_steps):
        counts = Counter(order.rows(step))
        # A step in which one epoch ends and the next begins may train a record of either.
        assert max(counts.values()) <= 2
        if num == order.rows_per_step * order.window_steps:  # each window is an epoch
            assert len(counts) == order.rows_per_step


def test_a_steps_records_are_a_function_of_seed_and_step() -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 500)
    order = RecordOrder(lengths, 32, seed=1)
    later = [RecordOrder(lengths, 32, seed=1).rows(step) for step in (40, 3, 17)]
    assert [order.rows(step) for step in range(41)][40] == later[0] and order.rows(17) == later[2]
    assert order.rows(3) == later[1] != RecordOrder(lengths, 32, seed=2).rows(3)


def test_records_of_a_step_are_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 4_000)
    order = RecordOrder(lengths, 32, seed=1)
    padded = sum(32 * lengths[order.rows(step)].max() for step in range(100))
    used = sum(lengths[order.rows(step)].sum() for step in range(100))
    assert padded < 1.15 * used
