"""Every second of a run has one name, and none has two."""

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.reporting.goodput import Accounts, goodput_of


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
        "compiling": 0.0,
        "waiting_for_nodes": 0.0,
        "down": 30.0,
        "concluding": 0.0,
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


def test_a_first_step_is_training_for_as_long_as_a_usual_one_and_start_up_beyond():
    compiled = {"compile_seconds": 20.0}
    records = [
        start(0, 1, began=100.0, at=104.0),
        step(1, 1, at=140.0, seconds=30.0) | compiled,  # beside compiling it took 8 s more than usual
        *(step(number, 1, at=138.0 + 2 * number, seconds=2.0) for number in range(2, 5)),
        step(5, 1, at=155.0, seconds=9.0) | {"compile_seconds": 7.0},
        {"step": 5, "attempt": 1, "time": 165.0, "validation": {"seconds": 10.0, "compile_seconds": 6.0}},
    ]
    found = goodput_of(records)
    assert (found.training, found.compiling, found.validating) == (10.0, 20.0 + 7.0 + 6.0, 4.0)
    assert (found.starting, found.other) == (10.0 + 8.0, 0.0)
    for record in records:  # as older runs wrote them
        record.pop("compile_seconds", None)
    found = goodput_of(records[:5])
    assert (found.training, found.compiling, found.starting) == (8.0, 0.0, 10.0 + 28.0)


def test_start_up_in_a_step_that_was_done_again_is_start_up_still():
    records = [
        start(0, 1, began=0.0, at=0.0),
        step(1, 1, at=30.0, seconds=30.0) | {"compile_seconds": 20.0},
        step(2, 1, at=32.0, seconds=2.0),
        start(0, 2, began=32.0, at=32.0),
        step(1, 2, at=45.0, seconds=13.0)
        | {"compile_seconds": 5.0},  # as usual: 2 s, as in the attempt before
    ]
    found = goodput_of(records)
    assert (found.recomputed, found.training) == (4.0, 2.0)
    assert (found.compiling, found.starting) == (25.0, 8.0 + 6.0)


def test_compiling_is_not_counted_twice_where_another_worker_waited_meanwhile():
    records = [start(0, 1, 0.0, 0.0), step(1, 1, at=6.0, seconds=6.0, wait=5.0) | {"compile_seconds": 5.5}]
    assert (goodput_of(records).compiling, goodput_of(records).data_wait) == (1.0, 5.0)


def event(name: str, step: int, attempt: int, at: float) -> dict:
    return {"event": name, "step": step, "attempt": attempt, "time": at}


def test_what_comes_after_the_last_step_is_concluding_whoever_does_it():
    records = [
        asked(start(0, 1, began=110.0, at=110.0), at=100.0),
        step(1, 1, at=120.0, seconds=10.0),
        event("checkpoint", 1, 1, at=121.0),
        event("trained", 1, 1, at=122.0),
        event("tested", 1, 1, at=140.0),
        # killed, and started anew by a later driver, to conclude alone
        asked(start(1, 2, began=210.0, at=214.0), at=200.0),
        event("trained", 1, 2, at=215.0),
        event("exported", 1, 2, at=220.0),
    ]
    found = goodput_of(records)
    assert (found.concluding, found.starting, found.waiting_for_nodes, found.down) == (23.0, 5.0, 20.0, 60.0)
    assert (found.other, found.total) == (2.0, 120.0)
    # That driver was cut off after 10 s more; another made the report.
    found = goodput_of(records, [(199.0, 230.0), (300.0, 310.0)])
    assert (found.concluding, found.down, found.other) == (23.0 + 10.0 + 10.0, 60.0 + 70.0, 2.0)
    assert found.total == 210.0


def test_while_a_run_is_concluded_its_time_grows_by_that_alone_even_if_nodes_leave():
    accounts = Accounts()
    accounts.ask(100.0)
    for record in (
        asked(start(0, 1, began=110.0, at=110.0), at=100.0),
        step(1, 1, at=120.0, seconds=10.0),
        event("trained", 1, 1, at=122.0),
    ):
        accounts.add(record)
    found = accounts.goodput(now=150.0, lacks_nodes=True)
    assert (found.concluding, found.waiting_for_nodes, found.total) == (28.0, 10.0, 50.0)


USUAL_SECONDS = 2.0


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "down": st.floats(0, 50),
                "waiting_for_nodes": st.floats(0.1, 50),
                "starting": st.floats(0.1, 20),
                "warming": st.floats(0, 20),
                "compiling": st.floats(0, 40),
                "steps": st.integers(0, 6),
                "back": st.integers(0, 3),
                "validating": st.floats(0, 9),
            }
        ),
        min_size=1,
        max_size=4,
    ),
    st.tuples(st.floats(0, 9), st.floats(0, 9), st.floats(0, 9)),
)
def test_the_accounts_name_each_second_as_the_run_that_was_played_did(attempts, concluding):
    """Runs are played second by second; what each second went into is written down beside the records."""
    now, done, records = 1000.0, 0, []
    spent = dict.fromkeys(asdict(goodput_of([])), 0.0)

    def spend(part: str, seconds: float) -> None:
        nonlocal now
        now += seconds
        spent[part] += seconds

    for number, plan in enumerate(attempts, start=1):
        # What the attempt before had done since its checkpoint is lost.
        back = min(plan["back"], attempts[number - 2]["steps"], done) if number > 1 else 0
        done -= back
        spent["recomputed"] += back * USUAL_SECONDS
        spent["training"] -= back * USUAL_SECONDS
        spend("down", plan["down"] if number > 1 else 0.0)
        at = now
        spend("waiting_for_nodes", plan["waiting_for_nodes"])
        began = now
        spend("starting", plan["starting"])
        records.append(asked(start(done, number, began=began, at=now), at=at))
        for index in range(plan["steps"]):
            # Where no attempt did a second step, nothing tells what is usual.
            is_first = index == 0
            warming = plan["warming"] if is_first and any(each["steps"] > 1 for each in attempts) else 0.0
            compiling = plan["compiling"] if is_first else 0.0
            spend("starting", warming)
            spend("compiling", compiling)
            spend("training", USUAL_SECONDS)
            done += 1
            whole = step(done, number, at=now, seconds=warming + compiling + USUAL_SECONDS)
            records.append(whole | {"compile_seconds": compiling})
        if plan["steps"]:
            spend("validating", plan["validating"])
            found = {"seconds": plan["validating"], "compile_seconds": 0.0}
            records.append({"step": done, "attempt": number, "time": now, "validation": found})
    began, number = now, len(attempts)
    records.append(event("trained", done, number, at=now))
    for seconds in concluding[:2]:
        spend("concluding", seconds)
        records.append(event("exported", done, number, at=now))
    spend("concluding", concluding[2])
    found = goodput_of(records, [(began, now)])
    assert asdict(found) == pytest.approx(spent, abs=1e-6)
    assert found.total == pytest.approx(now - 1000.0)


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
