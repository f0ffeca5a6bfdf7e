"""The main job as `ray job submit` runs it: on a head started apart, from an upload, stopped and submitted again."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.session import PROJECT
from cluster.storage import open_store
from tests.small_run import STEPS, SmallRun, put_corpus, steps_by_number
from trainers.metrics import events_of, read_attempts

pytestmark = pytest.mark.cluster
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[str]:
    """The address of the dashboard of a Ray head with two CPUs, in processes of their own."""
    ports = free_ports(3)
    # Sockets lie in its temporary folder, and their paths have at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        options = {
            "port": ports[0],
            "dashboard-port": ports[1],
            "dashboard-agent-listen-port": ports[2],
            "node-ip-address": "127.0.0.1",
            "num-cpus": 2,
            "object-store-memory": 500_000_000,
            "temp-dir": folder,
        }
        flags = [f"--{key}={value}" for key, value in options.items()]
        log = tmp_path_factory.mktemp("head") / "log.txt"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [RAY, "start", "--head", "--block", "--disable-usage-stats", *flags],
                stdout=file,
                stderr=file,
                env=environment(),
            )
        try:
            wait_for_port(ports[1], process, log)
            yield f"http://127.0.0.1:{ports[1]}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def test_a_submitted_job_stopped_and_submitted_again_trains_every_step_once(head, tmp_path):
    run = SmallRun(str(tmp_path), tmp_path / "log.txt")
    put_corpus(open_store(f"{run.root}/raw"))
    store = open_store(f"{run.root}/runs/pretrain")
    # The entrypoint as users write it: the cluster's python, a path in the uploaded folder.
    entrypoint = ["python", "trainers/pretrain.py", *run.command()[2:]]

    submit(head, "first", "--no-wait", entrypoint=entrypoint)
    ends = time.monotonic() + 180
    while max(steps_by_number(store), default=0) < 10:
        assert time.monotonic() < ends, job(head, "logs", "first")
        time.sleep(0.2)
    job(head, "stop", "first")
    stopped_at = max(steps_by_number(store))
    assert stopped_at < STEPS
    assert "was stopped" in job(head, "status", "first")

    printed = submit(head, "second", entrypoint=entrypoint)
    assert re.search(r"second' succeeded", printed), printed
    starts = events_of(read_attempts(store), "start")
    assert [start["step"] for start in starts] == [0, stopped_at], "a step was lost or done twice"
    assert sorted(steps_by_number(store)) == list(range(1, STEPS + 1))
    assert store.exists("test.json")


def submit(address: str, name: str, *flags: str, entrypoint: list[str]) -> str:
    """Submit the project's folder, as the README has it; what was printed."""
    options = ["--submission-id", name, "--working-dir", ".", *flags]
    waits = ["--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}']
    return job(address, "submit", *options, *waits, "--", *entrypoint)


def job(address: str, verb: str, *arguments: str) -> str:
    """Run `ray job VERB`; what it printed. It fails with that if the command does."""
    command = [RAY, "job", verb, "--address", address, *arguments]
    done = subprocess.run(
        command, cwd=PROJECT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def environment() -> dict[str, str]:
    folder = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",  # the head ends with the tests, not 30 s later
    }


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path, seconds: float = 90.0) -> None:
    ends = time.monotonic() + seconds
    while True:
        assert process.poll() is None, log.read_text()
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.2)
