"""The main job as `ray job submit` runs it: from an upload, stopped, its head killed, and submitted again each time."""

import re
import time

import pytest

from cluster.storage.uris import open_store
from tests.ray_nodes import RayNodes, kill_node
from tests.small_run import SmallRun, put_corpus, reached, tell_costs
from tests.unbroken import assert_as_unbroken
from trainers.reporting.metrics import events_of, read_attempts

pytestmark = pytest.mark.cluster
CHANGES = {"run__steps": 400, "batch__rows_per_step": 16}


def test_a_submitted_job_goes_on_after_a_stop_and_after_kill_9_of_the_head(tmp_path):
    run = SmallRun(str(tmp_path), tmp_path / "log.txt")
    put_corpus(open_store(f"{run.root}/raw"))
    store = open_store(f"{run.root}/runs/pretrain")
    # The entrypoint as users write it: the cluster's python, a path in the uploaded folder.
    entrypoint = [
        "python",
        "trainers/pretrain.py",
        *run.command(**CHANGES)[2:],
    ]
    with RayNodes(tmp_path / "nodes.txt") as nodes:
        head = nodes.start_head(num_cpus=2)
        nodes.submit("first", "--no-wait", entrypoint=entrypoint)
        wait_for_step(nodes, store, 10, "first")
        nodes.job("stop", "first")
        stopped_at = reached(store)
        assert stopped_at < CHANGES["run__steps"]
        assert "was stopped" in nodes.job("status", "first")

        nodes.submit("second", "--no-wait", entrypoint=entrypoint)
        wait_for_step(nodes, store, stopped_at + 40, "second")
        kill_node(head)
        nodes.start_head(num_cpus=2)
        printed = nodes.submit("third", entrypoint=entrypoint)
    assert re.search(r"third' succeeded", printed), printed
    tell_costs(store)
    starts = events_of(read_attempts(store), "start")
    assert [start["step"] for start in starts][:2] == [0, stopped_at], "a stop lost a step, or did one twice"
    assert len(starts) == 3 and starts[2]["step"] > stopped_at, (
        "the killed head's checkpoints were not gone on from"
    )
    assert reached(store) == CHANGES["run__steps"]
    assert_as_unbroken(store, run, **CHANGES)
    assert store.exists("test.json")


def wait_for_step(nodes: RayNodes, store, step: int, name: str, seconds: float = 300.0) -> None:
    ends = time.monotonic() + seconds
    while reached(store) < step:
        assert time.monotonic() < ends, nodes.job("logs", name)
        time.sleep(0.1)
