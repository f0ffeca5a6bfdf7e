"""Every second of a run has one name, and none has two."""

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.goodput import Accounts, goodput_of


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
        "waiting_for_nodes": 0.0,
        "down": 30.0,
        "other": 0.0,
    }
    assert goodput_of(records).share == pytest.approx(6.25 / 57)


def asked(record: dict, at: float) -> dict:
    return {**record, "asked": at}


def test_what_passes_without_workers_is_waiting_where_a_driver_asked_for_them_and_down_else():
    records = [
        asked(start(0, 1, began=110.0, at=110.0), at=100.0),
        step(1, 1, at=120.0, seconds=10.0),
        asked(start(1, 2, began=150.0, at=150.0), at=100.0),  # of the same driver: workers failed
        step(2, 2, at=160.0, seconds=10.0),
        asked(
            start(2, 3, began=190.0, at=190.0), at=185.0
        ),  # another driver, 25 s after the last was heard of
        step(3, 3, at=200.0, seconds=10.0),
    ]
    found = goodput_of(records)
    assert (found.waiting_for_nodes, found.down) == (10.0 + 30.0 + 5.0, 25.0)
    assert (found.total, found.training, found.other) == (100.0, 30.0, 0.0)


def test_while_a_run_lives_the_time_since_its_last_record_has_a_name_too():
    accounts = Accounts()
    assert accounts.goodput(now=100.0).total == 0.0
    accounts.ask(100.0)
    assert accounts.goodput(now=130.0).waiting_for_nodes == accounts.goodput(now=130.0).total == 30.0
    accounts.add(asked(start(0, 1, began=130.0, at=132.0), at=100.0))
    assert accounts.goodput(now=140.0).starting == 10.0
    accounts.add(step(1, 1, at=150.0, seconds=5.0))
    assert accounts.goodput(now=160.0).other == 10.0
    assert accounts.goodput(now=160.0, lacks_nodes=True).waiting_for_nodes == 30.0 + 10.0
    accounts.ask(170.0)  # a new driver
    found = accounts.goodput(now=175.0)
    assert (found.down, found.waiting_for_nodes, found.total) == (20.0, 30.0 + 5.0, 75.0)


def test_steps_that_a_worker_which_was_cut_off_writes_late_were_done_again():
    accounts = Accounts()
    for record in (
        start(0, 1, began=0.0, at=0.0),
        step(1, 1, at=1.0, seconds=1.0),
        start(1, 2, began=10.0, at=10.0),
        step(2, 2, at=12.0, seconds=2.0),
        step(2, 1, at=13.0, seconds=4.0),
    ):
        accounts.add(record)
    assert (accounts.goodput().training, accounts.goodput().recomputed) == (3.0, 4.0)


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
