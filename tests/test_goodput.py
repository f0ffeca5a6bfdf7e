"""Every second of a run has one name, and none has two."""

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.goodput import goodput_of


def step(number: int, attempt: int, at: float, seconds: float, wait: float = 0.0, stall: float = 0.0) -> dict:
    waits = {"data_wait_seconds": wait, "checkpoint_stall_seconds": stall}
    return {"step": number, "attempt": attempt, "time": at, "step_seconds": seconds, "tokens": 1, **waits}


def start(number: int, attempt: int, began: float, at: float) -> dict:
    return {"step": number, "attempt": attempt, "time": at, "event": "start", "began": began}


def test_a_run_with_one_failure_is_accounted_to_the_second():
    records = [
        start(0, 1, began=100.0, at=104.0),
        step(1, 1, at=110.0, seconds=2.0),  # the first step began at 108
        step(2, 1, at=113.0, seconds=3.0, wait=0.5, stall=0.25),
        {"step": 2, "attempt": 1, "time": 117.0, "validation": {"seconds": 4.0}},
        step(3, 1, at=120.0, seconds=3.0),  # lost: the next attempt goes on after step 2
        start(2, 2, began=150.0, at=151.0),
        step(3, 2, at=157.0, seconds=2.0),
    ]
    found = asdict(goodput_of(records))
    assert found == {
        "training": 2.0 + 3.0 - 0.75 + 2.0,
        "data_wait": 0.5,
        "checkpoint_stall": 0.25,
        "recomputed": 3.0,
        "validating": 4.0,
        "starting": 8.0 + 5.0,
        "down": 30.0,
        "other": 0.0,
    }
    assert goodput_of(records).share == pytest.approx(6.25 / 57)


def test_a_run_that_has_not_begun_has_no_goodput():
    assert goodput_of([]).share == 0.0


@given(
    st.lists(st.tuples(st.floats(0.1, 50), st.lists(st.floats(0.1, 9), max_size=6)), min_size=1, max_size=4)
)
def test_the_parts_add_up_to_the_time_from_the_first_start_to_the_last_record(attempts):
    now, done, records = 0.0, 0, []
    for number, (pause, steps) in enumerate(attempts, start=1):
        now += pause
        records.append(start(done, number, began=now, at=now))
        for seconds in steps:
            now, done = now + seconds, done + 1
            records.append(step(done, number, at=now, seconds=seconds))
    found = goodput_of(records)
    assert found.total == pytest.approx(now - attempts[0][0])
    assert all(seconds >= -1e-9 for seconds in asdict(found).values())
