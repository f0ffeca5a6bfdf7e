"""What a session is like, in a process of its own: only one fits into a process."""

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import session
from cluster.config import ConfigError
from cluster.session import PROJECT, ray_session
from cluster.workers import ClusterConfig
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
    policies = getattr(os, "sched_getscheduler", lambda pid: None)
    return {"error": error, "seconds": time.monotonic() - began, "policy": policies(0)}

with ray_session(ClusterConfig(address="local")):
    print(json.dumps(ray.get(ask.remote())))
"""


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
    """What a task of a local session finds."""
    command = [sys.executable, "-c", ASK]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.cluster
def test_who_asks_the_dashboard_that_a_local_session_lacks_is_refused_at_once(answer: dict[str, Any]) -> None:
    """Ray Train's watcher of its controller asks once a second, and each end of a worker group waits for it."""
    assert "RayStateApiException" in answer["error"], "the only error that the watcher takes"
    assert answer["seconds"] < 10, "it looked for the dashboard's address"


@pytest.mark.cluster
@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux has it")
def test_processes_of_a_local_session_are_of_the_batch_class(answer: dict[str, Any]) -> None:
    assert answer["policy"] == os.SCHED_BATCH


@pytest.mark.parametrize("refuses", [False, True])
def test_who_starts_them_is_scheduled_as_before_also_where_the_kernel_refuses(
    refuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = [0]

    def set_scheduler(pid: int, policy: int, parameters: object) -> None:
        if refuses:
            raise OSError(22, "Invalid argument")  # as gVisor answers
        policies.append(policy)

    monkeypatch.setattr(os, "SCHED_OTHER", 0, raising=False)
    monkeypatch.setattr(os, "SCHED_BATCH", 3, raising=False)
    monkeypatch.setattr(os, "sched_param", lambda priority: None, raising=False)
    monkeypatch.setattr(os, "sched_getscheduler", lambda pid: policies[-1], raising=False)
    monkeypatch.setattr(os, "sched_setscheduler", set_scheduler, raising=False)
    with session.giving_way():
        inside = policies[-1]
    assert (inside, policies[-1]) == (0 if refuses else 3, 0)


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
