"""What a run tells about itself: records made on worker 0, kept on storage, read back from there.

A record is a JSON object with `step` (finished steps), `attempt` and unix `time`, of one of three kinds:

    a step       loss (nats per target), lr, grad_norm, tokens, step_seconds, data_wait_seconds,
                 checkpoint_stall_seconds, compile_seconds, tokens_per_second, mfu, memory_bytes, epoch, digest;
                 of an objective with several terms also TERM_loss of each
    validation   validation: {loss, tokens, seconds, compile_seconds}; bits_per_byte, perplexity, bytes where every
                 token is predicted from those before it; TERM_loss and TERM_accuracy of other objectives
    an event     event: "start", "checkpoint", "skipped", "trained", …, with whatever belongs to it

A number that is not finite is stored as null. Records go to `metrics/FIRST STEP-ATTEMPT.jsonl`: an object
store cannot append, so the last segment is put anew every few seconds until it is full.
"""

import json
import logging
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from cluster.storage.uris import StorageError, Store
from trainers.reporting.event_files import EventFile
from trainers.stored.metric_records import FOLDER, MERGED, Record, parse

TRAINED = "trained"
"""The event after which an attempt trains no more, and judges and exports."""
SEGMENT_LINES = 1_000
MAX_PENDING = 20_000
"""Records that wait for a storage that does not answer: about 20 MB. More are dropped, and counted."""

logger = logging.getLogger(__name__)


class Meter:
    """Makes the record of each step from clocks and shapes.

    A step lasts from the end of the step before to its own `finish`, so that compiling, waiting for data, computing
    and the stall by a checkpoint are inside, and the steps of a run add up to its training time. What is done
    `apart`, such as validation, belongs to no step.
    """

    def __init__(
        self,
        *,
        flops_per_token: float,
        peak_flops_per_second: float,
        clock: Callable[[], float] = time.perf_counter,
        compiled: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Takes FLOP per trained token, the peak FLOP/s of all workers together (0: unknown), and what tells how long
        this process has compiled so far."""
        self._flops_per_token = flops_per_token
        self._peak = peak_flops_per_second
        self._clock, self._compiled = clock, compiled
        self._start, self._compiled_before = clock(), compiled()
        self._waited = self._stalled = 0.0

    def waited(self, seconds: float) -> None:
        """Counts time in which this step had no data to compute on."""
        self._waited += seconds

    def stalled(self, seconds: float) -> None:
        """Counts time in which a checkpoint kept this step from going on."""
        self._stalled += seconds

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leaves what happens inside out of the step."""
        start, compiled = self._clock(), self._compiled()
        try:
            yield
        finally:
            self._start += self._clock() - start
            self._compiled_before += self._compiled() - compiled

    def finish(self, step: int, *, tokens: int, **measured: Any) -> Record:
        """Ends the step; `tokens` are the target tokens of the global batch, `measured` goes in as it is."""
        now, compiled = self._clock(), self._compiled()
        seconds, self._start = now - self._start, now
        compile_seconds, self._compiled_before = compiled - self._compiled_before, compiled
        waited, stalled, self._waited, self._stalled = self._waited, self._stalled, 0.0, 0.0
        return {
            "step": step,
            **measured,
            "tokens": tokens,
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            "checkpoint_stall_seconds": stalled,
            "compile_seconds": compile_seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": tokens * self._flops_per_token / (seconds * self._peak) if self._peak else None,
        }


class MetricsWriter:
    """Keeps records on storage. One writer per attempt; `write` never waits, whatever the storage does."""

    def __init__(
        self,
        store: Store,
        attempt: int,
        flush_seconds: float = 5.0,
        observers: Sequence[Callable[[Record], None]] = (),
        now: Callable[[], float] = time.time,
    ) -> None:
        """Takes the run's store, and what tells unix time.

        A killed process loses what is younger than `flush_seconds`.

        `observers` are called with each record as it is written; they must not wait.
        """
        self._store, self._now, self._observers = store, now, observers
        self._attempt = attempt
        self._pending: deque[Record] = deque()
        self._num_dropped = self._num_dropped_told = 0
        self._segment: Segment | None = None
        self._flushing = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(flush_seconds,), name="metrics", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Takes a record, which must have a `step`; attempt and time are added. From any thread."""
        record = {**record, "attempt": self._attempt, "time": self._now()}
        for observe in self._observers:
            observe(record)
        if len(self._pending) < MAX_PENDING:
            self._pending.append(record)
        else:
            self._num_dropped += 1

    def flush(self) -> None:
        """Puts all that was written on storage; raises `StorageError` and keeps it where that fails.

        Called before a checkpoint is committed, the history has no gap where the next attempt goes on.
        """
        with self._flushing:
            while self._pending or (self._segment and not self._segment.is_stored):
                self._fill_segment().put(self._store)

    def close(self) -> None:
        """Flushes and ends the thread. Raises `StorageError`."""
        self._closing.set()
        self._thread.join()
        self.flush()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, flush_seconds: float) -> None:
        while not self._closing.wait(flush_seconds):
            try:
                self.flush()
            except StorageError as error:
                logger.warning("metrics stay in memory until the storage answers: %s", error)

    def _fill_segment(self) -> "Segment":
        """Moves pending records into the segment until it is full; a new one, if that one is on storage."""
        while self._pending:
            record = self._pending[0]
            if self._segment is None:
                self._segment = Segment(record, purge_from=record["step"] + ("event" in record))
            elif self._segment.is_full and record["step"] > self._segment.first_step:
                if not self._segment.is_stored:
                    break
                self._segment = Segment(record)
            self._segment.add(self._pending.popleft())
            self._tell_dropped(record)
        assert self._segment is not None, "called without a record"
        return self._segment

    def _tell_dropped(self, after: Record) -> None:
        if not self._pending and (dropped := self._num_dropped - self._num_dropped_told):
            self._num_dropped_told += dropped
            self.write({"step": after["step"], "event": "metrics_lost", "records": dropped})


class Segment:
    """Up to `SEGMENT_LINES` records of one attempt, and the same as a TensorBoard event file."""

    def __init__(self, first: Record, purge_from: int | None = None) -> None:
        self.first_step: int = first["step"]
        self.is_stored = False
        name = f"{self.first_step:08d}-{first['attempt']}"
        self._path = f"{FOLDER}/{name}.jsonl"
        self._event_path = f"tensorboard/events.out.tfevents.{int(first['time']):010d}.{name}"
        self._lines: list[bytes] = []
        self._events = EventFile(first["time"], purge_from)

    @property
    def is_full(self) -> bool:
        return len(self._lines) >= SEGMENT_LINES

    def add(self, record: Record) -> None:
        record = finite(record)
        self._lines.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._events.add(record)
        self.is_stored = False

    def put(self, store: Store) -> None:
        store.put(self._path, b"".join(self._lines))
        store.put(self._event_path, self._events.content())
        self.is_stored = True


def in_words(found: Record) -> str:
    """What a validation found."""
    if found.get("bits_per_byte") is not None:
        bits, perplexity = found["bits_per_byte"], found.get("perplexity") or math.inf
        parts = [f"{bits:.3f} bits per byte", f"perplexity {perplexity:,.2f}"]
    else:
        loss = found.get("loss")
        parts = ["loss not finite" if loss is None else f"loss {loss:.3f}"]
    accuracies = [key for key in found if key.endswith("_accuracy") and found[key] is not None]
    return ", ".join([*parts, *(f"{key.replace('_', ' ')} {found[key]:.1%}" for key in accuracies)])


def finite(value: Any) -> Any:
    """The value with null for each number that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def segment_attempt(path: str) -> int | None:
    """The attempt that wrote the segment at this path; None for anything else."""
    match = re.fullmatch(rf"{FOLDER}/\d{{8,}}-(\d+)\.jsonl", path)
    return int(match[1]) if match else None


def read_attempts(store: Store, needed: tuple[str, ...] = ()) -> list[Record]:
    """Every record that any attempt of the run wrote, in the order written; `store` is the run's.

    Lines that are damaged, or of steps that lack what is `needed`, are left out with a warning.
    """
    paths = [info.path for info in store.list(f"{FOLDER}/")]
    paths = [path for path in paths if segment_attempt(path) is not None]
    if not paths:  # a copy of the run without its segments, or a run that has not begun
        return parse(store.read(MERGED), MERGED, needed) if store.exists(MERGED) else []
    records = [record for path in paths for record in parse(store.read(path), path, needed)]
    return sorted(records, key=lambda record: record["attempt"])


def read_metrics(store: Store) -> list[Record]:
    """The run's one history, by step: of a step that several attempts did, what the last one wrote."""
    return one_history(read_attempts(store))


def one_history(records: Iterable[Record]) -> list[Record]:
    """Drops what a later attempt did anew, and what lies after the step from which it went on.

    Events stay, for they happened. By step, and within a step in the order written.
    """
    records = list(records)
    valid_to, later_start = {}, math.inf
    for attempt, start in sorted(attempt_starts(records).items(), reverse=True):
        valid_to[attempt] = later_start
        later_start = min(later_start, start)
    kept = [r for r in records if "event" in r or r["step"] <= valid_to[r["attempt"]]]
    return sorted(kept, key=lambda record: record["step"])


def attempt_starts(records: Iterable[Record]) -> dict[int, int]:
    """How many steps of the run were finished when each attempt began."""
    starts: dict[int, int] = {}
    for record in records:
        finished = record["step"] if "event" in record or "validation" in record else record["step"] - 1
        starts[record["attempt"]] = min(finished, starts.get(record["attempt"], finished))
    return starts


def merge_metrics(store: Store) -> None:
    """Writes the run's history as `metrics.jsonl`, one line a record, at the end of a run."""
    lines = [json.dumps(record, allow_nan=False) + "\n" for record in read_metrics(store)]
    store.put(MERGED, "".join(lines).encode())


def steps_of(records: Iterable[Record]) -> list[Record]:
    """The records of steps alone."""
    return [record for record in records if "event" not in record and "validation" not in record]


def validations_of(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if "validation" in record]


def events_of(records: Iterable[Record], *names: str) -> list[Record]:
    """The events, or those of the given names."""
    return [record for record in records if "event" in record and (not names or record["event"] in names)]
