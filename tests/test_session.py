"""What a run's own Ray session is like, in a process of its own: only one fits into a process."""

import json
import subprocess
import sys

import pytest

from cluster.session import PROJECT

ASK = """
import json, time
import ray
from ray.util.state import get_actor
from cluster.session import ClusterConfig, ray_session

@ray.remote
def ask():
    began, error = time.monotonic(), None
    try:
        get_actor("0" * 32, timeout=10)
    except Exception as caught:
        error = [each.__name__ for each in type(caught).__mro__]
    return {"error": error, "seconds": time.monotonic() - began}

with ray_session(ClusterConfig(address="local")):
    print(json.dumps(ray.get(ask.remote())))
"""


@pytest.mark.cluster
def test_who_asks_the_dashboard_that_a_local_session_lacks_is_refused_at_once() -> None:
    """Ray Train's watcher of its controller asks once a second, and each end of a worker group waits for it."""
    command = [sys.executable, "-c", ASK]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    answer = json.loads(result.stdout.splitlines()[-1])
    assert "RayStateApiException" in answer["error"], "the only error that the watcher takes"
    assert answer["seconds"] < 10, "it looked for the dashboard's address"
