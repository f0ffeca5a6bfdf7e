import io
import json
import math

import pytest

from trainers.live_metrics import COUNTERS, GAUGES, event_log, readings

STEP = {
    "step": 3,
    "attempt": 2,
    "time": 1e9,
    "loss": 2.5,
    "lr": 0.1,
    "grad_norm": 1.5,
    "tokens": 1000,
    "step_seconds": 2.0,
    "data_wait_seconds": 0.5,
    "checkpoint_stall_seconds": 0.25,
    "tokens_per_second": 500.0,
    "mfu": None,
    "memory_bytes": 7,
    "epoch": 0,
    "digest": "ab",
}


def test_a_step_sets_its_gauges_and_adds_its_seconds() -> None:
    found = dict(readings(STEP))
    assert found["loss"] == 2.5
    assert found["learning_rate"] == 0.1
    assert found["productive_seconds"] == 2.0 - 0.5 - 0.25
    assert found["last_step_timestamp_seconds"] == 1e9
    assert "mfu" not in found
    assert "nonfinite_losses" not in found
    assert found.keys() <= GAUGES.keys() | COUNTERS.keys()


def test_a_loss_that_is_no_number_is_counted_and_not_shown() -> None:
    found = dict(readings({**STEP, "loss": math.nan, "grad_norm": math.inf}))
    assert found["nonfinite_losses"] == 1
    assert not {"loss", "grad_norm"} & found.keys()


def test_the_seconds_of_a_step_are_all_accounted_for() -> None:
    found = dict(readings(STEP))
    kinds = ("productive_seconds", "data_wait_seconds", "checkpoint_stall_seconds")
    assert sum(found[kind] for kind in kinds) == STEP["step_seconds"]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"event": "checkpoint", "name": "step-3"},
            {"checkpoints": 1.0, "last_checkpoint_timestamp_seconds": 5.0},
        ),
        ({"event": "skipped"}, {"skipped_steps": 1.0}),
        (
            {"event": "start"},
            {"last_step_timestamp_seconds": 5.0, "last_checkpoint_timestamp_seconds": 5.0},
        ),
        ({"validation": {"loss": 3.0}}, {"validation_loss": 3.0}),
    ],
)
def test_events_and_validations_set_what_belongs_to_them(record, expected) -> None:
    found = dict(readings({"step": 3, "attempt": 1, "time": 5.0, **record}))
    assert found == {"step": 3, "attempt": 1, **expected}


def test_every_event_is_one_line_with_run_attempt_worker_and_step_and_steps_are_none() -> None:
    stream = io.StringIO()
    log = event_log("first", worker=0, stream=stream)
    log(STEP)
    log({"step": 4, "attempt": 2, "time": 1.0, "event": "skipped", "reason": "a\nb", "norm": math.inf})
    (line,) = stream.getvalue().splitlines()
    found = json.loads(line)
    assert {key: found[key] for key in ("run", "attempt", "worker", "step")} == {
        "run": "first",
        "attempt": 2,
        "worker": 0,
        "step": 4,
    }
    assert found["norm"] is None
