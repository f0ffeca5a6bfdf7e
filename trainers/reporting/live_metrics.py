"""A run's records as metrics that Prometheus scrapes from Ray, and its events as lines of a log.

Ray exports them on every node's metrics port as `ray_pretrain_…`, with the label `run`; k8s/components/monitoring holds
alerts and a dashboard over them. What they come from, and what is kept, are the records of
trainers/reporting/metrics.py.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Self, TextIO
from urllib.parse import quote

from ray.util.metrics import Counter, Gauge

from cluster.limits.bounds import seconds_given
from cluster.storage.uris import StorageError, Store
from trainers.recovery.background import Background
from trainers.reporting.goodput import Accounts
from trainers.reporting.metrics import finite
from trainers.reporting.progress import Tail
from trainers.reporting.start_up import FirstStep, computed_in
from trainers.reporting.watching import SCRAPE_SECONDS_VARIABLE
from trainers.stored.metric_records import METERED, Record

logger = logging.getLogger(__name__)

PREFIX = "pretrain_"
GAUGES = {
    "step": "Finished steps.",
    "attempt": "How often the run was started.",
    "loss": "Nats per target token of the last step.",
    "grad_norm": "Norm of the last step's gradient, before clipping.",
    "learning_rate": "Of the last step.",
    "step_seconds": "Duration of the last step.",
    "tokens_per_second": "Of the last step, all workers.",
    "mfu": "FLOP/s of the model over the devices' peak, of CPUs a measured one, in the last step.",
    "memory_bytes": "Accelerator memory of worker 0.",
    "validation_loss": "Nats per target token on the validation split.",
    "last_step_timestamp_seconds": "Unix time of the last step.",
    "last_checkpoint_timestamp_seconds": "Unix time of the last committed checkpoint, or of the driver's start.",
}
DRIVER_GAUGES = {
    "finished_timestamp_seconds": "Unix time at which the run ended, done or stopped on purpose.",
    "spent_seconds": "Time of the run since its beginning by `part`, what it was spent on; they add up to its age.",
}
COUNTERS = {
    "tokens": "Target tokens trained on.",
    "productive_seconds": "Time of steps that a checkpoint holds, less waits, stalls, start-up; its rate: goodput.",
    "data_wait_seconds": "Time of steps without data to compute on.",
    "checkpoint_stall_seconds": "Time of steps that a checkpoint held up.",
    "skipped_steps": "Steps that the guard refused.",
    "nonfinite_losses": "Steps whose loss was not a number.",
    "checkpoints": "Committed checkpoints.",
}
RENAMED = {"lr": "learning_rate"}
ZERO = sys.float_info.min
"""A counter's first value: Ray refuses an increase by nothing, and a series that begins with its first event does not
increase by it for Prometheus. Added to 1.0, it leaves 1.0."""
READ_SECONDS = 12.0
"""Between two looks of the driver at the records on storage."""
REFRESH_SECONDS = 4.0
"""Ray forgets a gauge that is not set again within two of its reports (10 s each), and a step may take longer."""


def label_of(run: str) -> str:
    """A run's name as Ray's metrics take it, which know ASCII alone: other characters as in a URL."""
    return "".join(each if each.isascii() else quote(each) for each in run)


def readings(record: Record) -> Iterator[tuple[str, float]]:
    """(name, value) of each metric that a record sets, or adds to."""
    yield "attempt", record["attempt"]
    yield "step", record["step"]
    if "validation" in record:
        yield "validation_loss", record["validation"]["loss"]
    elif "event" in record:
        yield from _event_readings(record)
    else:
        yield from _step_readings(record)


def _event_readings(record: Record) -> Iterator[tuple[str, float]]:
    if record["event"] == "checkpoint":
        yield "last_checkpoint_timestamp_seconds", record["time"]
    if record["event"] == "start":
        # Not the start's own time: a run whose every attempt ends before it has committed would never look late.
        known = [record.get("saved"), record.get("asked")]
        yield "last_checkpoint_timestamp_seconds", max(filter(None, known), default=record["time"])
    if record["event"] == "start":
        yield "last_step_timestamp_seconds", record["time"]
    if record["event"] == "checkpoint":
        yield "checkpoints", 1.0
    if record["event"] == "skipped":
        yield "skipped_steps", 1.0


def _step_readings(record: Record) -> Iterator[tuple[str, float]]:
    yield "last_step_timestamp_seconds", record["time"]
    if not math.isfinite(record["loss"]):
        yield "nonfinite_losses", 1.0
    for key, value in record.items():
        name = RENAMED.get(key, key)
        is_ours = name in COUNTERS or (name in GAUGES and name not in ("step", "attempt"))
        if is_ours and value is not None and math.isfinite(value):
            yield name, value


class Productive:
    """Adds up what an attempt's steps took, and gives it out once a checkpoint holds them.

    A step that is lost in a failure is done again: counted at once it would be counted twice.
    """

    def __init__(self) -> None:
        self._pending: dict[int, float] = {}
        self._first: FirstStep | None = None
        self._owed = 0.0
        """Held by a checkpoint and not given out."""
        self._excess = 0.0
        """Of the first step, as far as it is taken off."""

    def committed(self, record: Record) -> float:
        """Seconds that a record makes count: 0 but for that of a checkpoint."""
        if "step_seconds" in record:
            seconds = self._pending[record["step"]] = computed_in(record)
            if self._first is None:
                self._first = FirstStep(record["step"], seconds)
            else:
                self._first.follow(seconds)
        if record.get("event") != "checkpoint":
            return 0.0
        if self._first is None or not self._first.following:
            return 0.0  # how much of the first step was start-up, the second one tells
        held = [step for step in list(self._pending) if step <= record["step"]]
        self._owed += sum(self._pending.pop(step) for step in held)
        if self._first.number <= record["step"]:
            excess = self._first.excess()  # which the next steps may show to be less or more
            self._owed -= excess - self._excess
            self._excess = excess
        given = max(0.0, self._owed)
        self._owed -= given
        return given


class LiveMetrics(Background):
    """Hands records on to Ray's metrics of this process, for the length of a with-block.

    A worker that hangs goes on showing its last step, so that the age of that step can be alerted on.
    """

    def __init__(self, run: str) -> None:
        super().__init__("live metrics")
        self._tags = {"run": label_of(run)}
        self._gauges = {name: Gauge(PREFIX + name, text, ("run",)) for name, text in GAUGES.items()}
        self._counters = {name: Counter(PREFIX + name, text, ("run",)) for name, text in COUNTERS.items()}
        for counter in self._counters.values():
            counter.inc(ZERO, self._tags)
        self._productive = Productive()
        self._last: dict[str, float] = {}

    def observe(self, record: Record) -> None:
        """Takes a record with attempt and time. From any thread."""
        found = [*readings(record), ("productive_seconds", self._productive.committed(record))]
        for name, value in found:
            if name in self._gauges:
                self._gauges[name].set(value, self._tags)
                self._last[name] = value
            elif value > 0:  # Ray's counters refuse an increase by nothing
                self._counters[name].inc(value, self._tags)

    def _run(self) -> None:
        while not self._ended.wait(REFRESH_SECONDS):
            for name, value in list(self._last.items()):
                self._gauges[name].set(value, self._tags)


def event_log(run: str, worker: int | str, stream: TextIO | None = None) -> Callable[[Record], None]:
    """Writes each event as a line of JSON for a log collector: run, attempt, worker, step, and what belongs to it."""

    def write(record: Record) -> None:
        if "event" in record:
            line = {"run": run, "attempt": record["attempt"], "worker": worker, **finite(record)}
            print(json.dumps(line, allow_nan=False), file=stream or sys.stdout, flush=True)

    return write


class DriverLog:
    """What the driver says of its run: a line of JSON as the workers', and the metric that it ended.

    tell = DriverLog(config.run.name, config.run.log_events)
    tell("group_start", attempt=3)     # also group_failure, grow, drain, head_drains
    tell("finished", attempt=3)        # or "stopped": no alert waits for a next step
    """

    ENDS = ("finished", "stopped")

    def __init__(
        self, run: str, log_events: bool, now: Callable[[], float] = time.time, stream: TextIO | None = None
    ) -> None:
        self._tags, self._log_events, self._now = {"run": label_of(run)}, log_events, now
        self._write = event_log(run, "driver", stream)
        name = "finished_timestamp_seconds"
        self._finished = Gauge(PREFIX + name, DRIVER_GAUGES[name], ("run",))

    def __call__(self, event: str, *, attempt: int = 0, step: int = 0, **details: Any) -> None:
        if self._log_events:
            self._write({"time": self._now(), "step": step, "attempt": attempt, "event": event, **details})
        if event in self.ENDS:
            self._end()

    def _end(self) -> None:
        """Shows the end for as long as a scrape may take; not at all where nothing scrapes."""
        finished = self._now()
        ends = time.monotonic() + seconds_given(SCRAPE_SECONDS_VARIABLE, 0)
        self._finished.set(finished, self._tags)
        while (left := ends - time.monotonic()) > 0:
            time.sleep(min(left, REFRESH_SECONDS))
            self._finished.set(finished, self._tags)


class LiveGoodput(Background):
    """Shows where the run's time went, for the length of a with-block: the accounts of the report, while it lives.

    The driver keeps them, for it is there while workers are not, and knows what was before it from the records.
    """

    def __init__(
        self,
        run: str,
        store: Store,
        now: Callable[[], float],
        lacks_nodes: Callable[[], bool] = lambda: False,
    ) -> None:
        """Takes the run's name, store and clock, and what tells whether nodes are missing for its workers."""
        # At the end it may read from a storage that does not answer: that is not waited for.
        super().__init__("live goodput", join_seconds=REFRESH_SECONDS)
        self._label, self._now, self._lacks_nodes = label_of(run), now, lacks_nodes
        self._tail, self._accounts = Tail(store, whole=True, needed=METERED), Accounts()
        name = "spent_seconds"
        self._gauge = Gauge(PREFIX + name, DRIVER_GAUGES[name], ("run", "part"))

    def __enter__(self) -> Self:
        self._accounts.ask(self._now())
        return super().__enter__()

    def _run(self) -> None:
        read = -math.inf
        while True:
            if time.monotonic() - read >= READ_SECONDS:
                read = time.monotonic()
                self._read()
            self._show()
            if self._ended.wait(REFRESH_SECONDS):
                return

    def _read(self) -> None:
        try:
            for record in self._tail.poll():
                self._accounts.add(record)
        except StorageError as error:
            logger.warning("the accounts of the run's time wait until the storage answers: %s", error)

    def _show(self) -> None:
        for part, seconds in asdict(self._accounts.goodput(self._now(), self._lacks_nodes())).items():
            self._gauge.set(seconds, {"run": self._label, "part": part})
