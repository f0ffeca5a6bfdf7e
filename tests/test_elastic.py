"""An elastic run on nodes that drain, come and die, and its driver: rows and losses are those of one worker alone."""

import signal
import time
from dataclasses import asdict

import pytest

from cluster.storage.uris import open_store
from tests.ray_nodes import RayNodes, kill_raylet, spent_seconds
from tests.small_run import (
    SmallRun,
    put_corpus,
    tell_costs,
    wait_for_start,
    wait_for_step,
)
from tests.unbroken import assert_as_unbroken
from trainers.recovery.stopping import STOP
from trainers.reporting.goodput import goodput_of
from trainers.reporting.metrics import read_attempts

pytestmark = pytest.mark.cluster

DRAIN_SECONDS = 30.0
# More steps than there is time for: the run is asked to stop in the end.
CHANGES = {
    "run__steps": 100_000,
    "cluster__num_workers": 2,
    "cluster__min_workers": 1,
    "checkpoint__every_steps": 200,
    "validation__every_steps": 1_000,
}


def test_a_run_leaves_a_node_that_drains_grows_with_one_that_comes_and_survives_that_ones_death_and_its_drivers(
    tmp_path, monkeypatch
):
    with RayNodes(tmp_path / "nodes.txt", DRAIN_SECONDS) as nodes:
        nodes.start_head(num_cpus=1)
        drained = nodes.add(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        run = SmallRun(str(tmp_path), tmp_path / "log.txt")
        put_corpus(open_store(f"{run.root}/raw"))
        store = open_store(f"{run.root}/runs/pretrain")
        driver = run.start(**CHANGES)
        assert wait_for_start(store, 1, driver)["world_size"] == 2
        wait_for_step(store, 10, driver)

        drained.send_signal(signal.SIGTERM)  # as Kubernetes ends a pod
        left = wait_for_start(store, 2, driver)
        assert (left["world_size"], left["step"]) == (1, max_step_before(store, 2)), "a step was done twice"
        drained.wait(DRAIN_SECONDS)

        lost = nodes.add(num_cpus=1)
        grown = wait_for_start(store, 3, driver)
        assert (grown["world_size"], grown["step"]) == (2, max_step_before(store, 3)), "a step was done twice"
        wait_for_step(store, grown["step"] + 10, driver)
        kill_raylet(lost)
        alone = wait_for_start(store, 4, driver)
        assert alone["world_size"] == 1
        wait_for_step(store, max_step_before(store, 4) + 10, driver)
        wait_for_accounts(nodes, store)

        second = run.start(**CHANGES)
        assert run.finish(second) == 2, "two drivers drive one run"
        assert f"is being driven by process {driver.pid}" in run.output()
        driver.kill()  # the cluster lives, with the workers that it had asked for
        driver = run.start(**CHANGES)
        again = wait_for_start(store, 5, driver)
        assert (again["world_size"], again["step"]) == (1, int(again["checkpoint"].split("-")[1]))
        wait_for_step(store, max_step_before(store, 5) + 10, driver)
        store.put(STOP, b"")
        assert run.finish(driver) == 0, run.output()
    tell_costs(store)
    assert_as_unbroken(store, run, **CHANGES)


def wait_for_accounts(nodes: RayNodes, store, seconds: float = 60.0) -> None:
    """Return once what is scraped says of the time until now what the records say."""
    parts = ("recomputed", "starting", "waiting_for_nodes", "down")
    kept = asdict(goodput_of(read_attempts(store)))
    assert kept["recomputed"] > 0 and kept["waiting_for_nodes"] > 0
    ends = time.monotonic() + seconds
    while (spent := spent_seconds(nodes.scrape(), "pretrain")) == {} or any(
        abs(spent[part] - kept[part]) > 0.1 for part in parts
    ):
        assert time.monotonic() < ends, (spent, kept)
        time.sleep(1)


def max_step_before(store, attempt: int) -> int:
    """The last step of the attempts before."""
    return max(r["step"] for r in read_attempts(store) if "loss" in r and r["attempt"] < attempt)
