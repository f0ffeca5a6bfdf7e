"""A damaged line of a run's metrics costs that line, and is told; the others are read as they were written."""

import json
import logging
import time

import pytest

from cluster.storage.uris import open_store
from trainers.reporting.goodput import goodput_of
from trainers.reporting.metrics import MetricsWriter, read_attempts, read_metrics
from trainers.reporting.progress import Tail
from trainers.reporting.results import read_run, totals_of
from trainers.stored.metric_records import METERED, MOST_STEPS_LOST, parse

NEVER = 1e6
SEGMENT = "metrics/00000000-1.jsonl"


def step(number, **values):
    times = {
        "step_seconds": 2.0,
        "data_wait_seconds": 0.1,
        "checkpoint_stall_seconds": 0.0,
        "time": 1e9 + number,
    }
    return {
        "step": number,
        "loss": 4.0,
        "tokens": 64,
        "tokens_per_second": 32.0,
        "attempt": 1,
        **times,
        **values,
    }


@pytest.fixture
def run(tmp_path):
    """Three steps of an attempt."""
    store = open_store(str(tmp_path))
    with MetricsWriter(store, 1, NEVER) as writer:
        writer.write({"step": 0, "event": "start", "world_size": 1})
        for number in (1, 2, 3):
            writer.write(step(number))
    return store


@pytest.mark.parametrize(
    ("damaged", "why"),
    [
        (lambda line: line[: len(line) // 2], "line 4: "),
        (lambda line: line.replace(b'"step": 3', b'"step": "3"'), "step: Input should be a valid integer"),
        (lambda line: line.replace(b'"step": 3', b'"step": 3, "step": 3'), "stands twice"),
        (lambda line: line.replace(b'"step": 3', b'"step": 900000000000'), "step 900,000,000,000 follows step 2"),
        (lambda line: line.replace(b'"attempt": 1', b'"attempt": 7'), "it is of attempt 7, the file of 1"),
        (lambda line: line.replace(b'_seconds": 2.0', b'_seconds": -2.0'), "step_seconds: "),
        (lambda line: line.replace(b"2.0", b"1e999"), "too large"),
        (lambda line: line.replace(b"4.0", b"NaN"), "NaN"),
        (lambda line: line.replace(b'"loss"', b'"lost"'), "loss: Field required"),
        (lambda line: b"[" * 100_000, "line 4: "),
        (lambda line: b"\xff" + line, "utf-8"),
        (lambda line: line.replace(b'"time"', b'"then"'), "time: Field required"),
        (lambda line: b"7", "it is no record"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_left_out_counted_and_told(run, caplog, damaged, why):
    *lines, last = run.read(SEGMENT).splitlines(keepends=True)
    run.put(SEGMENT, b"".join(lines) + damaged(last))
    with caplog.at_level(logging.WARNING):
        found = read_metrics(run)
    assert found == [json.loads(line) for line in lines]
    [told] = [record.getMessage() for record in caplog.records]
    assert (
        told.startswith(f"{SEGMENT}: 1 of 4 lines are damaged and left out, the first line 4: ")
        and why in told
    )
    assert "\n" not in told and len(told) < 300
    goodput_of(found)


def test_a_line_that_is_whole_needs_no_end(run):
    run.put(SEGMENT, run.read(SEGMENT).rstrip(b"\n"))
    assert len(read_metrics(run)) == 4


def test_a_flipped_digit_of_a_step_takes_no_memory_for_all_between(run):
    lines = run.read(SEGMENT).replace(b'"step": 3', b'"step": %d' % (3 + MOST_STEPS_LOST))
    started = time.process_time()
    found = parse(lines, SEGMENT)
    assert len(found) == 3 and goodput_of(found).training > 0 and time.process_time() - started < 1


def test_what_follows_a_run_sees_a_line_once_it_is_whole(run):
    tail, whole = Tail(run, whole=True, needed=METERED), run.read(SEGMENT)
    run.put(SEGMENT, whole[:-20])
    assert [record["step"] for record in tail.poll()] == [0, 1, 2]
    run.put(SEGMENT, whole)
    assert [record["step"] for record in tail.poll()] == [3]


def test_steps_of_another_kind_of_run_are_left_out_of_a_report_and_told(tmp_path, caplog):
    store = open_store(str(tmp_path))
    fine_tuned = {key: value for key, value in step(2).items() if key != "data_wait_seconds"}
    with MetricsWriter(store, 1, NEVER) as writer:
        for record in (step(1), fine_tuned):
            writer.write(record)
    assert [record["step"] for record in read_attempts(store)] == [1, 2]
    with caplog.at_level(logging.WARNING):
        assert totals_of(read_run(store)).steps == 1
    assert "the step has no data_wait_seconds" in caplog.text


def test_files_with_other_names_are_no_segments(run):
    before = read_metrics(run)
    for name in (".DS_Store", "copy of 00000000-1.jsonl", "00000000-x.jsonl", "00000000-1.jsonl.bak"):
        run.put(f"metrics/{name}", b"\xff")
    assert read_metrics(run) == before == Tail(run, whole=True).poll()
