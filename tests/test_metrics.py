import json
import math
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.storage.uris import StorageError, open_store
from trainers.reporting import metrics
from trainers.reporting.metrics import (
    Meter,
    MetricsWriter,
    events_of,
    merge_metrics,
    one_history,
    read_attempts,
    read_metrics,
    steps_of,
    validations_of,
)

NEVER = 1e6  # seconds between flushes by the thread: the tests flush


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def step_record(step, **values):
    return {"step": step, "loss": 5.0 - step / 1000, "tokens": 4096, **values}


def write(store, attempt, records, now=time.time):
    with MetricsWriter(store, attempt, NEVER, now=now) as writer:
        for record in records:
            writer.write(record)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.integers(1, 10**7))
def test_tokens_per_second_times_seconds_is_tokens_and_the_steps_add_up_to_the_clock(durations, tokens):
    clock = Clock()
    meter = Meter(flops_per_token=1, peak_flops_per_second=1, clock=clock)
    records = []
    for step, duration in enumerate(durations, start=1):
        clock.now += duration
        records.append(meter.finish(step, tokens=tokens))
    assert all(r["tokens_per_second"] * r["step_seconds"] == pytest.approx(r["tokens"]) for r in records)
    assert sum(r["step_seconds"] for r in records) == pytest.approx(clock.now - 100)


def test_a_step_equals_the_computation_by_hand():
    clock = Clock()
    # 6 x 10 M parameters = 60 MFLOP a token, two workers of 1 TFLOP/s.
    compiled = 7.0  # before the first step
    meter = Meter(flops_per_token=60e6, peak_flops_per_second=2e12, clock=clock, compiled=lambda: compiled)
    clock.now += 0.1
    meter.waited(0.1)
    clock.now += 1.6
    compiled += 1.5
    meter.stalled(0.2)
    meter.stalled(0.1)
    clock.now += 0.3
    first = meter.finish(1, tokens=16_384, loss=3.5)
    with meter.apart():
        clock.now += 50
        compiled += 40.0
    clock.now += 1.0
    compiled += 0.25
    second = meter.finish(2, tokens=16_384, loss=3.4)
    assert first == {
        "step": 1,
        "loss": 3.5,
        "tokens": 16_384,
        "step_seconds": pytest.approx(2.0),
        "data_wait_seconds": pytest.approx(0.1),
        "checkpoint_stall_seconds": pytest.approx(0.3),
        "compile_seconds": pytest.approx(1.5),
        "tokens_per_second": pytest.approx(8_192),
        "mfu": pytest.approx(8_192 * 60e6 / 2e12),  # 0.246
    }
    assert second["step_seconds"] == pytest.approx(1.0)
    assert second["compile_seconds"] == pytest.approx(0.25)
    assert second["data_wait_seconds"] == second["checkpoint_stall_seconds"] == 0


def test_without_a_known_peak_there_is_no_mfu():
    clock = Clock()
    meter = Meter(flops_per_token=1, peak_flops_per_second=0, clock=clock)
    clock.now += 1
    assert meter.finish(1, tokens=1)["mfu"] is None


def test_what_was_written_is_read_back_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "SEGMENT_LINES", 7)
    store = open_store(str(tmp_path))
    records = [step_record(step) for step in range(1, 31)]
    records.insert(20, {"step": 20, "validation": {"loss": 4.0, "bits_per_byte": 1.9}})
    records.insert(0, {"step": 0, "event": "start"})
    write(store, 3, records)
    history = read_metrics(store)
    times = [read.pop("time") for read in history]
    assert times == sorted(times)
    assert history == [{**record, "attempt": 3} for record in records]
    names = [path.name for path in sorted(tmp_path.glob("metrics/*"))]
    assert names[:2] == ["00000000-3.jsonl", "00000007-3.jsonl"]
    assert len(steps_of(history)) == 30
    assert len(validations_of(history)) == len(events_of(history, "start")) == 1


def test_the_last_attempt_wins_and_what_was_given_up_is_gone(tmp_path):
    store = open_store(str(tmp_path))
    write(store, 1, [{"step": 0, "event": "start"}, *(step_record(s, loss=1.0) for s in range(1, 51))])
    write(store, 2, [{"step": 40, "event": "start"}, *(step_record(s, loss=2.0) for s in range(41, 46))])
    history = steps_of(read_metrics(store))
    assert [(r["step"], r["loss"]) for r in history] == [
        *((s, 1.0) for s in range(1, 41)),
        *((s, 2.0) for s in range(41, 46)),
    ]
    assert [e["step"] for e in events_of(read_metrics(store), "start")] == [0, 40]
    assert len(steps_of(read_attempts(store))) == 55  # time and energy were spent on all of them


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 9)), min_size=1, max_size=6))
def test_a_history_has_each_step_once_whatever_the_restarts(attempts):
    records, done = [], 0
    for attempt, (back, count) in enumerate(attempts):
        start = max(0, done - 3 * back)
        done = start + count
        records.append({"step": start, "event": "start", "attempt": attempt})
        records += [{**step_record(step), "attempt": attempt} for step in range(start + 1, done + 1)]
    assert [r["step"] for r in steps_of(one_history(records))] == list(range(1, done + 1))


def test_the_merged_file_is_the_history_and_stands_in_for_the_segments(tmp_path):
    store = open_store(str(tmp_path))
    write(store, 1, [step_record(s) for s in range(1, 9)])
    write(store, 2, [step_record(s, loss=2.0) for s in range(5, 11)])
    before = read_metrics(store)
    merge_metrics(store)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()] == before
    for path in tmp_path.glob("metrics/*"):
        path.unlink()
    assert read_metrics(store) == before


def test_a_run_that_has_not_begun_has_no_records(tmp_path):
    assert read_metrics(open_store(str(tmp_path))) == []


def test_numbers_that_json_cannot_hold_are_null(tmp_path):
    store = open_store(str(tmp_path))
    write(store, 1, [step_record(1, loss=math.nan, grad_norm=math.inf)])
    text = next(tmp_path.glob("metrics/*")).read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert (read_metrics(store)[0]["loss"], read_metrics(store)[0]["grad_norm"]) == (None, None)


class UnreliableStore:
    """A local store whose writes fail while `is_down`, and block while `gate` is cleared."""

    def __init__(self, path: Path):
        self.inner = open_store(str(path))
        self.is_down = False
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def put(self, path, data):
        self.entered.set()
        self.gate.wait()
        if self.is_down:
            raise StorageError("no route to host")
        self.inner.put(path, data)


def test_a_storage_outage_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "SEGMENT_LINES", 4)
    store = UnreliableStore(tmp_path)
    writer = MetricsWriter(store, 1, NEVER)
    for step in range(1, 21):
        store.is_down = 5 <= step <= 15
        writer.write(step_record(step))
        if store.is_down:
            with pytest.raises(StorageError):
                writer.flush()
        elif step % 3:
            writer.flush()
    writer.close()
    assert [r["step"] for r in read_metrics(store.inner)] == list(range(1, 21))


def test_writing_does_not_wait_for_a_storage_that_hangs_and_memory_stays_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_PENDING", 10)
    store = UnreliableStore(tmp_path)
    store.gate.clear()
    writer = MetricsWriter(store, 1, flush_seconds=0.001)
    writer.write(step_record(1))
    assert store.entered.wait(10)
    for step in range(2, 31):  # would not end if it waited
        writer.write(step_record(step))
    store.gate.set()
    writer.close()
    history = read_metrics(store.inner)
    assert [r["step"] for r in steps_of(history)] == list(range(1, 12))
    assert [e["records"] for e in events_of(history, "metrics_lost")] == [19]


def test_closing_fails_loudly_when_records_cannot_be_stored(tmp_path):
    store = UnreliableStore(tmp_path)
    writer = MetricsWriter(store, 1, NEVER)
    writer.write(step_record(1))
    store.is_down = True
    with pytest.raises(StorageError):
        writer.close()


def test_tensorboard_reads_the_same_history(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "SEGMENT_LINES", 6)
    store = open_store(str(tmp_path))
    write(store, 1, [{"step": 0, "event": "start"}, *(step_record(s, loss=float(s)) for s in range(1, 21))])
    a_minute_later = time.time() + 60
    again = [step_record(s, loss=float(-s)) for s in range(11, 16)]
    validation = {"step": 15, "validation": {"bits_per_byte": 1.75}}
    write(store, 2, [{"step": 10, "event": "start"}, *again, validation], now=lambda: a_minute_later)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    expected = [(s, s) for s in range(1, 11)] + [(s, -s) for s in range(11, 16)]
    assert [(scalar.step, scalar.value) for scalar in board.Scalars("train/loss")] == expected
    assert [(s.step, s.value) for s in board.Scalars("validation/bits_per_byte")] == [(15, 1.75)]
    assert "train/time" not in board.Tags()["scalars"]
