"""What fits on a session's nodes, and what a session is like, in a process of its own: only one fits into a process."""

import json
import os
import re
import secrets
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import session
from cluster.config import ConfigError
from cluster.session import PROJECT, ray_session
from cluster.workers import ClusterConfig, fitting_workers, shortages
from tests.ray_nodes import RayNodes

ASK = """
import json, os, time
import ray
from ray.util.state import get_actor
from cluster.session import ray_session
from cluster.workers import ClusterConfig

@ray.remote
def ask():
    began, error = time.monotonic(), None
    try:
        get_actor("0" * 32, timeout=10)
    except Exception as caught:
        error = [each.__name__ for each in type(caught).__mro__]
    seconds = time.monotonic() - began
    return {"error": error, "seconds": seconds, "policy": os.sched_getscheduler(0)}

with ray_session(ClusterConfig(address="local")):
    print(json.dumps({**ray.get(ask.remote()), "driver's": os.sched_getscheduler(0)}))
"""


@pytest.mark.cluster
def test_a_local_session_refuses_at_once_who_asks_its_dashboard_and_interrupts_no_training() -> None:
    """It has no dashboard: Ray Train's watcher of its controller asks once a second, and each end of a worker group
    waits for it."""
    command = [sys.executable, "-c", ASK]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    answer = json.loads(result.stdout.splitlines()[-1])
    assert "RayStateApiException" in answer["error"], "the only error that the watcher takes"
    assert answer["seconds"] < 10, "it looked for the dashboard's address"
    assert (answer["policy"], answer["driver's"]) == (os.SCHED_BATCH, os.SCHED_OTHER)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:9", "127.0.0.1:9 does not answer: "),
        ("ray://127.0.0.1:9", "ray://127.0.0.1:9 does not answer: "),
        ("head", "head is no address of a Ray head: give host:port, or ray://host:port"),
    ],
)
def test_a_head_that_is_not_there_is_one_line_within_the_time_that_a_starting_one_gets(
    address: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "CONNECT_SECONDS", 0.5)
    for name in session.FEW_TRIES:
        monkeypatch.setenv(name, "1")  # taken back after the test
    began = time.monotonic()
    with pytest.raises(ConfigError) as found, ray_session(ClusterConfig(address=address)):
        pass
    (line,) = found.value.problems
    assert line.startswith(f"cluster.address={address}: {why}") and "\n" not in line
    assert time.monotonic() - began < 30


JOIN = """
import sys
from cluster.config import run_entry
from cluster.session import ray_session
from cluster.workers import ClusterConfig

def main():
    with ray_session(ClusterConfig(address=sys.argv[1])):
        print("in")

run_entry(main)
"""


@pytest.mark.cluster
def test_a_token_that_is_wrong_or_missing_is_one_line_that_says_where_to_give_it(tmp_path: Path) -> None:
    tokens = {"right": secrets.token_hex(32), "wrong": secrets.token_hex(32), "missing": ""}
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": tokens["right"]}
    with RayNodes(tmp_path / "nodes.txt", settings=settings) as nodes:
        nodes.start_head(num_cpus=1)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        clean |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}  # no token of this user's
        started = {}
        for name, token in tokens.items():
            command = [sys.executable, "-c", JOIN, nodes.address]
            own = clean | ({"RAY_AUTH_TOKEN": token} if token else {})
            started[name] = subprocess.Popen(
                command, cwd=PROJECT, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        said = {name: (*each.communicate(timeout=180), each.returncode) for name, each in started.items()}
    assert said["right"][0].splitlines()[-1] == "in" and said["right"][2] == 0, said["right"]
    for name in ("wrong", "missing"):
        out, error, code = said[name]
        assert code == 2 and "in" not in out.splitlines(), said[name]
        (line,) = [line for line in error.splitlines() if line.startswith("cluster.address=")]
        assert "RAY_AUTH_TOKEN" in line and tokens["wrong"] not in line
        assert "Traceback" not in error


@pytest.mark.parametrize(
    ("cluster", "nodes", "fitting"),
    [
        (ClusterConfig(num_workers=2, cpus_per_worker=8), [{"CPU": 4.0}] * 4, 0),
        (ClusterConfig(num_workers=4, cpus_per_worker=3), [{"CPU": 4.0}] * 3, 3),
        (
            ClusterConfig(num_workers=8, cpus_per_worker=8, gpus_per_worker=1),
            [{"CPU": 32.0, "GPU": 8.0}, {"CPU": 96.0}],
            4,
        ),
    ],
)
def test_workers_that_fit_into_the_sum_of_the_nodes_and_on_no_node_are_refused_with_what_fits(
    cluster: ClusterConfig, nodes: list[dict[str, float]], fitting: int
) -> None:
    (line,) = shortages(cluster, nodes)
    assert f"{fitting} fit, for a worker lies on one node" in line
    found = re.search(r"at most cluster\.cpus_per_worker=(\S+) fits", line)
    assert found and not list(shortages(replace(cluster, cpus_per_worker=float(found[1])), nodes))


def placements(workers: int, num_nodes: int):
    """Every way to lay workers on nodes, as how many each gets."""
    return (each for each in product(range(workers + 1), repeat=num_nodes) if sum(each) == workers)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=3),
    st.integers(1, 4),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([0.0, 0.25]),
)
def test_workers_fit_where_there_is_a_way_to_lay_them_on_the_nodes_with_room_to_read_and_nowhere_else(
    sizes: list[tuple[int, int]], workers: int, cpus: float, gpus: float, read_cpus: float
) -> None:
    nodes = [{"CPU": float(cpu), "GPU": float(gpu)} for cpu, gpu in sizes]

    def holds(each: tuple[int, ...]) -> bool:
        left = [node["CPU"] - n * cpus for node, n in zip(nodes, each, strict=True)]
        enough = all(n * gpus <= node["GPU"] for node, n in zip(nodes, each, strict=True))
        return enough and min(left) >= 0 and max(left) >= read_cpus

    config = ClusterConfig(num_workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus)
    fits = any(map(holds, placements(workers, len(nodes))))
    assert (fitting_workers(config, nodes, read_cpus) >= workers) == fits
    assert bool(list(shortages(config, nodes, read_cpus))) != fits
