"""Nodes of a Ray cluster in processes of their own, that come, drain and die as machines do."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.sessions.session import NO_DASHBOARD, PROJECT

RAY = str(Path(sys.executable).with_name("ray"))
READY_SECONDS = 180.0


@dataclass(frozen=True)
class Place:
    """Where a node runs: on this machine's loopback, or on a host of its own, whose commands have a prefix."""

    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()


HERE = Place()


class RayNodes:
    """A head and, joined to it, worker nodes; all end with the with-block.

    Args:
        log: File that the nodes print into.
        drain_seconds: How long a node that was told to end waits for its workers to leave.
        settings: Environment variables of all nodes and of what speaks to them.
        head: Where the head runs.
    """

    def __init__(
        self,
        log: Path,
        drain_seconds: float = 1.0,
        settings: Mapping[str, str] | None = None,
        head: Place = HERE,
    ) -> None:
        self._log, self._drain_seconds, self._settings = log, drain_seconds, dict(settings or {})
        self._head = head
        self.port, self.dashboard_port, self.metrics_port = free_ports(3)
        self.nodes: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        """Of the cluster, for `cluster.address` and `RAY_ADDRESS`."""
        return f"{self._head.address}:{self.port}"

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted."""
        return f"http://{self._head.address}:{self.dashboard_port}"

    def scrape(self) -> list[str]:
        """What Prometheus gets from the head: metrics of its processes, drivers on it among them."""
        with urllib.request.urlopen(f"http://{self._head.address}:{self.metrics_port}/metrics") as answer:
            text: str = answer.read().decode()
        return [line for line in text.splitlines() if not line.startswith("#")]

    @property
    def environment(self) -> dict[str, str]:
        """For processes that speak to the cluster: this Python leads the path; the token is that of all tests."""
        folder = str(Path(sys.executable).parent)
        own = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # nodes join it, also where they are processes of one machine
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(self._drain_seconds),
        }
        return os.environ | own | self._settings

    def start_head(self, num_cpus: int, takes_jobs: bool = True) -> subprocess.Popen[bytes]:
        """Start the head, and wait until it takes jobs; where none are submitted it needs no dashboard, which is ten
        processes more."""
        options: dict[str, Any] = {"port": self.port, "metrics-export-port": self.metrics_port}
        if takes_jobs:
            options |= {"dashboard-host": self._head.address, "dashboard-port": self.dashboard_port}
        else:
            options["include-dashboard"] = "false"
            self._settings |= NO_DASHBOARD
        flags = [f"--{key}={value}" for key, value in options.items()]
        head = self._start("--head", *flags, cpus=num_cpus, place=self._head)
        if takes_jobs:
            wait_for_port((self._head.address, self.dashboard_port), head, self._log)
        return head

    def add(self, num_cpus: int, place: Place = HERE) -> subprocess.Popen[bytes]:
        """Start a node that joins the head."""
        return self._start(f"--address={self.address}", cpus=num_cpus, place=place)

    def job(self, verb: str, *arguments: str, place: Place = HERE, check: bool = True) -> str:
        """Run `ray job VERB`, from `place`; what it printed. With `check` it fails with that if the command does."""
        command = [*place.prefix, RAY, "job", verb, "--address", self.dashboard, *arguments]
        done = subprocess.run(
            command, cwd=PROJECT, env=self.environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, name: str, *flags: str, entrypoint: Sequence[str], **how: Any) -> str:
        """Submit the project's folder, as the README has it; what was printed. `how` is for `job`."""
        options = ["--submission-id", name, "--working-dir", ".", *flags]
        waits = ["--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}']
        return self.job("submit", *options, *waits, "--", *entrypoint, **how)

    def _num_up(self) -> int:
        """Nodes that said that they stay."""
        return (
            self._log.read_text(errors="replace").count("will now block forever") if self._log.exists() else 0
        )

    def _start(self, *flags: str, cpus: int, place: Place) -> subprocess.Popen[bytes]:
        """Start a node and wait until it stands: two that start at once take the same sockets."""
        num_up = self._num_up()
        options = {
            "dashboard-agent-listen-port": free_ports(1)[0],
            "node-ip-address": place.address,
            "num-cpus": cpus,
            "object-store-memory": 300_000_000,
        }
        if "--head" in flags:
            options["temp-dir"] = self._folder.name
        with open(self._log, "ab") as file:
            node = subprocess.Popen(
                [*place.prefix, RAY, "start", "--block", "--disable-usage-stats", *flags]
                + [f"--{key}={value}" for key, value in options.items()],
                stdout=file,
                stderr=file,
                env=self.environment,
                process_group=0,  # in a session of its own Linux can give it so little CPU that Ray gives it up
            )
        self.nodes.append(node)
        ends = time.monotonic() + READY_SECONDS
        while self._num_up() == num_up:
            assert node.poll() is None and time.monotonic() < ends, self._log.read_text(errors="replace")
            time.sleep(0.2)
        return node

    def __enter__(self) -> "RayNodes":
        # Sockets lie in it, and their paths have at most 107 characters.
        self._folder = tempfile.TemporaryDirectory(prefix="ray")
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes):
            kill_node(node)
        self._folder.cleanup()


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """What a power cut does: kill -9 of all that runs on a node."""
    if node.poll() is None:
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
    node.wait()


def kill_raylet(node: subprocess.Popen[bytes]) -> None:
    """kill -9 of the process that a node's others hang on; they find out themselves."""
    [raylet] = [each for each in psutil.Process(node.pid).children(recursive=True) if each.name() == "raylet"]
    raylet.kill()


def spent_seconds(lines: list[str], run: str) -> dict[str, float]:
    """Where the time of a run went, by part, as scraped."""
    pattern = rf'ray_pretrain_spent_seconds\{{.*part="(\w+)".*run="{run}".*\}} (\S+)'
    return {match[1]: float(match[2]) for match in (re.match(pattern, line) for line in lines) if match}


def free_ports(number: int) -> list[int]:
    """Ports for servers that start soon. From 32,768 Linux gives ports to clients: one that asks for a server of this
    machine before it listens can get that very port and speak to itself, and the server never gets it. Ray's workers
    take those below 20,000, the S3 server those beside these."""
    with contextlib.ExitStack() as sockets:
        ports: list[int] = []
        while len(ports) < number:
            each, port = sockets.enter_context(socket.socket()), random.randrange(23_000, 30_000)
            with contextlib.suppress(OSError):
                each.bind(("127.0.0.1", port))
                ports.append(port)
        return ports


def wait_for_port(address: tuple[str, int], process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + READY_SECONDS
    while True:
        assert process.poll() is None, log.read_text(errors="replace")
        try:
            return socket.create_connection(address, timeout=1).close()
        except OSError:
            assert time.monotonic() < ends, log.read_text(errors="replace")
            time.sleep(0.2)
