"""A run under faults: one at a random moment about every minute, then what that cost and whether a row was lost.

    python benchmarks/soak.py [--minutes 20] [--every 60] [--seed 1] [--faults NAME …]     # make soak

A small model trains with two workers on the real S3 server behind a proxy. Faults are drawn from: kill -9 of a worker,
of the driver with all that it started, and of the store for some seconds or a minute; a worker that neither answers nor
ends; a burst of failing, cut, corrupted and lost answers of the store; SIGTERM of the driver. At the end the rows of
every step are compared with those that the order names, and each second is accounted for.
"""

import argparse
import itertools
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster.local_s3 import LocalS3
from cluster.storage.uris import open_store
from tests.fault_proxy import FaultProxy
from tests.small_run import (
    SmallRun,
    kill_tree,
    put_corpus,
    steps_by_number,
    training_workers,
)
from tests.unbroken import expected_digests
from trainers.recovery.stopping import STOP
from trainers.reporting.goodput import goodput_line, goodput_of
from trainers.reporting.metrics import Record, events_of, read_attempts, steps_of
from trainers.reporting.units import duration

OUTAGE_SECONDS = 8.0
UP_AGAIN_SECONDS = 300.0
SETTINGS = {
    "run__steps": 10_000_000,
    "run__max_failures": -1,
    "cluster__num_workers": 2,
    "checkpoint__every_steps": 100,
    "validation__every_steps": 500,
    "heartbeat__timeout_seconds": 15,
    "heartbeat__linger_seconds": 1,
}


class Soak:
    """One run, started again whenever it ended, and the faults that may befall it."""

    def __init__(self, folder: Path, server: LocalS3, proxy: FaultProxy) -> None:
        self._server, self._proxy = server, proxy
        self.run = SmallRun(f"s3://corpus/{uuid.uuid4().hex}", folder / "log.txt")
        put_corpus(open_store(f"{self.run.root}/raw"))
        self.store = open_store(f"{self.run.root}/runs/pretrain")
        os.environ["AWS_ENDPOINT_URL"] = proxy.url  # from here on: what was opened above goes directly
        self.driver = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        return self.run.start(**SETTINGS)

    def keep_up(self, seconds: float) -> None:
        """Let it train; start it again if it ended."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if self.driver.poll() is not None:
                self.driver = self.start()
            time.sleep(0.5)

    def worker_dies(self) -> None:
        self._signal_worker(signal.SIGKILL)

    def worker_hangs(self) -> None:
        self._signal_worker(signal.SIGSTOP)

    def driver_dies(self) -> None:
        kill_tree(self.driver.pid)
        self.driver.wait()

    def driver_is_told_to_end(self) -> None:
        self.driver.send_signal(signal.SIGTERM)

    def store_goes_away(self, seconds: float = OUTAGE_SECONDS) -> None:
        self._server.kill()
        time.sleep(seconds)
        self._server.start()

    def store_is_gone_for_a_minute(self) -> None:
        self.store_goes_away(60.0)

    def store_answers_badly(self) -> None:
        for fault in ("503", "500", "reset", "lost", "truncate", "corrupt", "slow"):
            self._proxy.break_next(fault, times=3)

    def _signal_worker(self, number: signal.Signals) -> None:
        if workers := training_workers(self.driver.pid):
            os.kill(random.choice(workers).pid, number)


FAULTS = (
    "worker_dies",
    "worker_hangs",
    "driver_dies",
    "driver_is_told_to_end",
    "store_goes_away",
    "store_is_gone_for_a_minute",
    "store_answers_badly",
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every", type=float, default=60, help="seconds between two faults, on average")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--faults", nargs="+", choices=FAULTS, default=FAULTS, metavar="NAME", help=", ".join(FAULTS)
    )
    arguments = parser.parse_args(argv)
    random.seed(arguments.seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(LocalS3(folder / "s3"))
        proxy = stack.enter_context(FaultProxy(server.port))
        soak = Soak(folder, server, proxy)
        suffered = suffer(soak, arguments.faults, 60 * arguments.minutes, arguments.every)
        proxy.clear()
        soak.store.put(STOP, b"")
        if soak.run.finish(soak.driver):
            raise SystemExit(soak.run.output()[-4000:])
        attempts = read_attempts(soak.store)
        print_faults(suffered, attempts)
        print_outcome(attempts, soak.run, steps_by_number(soak.store))


@dataclass(frozen=True)
class Suffered:
    """A fault, and when it came to pass, unix time."""

    name: str
    time: float


def suffer(soak: Soak, names: Sequence[str], seconds: float, every: float) -> list[Suffered]:
    """Faults at random moments, and at the end enough peace for a run that is up."""
    began, suffered = time.monotonic(), []
    while (left := seconds - (time.monotonic() - began)) > 0:
        soak.keep_up(min(left, random.uniform(0.5, 1.5) * every))
        name = random.choice(names)
        suffered.append(Suffered(name.replace("_", " "), time.time()))
        print(f"{duration(time.monotonic() - began):>10}  {suffered[-1].name}", flush=True)
        getattr(soak, name)()
    starts = len(events_of(read_attempts(soak.store), "start"))
    ends = time.monotonic() + UP_AGAIN_SECONDS
    soak.driver_is_told_to_end()  # whatever state it is in: the next one is up and whole
    while len(events_of(read_attempts(soak.store), "start")) <= starts:
        soak.keep_up(2)
        if time.monotonic() > ends:
            raise SystemExit(soak.run.output()[-4000:])
    return suffered


def print_faults(suffered: list[Suffered], attempts: list[Record]) -> None:
    """A table by fault: how often, the longest time without a new step that came after it, steps done again."""
    steps = sorted(steps_of(attempts), key=lambda record: record["time"])
    # How far the run had come before each of them.
    reached = itertools.accumulate((record["step"] for record in steps[:-1]), max, initial=0)
    is_new = [record["step"] > before for record, before in zip(steps, reached, strict=True)]
    times = [record["time"] for record in steps]
    new = list(itertools.compress(times, is_new))
    rows: dict[str, list[tuple[float, int]]] = {}
    for fault, after in zip(suffered, [*suffered[1:], Suffered("end", math.inf)], strict=True):
        gaps = [b - a for a, b in itertools.pairwise(new) if b > fault.time and a < after.time]
        again = sum(
            fault.time < time < after.time and not first for time, first in zip(times, is_new, strict=True)
        )
        rows.setdefault(fault.name, []).append((max(gaps, default=math.nan), again))
    print("\n| fault | times | longest without a new step, s, median | steps done again, most |")
    print("|---|---|---|---|")
    for name, found in sorted(rows.items()):
        seconds, again = zip(*found, strict=True)
        print(f"| {name} | {len(found)} | {statistics.median(seconds):.0f} | {max(again)} |")
    print()


def print_outcome(attempts: list[Record], run: SmallRun, history: dict[int, Record]) -> None:
    """Rows and seconds; exits 1 if a step's rows are not those of the order."""
    steps = sorted(history)
    wrong = [
        step
        for step, digest in zip(steps, expected_digests(run, steps, **SETTINGS), strict=True)
        if history[step]["digest"] != digest
    ]
    repeated = len(steps_of(attempts)) - len(steps)
    print(f"workers started {len(events_of(attempts, 'start'))} times")
    print(f"{len(steps):,} steps, of {steps[-1]:,} none missing: {steps == list(range(1, steps[-1] + 1))}")
    print(
        f"steps with other rows than the order's: {len(wrong)}; steps computed again after faults: {repeated:,}"
    )
    print(goodput_line(goodput_of(attempts)))
    if wrong or steps != list(range(1, steps[-1] + 1)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
