"""A host whose clock is wrong: rows, accounts, checkpoints and who drives are as on one whose clock is right."""

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.sessions.session import PROJECT
from cluster.storage.uris import open_store
from tests.ray_nodes import HERE, Place, RayNodes
from tests.small_run import (
    SmallRun,
    put_corpus,
    steps_by_number,
    tell_costs,
    wait_for_start,
    wait_for_step,
)
from tests.unbroken import assert_as_unbroken
from trainers.checkpoints.commit import read_record
from trainers.checkpoints.keeping import committed
from trainers.recovery.clock import TOLERANCE_SECONDS, RunClock
from trainers.recovery.stopping import STOP
from trainers.reporting.goodput import goodput_of
from trainers.reporting.metrics import events_of, read_attempts


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [-600, 7200])
def test_a_wrong_clock_tells_the_stores_time(tmp_path, seconds):
    program = "import sys, time; from cluster.storage.uris import open_store; "
    program += "from trainers.recovery.clock import RunClock\n"
    program += "print(time.time(), RunClock(open_store(sys.argv[1])).now())"
    place = with_python_off_by(seconds, tmp_path / "clock")
    command = [*place.prefix, sys.executable, "-c", program, str(tmp_path)]
    said = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split()
    own, told = map(float, said)
    assert own - time.time() == pytest.approx(seconds, abs=30)
    assert told == pytest.approx(time.time(), abs=30)


def test_a_clock_that_differs_by_less_than_the_store_can_tell_is_left_alone(tmp_path):
    class Behind(type(open_store(str(tmp_path)))):
        def clock(self) -> float:
            return math.floor(time.time()) - 0.9 * (TOLERANCE_SECONDS - 1)

    assert abs(RunClock(Behind(f"file://{tmp_path}")).now() - time.time()) < 0.1


def test_a_worker_whose_store_is_away_at_first_has_begun_when_it_asked(tmp_path):
    class Away(type(open_store(str(tmp_path)))):
        def clock(self) -> float:
            time.sleep(0.3)
            return time.time()

    asked = time.time()
    clock = RunClock(Away(f"file://{tmp_path}"))
    assert clock.started == pytest.approx(asked, abs=0.1)
    assert clock.now() >= asked + 0.3


def with_python_off_by(seconds: int, folder: Path) -> Place:
    """Where a node runs whose Python reads a clock so far ahead. Not faketime: the locks below Ray hand the kernel
    moments of the false clock to wait for, by a way that faketime does not see, and wait for hours."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"import time\nright = time.time\ntime.time = lambda: right() + {seconds}\n"
    )
    return Place(prefix=("env", f"PYTHONPATH={folder}"))


@pytest.mark.cluster
def test_a_worker_on_a_host_whose_clock_is_hours_off_costs_no_row_and_the_accounts_stay_true(
    tmp_path, monkeypatch
):
    wrong = with_python_off_by(7200, tmp_path / "clock")
    with RayNodes(tmp_path / "nodes.txt", drain_seconds=30.0) as nodes:
        nodes.start_head(num_cpus=0, takes_jobs=False)
        leaving = nodes.add(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        run = SmallRun(str(tmp_path), tmp_path / "log.txt")
        put_corpus(open_store(f"{run.root}/raw"))
        store, began = open_store(f"{run.root}/runs/pretrain"), time.time()
        driver = run.start(run__steps=100_000, checkpoint__every_steps=20, validation__every_steps=100_000)
        wait_for_step(store, 30, driver)
        for number, place in enumerate((wrong, HERE), start=2):
            coming = nodes.add(num_cpus=1, place=place)
            leaving.send_signal(signal.SIGTERM)
            wait_for_start(store, number, driver)
            leaving, reached = coming, max(steps_by_number(store))
            wait_for_step(store, reached + 50, driver)
            if place is wrong:
                assert read_record(store, committed(store)[0]).created > time.time() + 7_000, (
                    "its clock was right"
                )
        store.put(STOP, b"")
        assert run.finish(driver) == 0, run.output()
        ended = time.time()
    tell_costs(store)
    found = steps_by_number(store)
    assert_as_unbroken(store, run, run__steps=100_000)

    records = read_attempts(store)
    assert [event["step"] for event in events_of(records, "start")][1:] == sorted(
        {event["step"] for event in events_of(records, "start")} - {0}
    )
    assert all(began < record["time"] < ended for record in records)
    accounts = goodput_of(records)
    assert 0 < accounts.total < ended - began
    assert min(vars(accounts).values()) >= -0.1
    kept = [int(name.split("-")[1]) for name in committed(store)]
    assert kept[0] == max(found) and len(kept) == 2, "the newest checkpoints are not those that were kept"
