"""Faults of a run's storage and of its workers at the worst moments: no row is lost, and none trained twice."""

import os
import random
import signal
import subprocess
import time
import uuid

import pytest

from cluster.local_s3 import LocalS3
from cluster.storage.uris import Store, open_store
from data.shards.manifest import read_manifest
from tests.fault_proxy import FaultProxy
from tests.small_run import (
    SmallRun,
    put_corpus,
    steps_by_number,
    tell_costs,
    training_workers,
    wait_for_start,
    wait_for_step,
)
from tests.unbroken import assert_as_unbroken
from trainers.checkpoints.commit import RECORD
from trainers.recovery.stopping import STOP
from trainers.reporting.metrics import events_of, read_attempts, steps_of, validations_of

pytestmark = pytest.mark.cluster

# More steps than there is time for: a run is asked to stop in the end.
ENDLESS = {"run__steps": 100_000, "run__max_failures": -1, "cluster__num_workers": 2}
FAULTS = ("503", "500", "reset", "lost", "truncate", "slow")


@pytest.fixture
def proxied(tmp_path):
    """A run on an S3 server that it reaches through a proxy, its folder as reached directly, and the proxy."""
    with LocalS3(tmp_path / "s3") as server, FaultProxy(server.port) as proxy:
        run = SmallRun(f"s3://corpus/{uuid.uuid4().hex}", tmp_path / "log.txt")
        put_corpus(open_store(f"{run.root}/raw"))
        store = open_store(f"{run.root}/runs/pretrain")
        # Undone before the server's own variables are: else they would lead to it when it is gone.
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("AWS_ENDPOINT_URL", proxy.url)
            yield run, store, proxy
        proxy.clear()


def end(run: SmallRun, store: Store, driver: subprocess.Popen[bytes]) -> None:
    """Stop the run; all rows of all its steps must be the order's."""
    store.put(STOP, b"")
    assert run.finish(driver) == 0, run.output()
    tell_costs(store)
    assert_as_unbroken(store, run, **ENDLESS)


def test_a_store_that_fails_cuts_corrupts_and_loses_answers_costs_no_row(proxied):
    run, store, proxy = proxied
    proxy.break_next("corrupt", times=2, method="GET", target="prepared/shards/")
    driver = run.start(**ENDLESS, checkpoint__every_steps=40)
    until(driver, lambda: "survey" in run.output())
    for fault in FAULTS:  # these meet the preparing
        proxy.break_next(fault, times=2)
    reached = 10
    for fault in (*FAULTS, "hang"):
        wait_for_step(store, reached, driver)
        proxy.break_next(fault, times=1 if fault == "hang" else 4)
        reached = max(steps_by_number(store)) + 30
    wait_for_step(store, reached, driver)
    end(run, store, driver)
    assert set(proxy.broken) == {*FAULTS, "corrupt", "hang"}, "a fault did not come to pass"
    assert len(events_of(read_attempts(store), "start")) == 1, "the workers were started anew"


def test_kill_9_of_a_worker_in_an_upload_in_a_validation_and_at_a_random_moment_costs_no_row(proxied):
    run, store, proxy = proxied
    driver = run.start(
        **ENDLESS, checkpoint__every_steps=30, validation__every_steps=10, validation__max_rows=0
    )
    wait_for_step(store, 40, driver)
    proxy.break_next("slow", times=10_000, method="PUT", target="checkpoints/")
    kill(driver, lambda: uncommitted(store))
    proxy.clear()
    second = wait_for_start(store, 2, driver)["attempt"]
    # Only a validation reads these shards: a worker is in one once it hangs there.
    for shard in read_manifest(open_store(f"{run.root}/prepared")).shards:
        if shard.split == "validation":
            proxy.break_next("hang", times=2, method="GET", target=shard.path)
    until(driver, lambda: "hang" in proxy.broken)
    kill(driver, lambda: ends_in_a_validation(store, second))  # once its last steps are on storage too
    proxy.clear()
    wait_for_start(store, 3, driver)
    seed = time.time_ns()
    print(f"moment and worker by random.seed({seed})")
    random.seed(seed)
    time.sleep(random.uniform(0.0, 2.0))
    kill(driver, lambda: True)
    wait_for_start(store, 4, driver)
    wait_for_step(store, max(steps_by_number(store)) + 20, driver)
    end(run, store, driver)
    assert ends_in_a_validation(store, second), "it went on before it was killed"
    assert len(events_of(read_attempts(store), "start")) == 4


def test_a_full_disk_costs_no_row_once_there_is_room_again(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        run = SmallRun(str(disk), tmp_path / "log.txt")
        put_corpus(open_store(f"{run.root}/raw"))
        store = open_store(f"{run.root}/runs/pretrain")
        driver = run.start(**ENDLESS, checkpoint__every_steps=30)
        wait_for_step(store, 40, driver)
        ballast = disk / "ballast"
        with open(ballast, "wb") as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(1 << 16))
        until(driver, lambda: "No space left" in run.output())
        ballast.unlink()
        before = max(steps_by_number(store))
        wait_for_step(store, before + 60, driver)
        end(run, store, driver)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def ends_in_a_validation(store: Store, attempt: int) -> bool:
    """Whether an attempt's last step on record is one that is validated, and its validation is not there."""
    records = [record for record in read_attempts(store) if record["attempt"] == attempt]
    last = max((record["step"] for record in steps_of(records)), default=1)
    return last % 10 == 0 and last not in [record["step"] for record in validations_of(records)]


def uncommitted(store) -> bool:
    """Whether a checkpoint has files and no commit record."""
    found: dict[str, set[str]] = {}
    for info in store.list("checkpoints/"):
        _, name, file = info.path.split("/", 2)
        found.setdefault(name, set()).add(file)
    return any(RECORD not in files for files in found.values())


def until(driver: subprocess.Popen[bytes], condition, seconds: float = 120.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert driver.poll() is None, "the run ended"
        assert time.monotonic() < ends
        time.sleep(0.02)


def kill(driver: subprocess.Popen[bytes], moment) -> None:
    until(driver, moment)
    os.kill(random.choice(training_workers(driver.pid)).pid, signal.SIGKILL)
