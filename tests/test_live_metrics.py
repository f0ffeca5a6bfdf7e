import io
import json
import math
import re
import subprocess
import sys
import threading
import time

import pytest

from cluster.sessions.session import PROJECT
from cluster.storage.uris import open_store
from k8s.check import K8S
from tests.ray_nodes import RayNodes, spent_seconds
from trainers.reporting.goodput import goodput_of
from trainers.reporting.live_metrics import (
    COUNTERS,
    GAUGES,
    DriverLog,
    LiveMetrics,
    Productive,
    event_log,
    readings,
)
from trainers.reporting.metrics import MetricsWriter
from trainers.reporting.watching import SCRAPE_SECONDS_VARIABLE

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


def test_a_step_sets_its_gauges() -> None:
    found = dict(readings(STEP))
    assert found["loss"] == 2.5
    assert found["learning_rate"] == 0.1
    assert found["last_step_timestamp_seconds"] == 1e9
    assert "mfu" not in found
    assert "nonfinite_losses" not in found
    assert found.keys() <= GAUGES.keys() | COUNTERS.keys()


def test_a_loss_that_is_no_number_is_counted_and_not_shown() -> None:
    found = dict(readings({**STEP, "loss": math.nan, "grad_norm": math.inf}))
    assert found["nonfinite_losses"] == 1
    assert not {"loss", "grad_norm"} & found.keys()


def attempt(number: int, first: int, last: int, checkpoints: list[int]) -> list[dict]:
    """Records of an attempt that goes on after step `first`, each step a little longer than the one before."""
    records = [{"event": "start", "step": first, "attempt": number, "time": 100.0 * number}]
    for step in range(first + 1, last + 1):
        seconds = 2.0 + 0.1 * step
        at = {"step": step, "attempt": number, "time": 100.0 * number + step}
        records.append({**STEP, **at, "step_seconds": seconds})
        if step in checkpoints:
            records.append({**at, "event": "checkpoint", "name": f"step-{step}"})
    return records


def test_a_step_done_again_counts_once_as_in_the_accounts_of_the_run() -> None:
    attempts = [attempt(1, 0, 9, [4]), attempt(2, 4, 6, []), attempt(3, 4, 12, [8, 12])]
    live = 0.0
    for records in attempts:
        productive = Productive()
        live += sum(productive.committed(record) for record in records)
    assert live == pytest.approx(goodput_of([r for records in attempts for r in records]).training)


@pytest.mark.parametrize("checkpoints", [[4], [1, 3, 5], [2, 9]])
def test_start_up_within_steps_counts_as_in_the_accounts_of_the_run_whenever_a_checkpoint_comes(
    checkpoints,
) -> None:
    records = [{"event": "start", "step": 0, "attempt": 1, "time": 0.0}]
    for number in range(1, 10):
        seconds = 40.0 if number == 1 else 2.0
        compiling = {1: 20.0, 5: 0.5}.get(number, 0.0)
        at = {"step": number, "attempt": 1, "time": 100.0 + number}
        records.append({**STEP, **at, "step_seconds": seconds + compiling, "compile_seconds": compiling})
        if number in checkpoints:
            records.append({**at, "event": "checkpoint", "name": f"step-{number}"})
    productive, last = Productive(), max(checkpoints)
    live = sum(productive.committed(record) for record in records)
    held = [record for record in records if record["step"] <= last]
    assert live == pytest.approx(goodput_of(held).training) == pytest.approx(last * 1.25)


def test_steps_after_the_one_that_a_checkpoint_holds_wait_for_the_next() -> None:
    late = {"event": "checkpoint", "step": 1, "attempt": 1, "time": 1.0}
    productive = Productive()
    steps = [{**STEP, "step": step} for step in (1, 2, 3)]
    assert [productive.committed(record) for record in [*steps, late]] == [0, 0, 0, 1.25]
    assert productive.committed({**late, "step": 3}) == 2.5


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
        (  # started anew by a driver that asked at 2, from what was saved at 3
            {"event": "start", "asked": 2.0, "saved": 3.0},
            {"last_step_timestamp_seconds": 5.0, "last_checkpoint_timestamp_seconds": 3.0},
        ),
        (  # the first group of a driver that came long after that
            {"event": "start", "asked": 4.0, "saved": 3.0},
            {"last_step_timestamp_seconds": 5.0, "last_checkpoint_timestamp_seconds": 4.0},
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


def test_the_driver_tells_events_in_the_same_words_and_only_where_it_is_asked_to() -> None:
    told, silent = io.StringIO(), io.StringIO()
    DriverLog("first", log_events=True, stream=told)("grow", attempt=2, step=7, workers=16)
    DriverLog("first", log_events=False, stream=silent)("grow", attempt=2, step=7, workers=16)
    line = json.loads(told.getvalue())
    assert line.pop("time") > 0
    expected = {"run": "first", "attempt": 2, "worker": "driver", "step": 7, "event": "grow", "workers": 16}
    assert line == expected
    assert silent.getvalue() == ""


def tell_of_a_short_run(uri: str) -> None:
    """What worker 0 of a run tells, each kind of record once; for as long as its process is left alive.

    Beside it a run that has just begun, and has told nothing.
    """
    with (
        LiveMetrics("begun"),
        LiveMetrics("scraped") as live,
        MetricsWriter(open_store(uri), 1, observers=[live.observe]) as writer,
    ):
        now = time.time()
        writer.write({"step": 0, "event": "start", "asked": now - 30, "began": now - 10})
        told = {key: value for key, value in STEP.items() if key not in ("step", "attempt", "time")}
        writer.write({"step": 1, **told, "mfu": 0.5})
        writer.write({"step": 2, **told, "loss": math.nan})
        writer.write({"step": 2, "event": "skipped", "reason": "its loss"})
        writer.write({"step": 2, "validation": {"loss": 2.0, "seconds": 3.0}})
        writer.write({"step": 2, "event": "checkpoint", "name": "step-2"})
        threading.Event().wait()


PROGRAM = """
import sys, time
import ray
from cluster.storage.uris import open_store
from tests.test_live_metrics import tell_of_a_short_run
from trainers.reporting.live_metrics import DriverLog, LiveGoodput
ray.init(logging_level="ERROR")
worker = ray.remote(num_cpus=0)(tell_of_a_short_run).remote(sys.argv[1])
with LiveGoodput("scraped", open_store(sys.argv[1]), time.time):
    DriverLog("scraped", log_events=False)("finished")
"""


@pytest.mark.cluster
def test_what_alerts_and_dashboard_ask_for_stands_where_prometheus_scrapes(tmp_path) -> None:
    folder = K8S / "components" / "monitoring"
    text = (folder / "rules.yaml").read_text() + (folder / "pretraining.json").read_text()
    wanted = set(re.findall(r"\bray_(?:pretrain|node)_\w+", text))
    with RayNodes(tmp_path / "nodes.txt") as nodes:
        nodes.start_head(num_cpus=1)
        own = {"RAY_ADDRESS": nodes.address, "PYTHONPATH": str(PROJECT), SCRAPE_SECONDS_VARIABLE: "600"}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run")]
        with subprocess.Popen(command, env=nodes.environment | own) as driver:
            ends = time.monotonic() + 90
            while True:
                lines = nodes.scrape()
                missing = wanted - {re.split(r"[ {]", line)[0] for line in lines}
                spent = spent_seconds(lines, "scraped")
                if not missing and spent.get("validating"):
                    break
                assert driver.poll() is None and time.monotonic() < ends, (missing, spent)
                time.sleep(1)
            driver.kill()
    counted = {re.split(r"[ {]", line)[0]: float(line.split()[-1]) for line in lines if 'run="begun"' in line}
    assert counted == {f"ray_pretrain_{name}_total": pytest.approx(0.0) for name in COUNTERS}
    assert spent["waiting_for_nodes"] == pytest.approx(20.0, abs=0.1)
    assert (spent["data_wait"], spent["validating"]) == (1.0, 3.0)
    assert spent["starting"] > 0 and spent["recomputed"] == 0
