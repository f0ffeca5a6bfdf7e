"""A pretraining run small enough for a test, through the entry that users call, on real text."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import psutil

from cluster.sessions.session import PROJECT
from cluster.storage.uris import Store
from trainers.reporting.metrics import (
    FOLDER,
    events_of,
    parse,
    read_attempts,
    read_metrics,
    segment_attempt,
    steps_of,
)

STEPS = 200  # some seconds: time enough to kill something in the middle
SETTINGS = {
    "run.steps": STEPS,
    "run.prompts": '["The "]',
    "run.log_every_seconds": 2,
    "cluster.cpus_per_worker": 0.75,
    "cluster.threads_per_worker": 1,
    "corpus.fragment_tokens": 4096,
    "corpus.splits.validation": 0.1,
    "corpus.splits.test": 0.1,
    "corpus.tokenizer.vocab_size": 512,
    "batch.seq_len": 64,
    "batch.rows_per_step": 8,
    "order.lanes": 4,
    "order.window_steps": 4,
    "model.hidden_size": 32,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.intermediate_size": 64,
    "model.max_positions": 64,
    "engine.precision": "fp32",
    "engine.micro_batch_rows": 2,
    "checkpoint.every_steps": 10,
    "validation.every_steps": 50,
    "validation.max_rows": 16,
    "schedule.warmup_steps": 4,
}


def put_corpus(store: Store, num_shards: int = 3) -> None:
    """Put Python's own reference documentation, 0.5 MB of English, as JSONL shards."""
    lines = [json.dumps({"id": name, "text": text}) for name, text in sorted(topics.items())]
    for shard in range(num_shards):
        store.put(f"part-{shard}.jsonl", "\n".join(lines[shard::num_shards]).encode())


STARTED: list[subprocess.Popen[bytes]] = []
"""Drivers of all runs; tests/conftest.py ends those that a failed test leaves behind."""


def start_command(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a driver in a process group of its own, from a folder that is not the project's: the log's."""
    with open(log, "ab") as file:
        driver = subprocess.Popen(
            command,
            cwd=log.parent,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    STARTED.append(driver)
    return driver


class Terminal:
    """A command that writes to a terminal, in a process group of its own; it ends with the with-block."""

    def __init__(self, command: Sequence[str]) -> None:
        self._shown, terminal = os.openpty()
        self.driver = subprocess.Popen(command, stdout=terminal, stderr=terminal, process_group=0)
        os.close(terminal)
        self._read: list[bytes] = []
        # Else it would wait once the terminal's buffer is full.
        self._reader = threading.Thread(target=self._show, daemon=True)
        self._reader.start()

    def text(self) -> str:
        """All that it wrote so far."""
        return b"".join(self._read).decode(errors="replace")

    def _show(self) -> None:
        with contextlib.suppress(OSError):  # nobody has it open any more
            while read := os.read(self._shown, 65_536):
                self._read.append(read)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self.driver.poll() is None:
            kill_tree(self.driver.pid)
            self.driver.wait()
        self._reader.join()
        os.close(self._shown)


class SmallRun:
    """One run under `root`, a URI that also holds its corpus; started as often as wanted."""

    def __init__(self, root: str, log: Path) -> None:
        self.root, self._log = root, log

    def command(self, **changes: Any) -> list[str]:
        """The command line; double underscores in the names of changes stand for dots."""
        uris = {
            "corpus.uri": f"{self.root}/raw",
            "corpus.prepared": f"{self.root}/prepared",
            "run.storage": f"{self.root}/runs",
        }
        settings = SETTINGS | uris | {key.replace("__", "."): value for key, value in changes.items()}
        arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        return [sys.executable, str(PROJECT / "trainers" / "pretrain.py"), *arguments]

    def start(self, **changes: Any) -> subprocess.Popen[bytes]:
        """Start the entry."""
        return start_command(self.command(**changes), self._log)

    def finish(self, process: subprocess.Popen[bytes], seconds: float = 240.0) -> int:
        """Wait for the end; the exit status."""
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            raise AssertionError(f"the run did not end in {seconds} s:\n{self.output()[-4000:]}") from None

    def output(self) -> str:
        """All that the driver printed, in all starts."""
        return self._log.read_text(errors="replace")


def steps_by_number(store: Store) -> dict[int, dict[str, Any]]:
    """The run's history: the record of each finished step."""
    return {record["step"]: record for record in steps_of(read_metrics(store))}


def reached(store: Store) -> int:
    """The last step that the metrics show. Of the newest segment alone: who waits asks often, and runs get long."""
    segments = segments_of(store)
    return max(record["step"] for record in parse(store.read(max(segments)[1]))) if segments else 0


def segments_of(store: Store) -> list[tuple[int, str]]:
    """Attempt and path of each segment of the metrics."""
    paths = [info.path for info in store.list(f"{FOLDER}/")]
    return [(attempt, path) for path in paths if (attempt := segment_attempt(path)) is not None]


def wait_for_step(store: Store, step: int, process: subprocess.Popen[bytes], seconds: float = 300.0) -> None:
    """Return once the metrics show that step."""
    ends = time.monotonic() + seconds
    while reached(store) < step:
        assert process.poll() is None, "the run ended before the step was reached"
        assert time.monotonic() < ends, f"step {step} was not reached in {seconds} s"
        time.sleep(0.2)


def wait_for_start(
    store: Store, number: int, process: subprocess.Popen[bytes], seconds: float = 300.0
) -> dict[str, Any]:
    """The event of the run's n-th start of workers."""
    ends = time.monotonic() + seconds
    starts: list[dict[str, Any]] = []
    while len(starts) < number:
        assert process.poll() is None, "the run ended before"
        assert time.monotonic() < ends, f"start {number} did not come in {seconds} s"
        time.sleep(0.2)
        if len({attempt for attempt, _ in segments_of(store)}) >= number:
            starts = events_of(read_attempts(store), "start")
    return starts[number - 1]


def tell_costs(store: Store) -> None:
    """Print what each new start of workers cost: seconds without a new step, and steps done again (`pytest -s`)."""
    attempts = read_attempts(store)
    steps = steps_of(attempts)
    for start in events_of(attempts, "start")[1:]:
        number = start["attempt"]
        before = [record for record in steps if record["attempt"] < number]
        reached = max((r["step"] for r in before), default=0)
        left = max((r["time"] for r in before), default=math.nan)
        own = [record for record in steps if record["attempt"] == number]
        new = min((r["time"] for r in own if r["step"] > reached), default=math.nan)
        again = sum(r["step"] <= reached for r in own)
        print(
            f"start {number}, {start['world_size']} workers: {new - left:.0f} s to the next new step, "
            f"{again} steps done again"
        )


def training_workers(driver_pid: int) -> list[psutil.Process]:
    """The processes of Ray Train's workers under a driver."""
    found = []
    for child in psutil.Process(driver_pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile, or is a zombie
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def listening(pid: int) -> set[str]:
    """Addresses that a process and those below it take connections at."""
    found: set[str] = set()
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {each.laddr.ip for each in process.net_connections() if each.status == "LISTEN"}
    return found


def kill_tree(pid: int) -> None:
    """kill -9 a process and everything that it started."""
    parent = psutil.Process(pid)
    for process in [parent, *parent.children(recursive=True)]:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
