"""The driver's view of a run: one live line in a terminal, else a plain one now and then, and what happened.

It follows the metrics on storage, so it needs no channel to the workers, costs them nothing, and shows a run
that another process drives just as well.
"""

import logging
import threading
from collections import deque
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from cluster.console.terminal import Terminal
from cluster.storage.uris import StorageError, Store
from trainers.reporting.metrics import in_words, segment_attempt
from trainers.reporting.units import count, duration
from trainers.stored.metric_records import FOLDER, METERED, Record, parse

RECENT_STEPS = 50
"""Steps that rates and the time left are taken from."""

logger = logging.getLogger(__name__)


class Tail:
    """Yields what is new in a run's metrics: one listing, and one read per segment that changed."""

    def __init__(self, store: Store, whole: bool = False, needed: tuple[str, ...] = ()) -> None:
        """Takes the run's store, whether the first call reads all segments, and what a step must have to count."""
        self._store, self._needed = store, needed
        self._is_first = not whole
        self._versions: dict[str, str] = {}
        self._num_read: dict[str, int] = {}

    def poll(self) -> list[Record]:
        """Records since the last call; the first reads the newest segment alone unless asked. Raises `StorageError`."""
        found = {info.path: info.version for info in self._store.list(f"{FOLDER}/")}
        paths = sorted(
            (path for path in found if segment_attempt(path) is not None),
            key=lambda path: (segment_attempt(path), path),
        )
        if self._is_first:
            self._is_first = False
            self._versions = {path: found[path] for path in paths[:-1]}
        changed = [path for path in paths if self._versions.get(path) != found[path]]
        read = {path: parse(self._store.read(path), path, self._needed) for path in changed}
        new = [record for path in changed for record in read[path][self._num_read.get(path, 0) :]]
        # Not before all are read: what a failure cuts off is told by the next call.
        self._num_read |= {path: len(records) for path, records in read.items()}
        self._versions |= {path: found[path] for path in changed}
        return new


class Status:
    """What the records so far come to. Pure: records in, text out."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._step = 0
        self._recent: deque[Record] = deque(maxlen=RECENT_STEPS)
        self._validation: Record | None = None
        self._num_skipped = 0

    def absorb(self, record: Record) -> str | None:
        """Takes a record; returns a line if something happened that a user wants to see."""
        if "validation" in record:
            self._validation = record
            return f"step {record['step']:,}: validation {in_words(record['validation'])}"
        if "event" in record:
            return self._happened(record)
        self._step = record["step"]
        self._recent.append(record)
        return None

    def line(self) -> str:
        """Step, loss, validation, tokens/s, data wait and time left, as far as they are known."""
        if not self._recent:
            return f"step {self._step:,}/{self._total_steps:,}  waiting for the first step"
        last = self._recent[-1]
        seconds = sum(record["step_seconds"] for record in self._recent)
        rate = sum(record["tokens"] for record in self._recent) / seconds
        waited = sum(record["data_wait_seconds"] for record in self._recent) / seconds
        parts = [f"step {self._step:,}/{self._total_steps:,}", f"loss {_decimal(last['loss'])}"]
        if self._validation:
            found = self._validation["validation"]
            bits = found.get("bits_per_byte")
            short = _decimal(found.get("loss")) if bits is None else f"{bits:.3f} bits/byte"
            parts.append(f"validation {short}")
        parts += [
            f"{count(round(rate))} tokens/s",
            f"data wait {waited:.1%}",
            f"{duration(self._seconds_left())} left",
        ]
        if self._num_skipped:
            parts.append(f"{self._num_skipped} skipped")
        return "  ".join(parts)

    def _happened(self, event: Record) -> str:
        details = {k: v for k, v in event.items() if k not in ("step", "event", "attempt", "time")}
        where = f"step {event['step']:,}"
        if event["event"] == "start":
            self._step = event["step"]
            self._recent.clear()  # another attempt, perhaps of another size
            workers = details.get("world_size", 0)
            with_what = f"with {workers} worker{'s' * (workers != 1)}, attempt {event['attempt']}"
            return f"{where}: {'going on' if event['step'] else 'starting'} {with_what}"
        if event["event"] == "checkpoint":
            best = ", the best so far" if details.get("best") else ""
            return f"{where}: checkpoint {details.get('name', '')}{best}"
        if event["event"] == "skipped":
            self._num_skipped += 1
            documents = ", ".join(map(str, details.get("documents", ())))
            return (
                f"{where}: skipped, {details.get('reason', 'refused')}; documents: {documents or 'unknown'}"
            )
        told = ", ".join(f"{key}={value}" for key, value in details.items())
        return f"{where}: {event['event']} {told}".rstrip()

    def _seconds_left(self) -> float:
        """By the clock, so that validation and checkpoints count as often as they happened of late."""
        first, last = self._recent[0], self._recent[-1]
        if len(self._recent) > 1:
            seconds_per_step = (last["time"] - first["time"]) / (len(self._recent) - 1)
        else:
            seconds_per_step = last["step_seconds"]
        return max(0, self._total_steps - self._step) * seconds_per_step


class Progress:
    """Shows a run while a with-block lasts: `with Progress(store, steps): trainer.fit()`."""

    def __init__(
        self,
        store: Store,
        total_steps: int,
        *,
        console: Console | None = None,
        line_seconds: float = 10.0,
        poll_seconds: float = 2.0,
    ) -> None:
        """Takes the run's store; `line_seconds` lie between two lines where the output is not a terminal."""
        self._tail = Tail(store, needed=METERED)
        self._status = Status(total_steps)
        self._console = console or Terminal(soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._polls_per_line = max(1, round(line_seconds / poll_seconds))
        self._poll_seconds = poll_seconds
        self._last_line = ""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> "Progress":
        self._look(quiet=True)  # what happened before this driver came is told in the line alone
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()
        self._look()
        self._show_line()
        if self._live:
            self._live.stop()

    def _follow(self) -> None:
        num_polls = 0
        while not self._ending.wait(self._poll_seconds):
            num_polls += 1
            self._look()
            if self._live or num_polls % self._polls_per_line == 0:
                self._show_line()

    def _look(self, quiet: bool = False) -> None:
        try:
            records = self._tail.poll()
        except StorageError as error:
            logger.warning("no progress to show until the storage answers: %s", error)
            return
        for record in records:
            happened = self._status.absorb(record)
            if happened and not quiet:
                self._console.print(happened, highlight=False, markup=False)

    def _show_line(self) -> None:
        line = self._status.line()
        if self._live:
            self._live.update(Text(line, style="bold", no_wrap=True, overflow="ellipsis"), refresh=True)
        elif line != self._last_line:
            self._console.print(line, highlight=False, markup=False)
        self._last_line = line


def _decimal(number: float | None) -> str:
    """A loss; the metrics hold null for one that is not finite."""
    return "not finite" if number is None else f"{number:.3f}"
