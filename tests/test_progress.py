import io
import itertools

import pytest
from rich.console import Console

from cluster.storage.uris import StorageError, open_store
from trainers.reporting.metrics import MetricsWriter
from trainers.reporting.progress import Progress, Status, Tail

NEVER = 1e6


def step_record(step, **values):
    times = {"step_seconds": 2.0, "data_wait_seconds": 0.05, "checkpoint_stall_seconds": 0.0}
    times |= {"tokens_per_second": 2_048.0, "time": 1_000.0 + 3 * step}
    return {"step": step, "loss": 4.0, "tokens": 4_096, "attempt": 1, **times, **values}


def validation_record(step, bits_per_byte):
    return {"step": step, "validation": {"bits_per_byte": bits_per_byte, "perplexity": 20.0}, "attempt": 1}


def writer_for(store, attempt=1):
    return MetricsWriter(store, attempt, NEVER)


def test_the_line_equals_the_computation_by_hand():
    status = Status(total_steps=100)
    for step in range(1, 11):
        status.absorb(step_record(step, loss=4.0 - step / 10))
    status.absorb(validation_record(10, 2.0314))
    # 10 steps of 4,096 tokens in 20 s; waited 0.05 of 2 s; 90 steps to go, one every 3 s by the clock.
    assert status.line() == (
        "step 10/100  loss 3.000  validation 2.031 bits/byte  2,048 tokens/s  data wait 2.5%  4 min 30 s left"
    )


def test_rates_come_from_recent_steps_alone():
    status = Status(total_steps=1_000)
    for step in range(1, 201):
        status.absorb(step_record(step, step_seconds=8.0 if step <= 150 else 1.0))
    assert "4,096 tokens/s" in status.line()


def test_before_the_first_step_nothing_is_claimed():
    assert Status(total_steps=10).line() == "step 0/10  waiting for the first step"


def test_a_loss_that_is_not_finite_is_called_that():
    status = Status(total_steps=10)
    status.absorb(step_record(1, loss=None))
    assert "loss not finite" in status.line()


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"event": "start", "world_size": 4}, ["step 40", "going on", "4 workers", "attempt 2"]),
        ({"event": "checkpoint", "name": "step-00000040", "best": True}, ["step-00000040", "best"]),
        ({"event": "skipped", "reason": "loss is nan", "documents": ["a#1", "b"]}, ["loss is nan", "a#1, b"]),
        ({"event": "metrics_lost", "records": 7}, ["metrics_lost", "records=7"]),
    ],
)
def test_what_happened_is_told_with_its_step(event, words):
    line = Status(total_steps=100).absorb({"step": 40, "attempt": 2, "time": 0.0, **event})
    assert all(word in line for word in words)


def test_after_a_restart_the_line_counts_from_where_the_run_went_on():
    status = Status(total_steps=100)
    for step in range(1, 51):
        status.absorb(step_record(step))
    status.absorb({"step": 40, "event": "start", "attempt": 2, "time": 2_000.0})
    assert status.line() == "step 40/100  waiting for the first step"


def test_each_record_is_seen_once_and_old_segments_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.reporting.metrics.SEGMENT_LINES", 5)
    store = open_store(str(tmp_path))
    with writer_for(store) as writer:
        for step in range(1, 13):
            writer.write(step_record(step))
    reads = []
    original = type(store).read
    monkeypatch.setattr(type(store), "read", lambda self, path: reads.append(path) or original(self, path))
    tail = Tail(store)
    assert [record["step"] for record in tail.poll()] == [11, 12]
    assert reads == ["metrics/00000011-1.jsonl"]
    assert tail.poll() == [] and len(reads) == 1
    with writer_for(store, attempt=2) as writer:
        writer.write(step_record(11))
        writer.flush()
        first = tail.poll()
        writer.write(step_record(12))
        writer.flush()
    assert [[record["step"] for record in records] for records in (first, tail.poll())] == [[11], [12]]


def test_a_run_that_begins_after_the_first_look_is_read_in_full(tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.reporting.metrics.SEGMENT_LINES", 2)
    store = open_store(str(tmp_path))
    tail = Tail(store)
    assert tail.poll() == []
    with writer_for(store) as writer:
        for step in range(1, 6):
            writer.write(step_record(step))
    assert [record["step"] for record in tail.poll()] == [1, 2, 3, 4, 5]


def test_what_a_failure_of_the_storage_cut_off_comes_with_the_next_call(tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.reporting.metrics.SEGMENT_LINES", 2)
    store = open_store(str(tmp_path))
    with writer_for(store) as writer:
        for step in range(1, 6):
            writer.write(step_record(step))
    original, reads = type(store).read, itertools.count(1)

    def unreliable(self, path):
        if next(reads) == 2:
            raise StorageError("no route to host")
        return original(self, path)

    monkeypatch.setattr(type(store), "read", unreliable)
    tail = Tail(store, whole=True)
    with pytest.raises(StorageError):
        tail.poll()
    assert [record["step"] for record in tail.poll()] == [1, 2, 3, 4, 5]


def follow(store, terminal):
    """The output for a run of four steps and a validation that another attempt began."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=160, soft_wrap=True)
    with writer_for(store) as writer:
        writer.write({"step": 0, "event": "start", "world_size": 2})
        writer.write(step_record(1))
    with Progress(store, 4, console=console, poll_seconds=NEVER), writer_for(store, 2) as writer:
        writer.write({"step": 1, "event": "start", "world_size": 1})
        for step in range(2, 5):
            writer.write(step_record(step))
        writer.write(validation_record(4, 1.75))
    return output.getvalue()


def test_a_run_is_told_to_its_end_once(tmp_path):
    text = follow(open_store(str(tmp_path)), terminal=False)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "step 1: going on with 1 worker, attempt 2"
    assert lines[1].startswith("step 4: validation 1.750 bits per byte")
    assert lines[2].startswith("step 4/4  loss 4.000  validation 1.750 bits/byte")
    assert len(lines) == 3


def test_in_a_terminal_the_line_is_live(tmp_path):
    text = follow(open_store(str(tmp_path)), terminal=True)
    assert "\x1b[?25l" in text  # the cursor is hidden while the line is redrawn
    assert "going on with 1 worker" in text and "step 4/4" in text


def test_a_storage_that_does_not_answer_ends_neither_the_view_nor_the_run(tmp_path, monkeypatch, caplog):
    store = open_store(str(tmp_path))
    outages = itertools.chain([True], itertools.repeat(False))
    original = type(store).list

    def unreliable(self, prefix=""):
        if next(outages):
            raise StorageError("no route to host")
        return original(self, prefix)

    monkeypatch.setattr(type(store), "list", unreliable)
    text = follow(store, terminal=False)
    assert "no route to host" in caplog.text
    assert "step 4/4" in text
