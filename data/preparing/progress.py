"""How far preparing has come, and the line that shows it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

# Without a terminal each report is a line of a log; nobody wants one per piece.
LOG_INTERVAL_SECONDS = 10.0


@dataclass(frozen=True)
class PassProgress:
    """How far one pass over the corpus has come."""

    name: str
    """survey, merged, duplicates or tokens."""
    done: int
    """Of the raw bytes (of groups and ranges of hashes), those from earlier runs included."""
    total: int
    seconds_left: float | None
    """At the rate of this run so far; None before its first piece."""

    def __str__(self) -> str:
        share = self.done / self.total if self.total else 1.0
        left = "" if self.seconds_left is None else f", {_clock(self.seconds_left)} left"
        return f"{self.name}: {share:.0%}{left}"


class PassMeter:
    """Counts finished pieces of one pass and reports after each."""

    def __init__(self, name: str, total: int, done: int, report: Callable[[PassProgress], None]) -> None:
        self._name, self._total, self._done, self._report = name, total, done, report
        self._before, self._begin = done, time.monotonic()
        report(PassProgress(name, done, self._total, None if done < self._total else 0.0))

    def add(self, size: int) -> None:
        """Count one more finished piece."""
        self._done += size
        rate = (self._done - self._before) / max(time.monotonic() - self._begin, 1e-9)
        left = (self._total - self._done) / rate if rate else None
        self._report(PassProgress(self._name, self._done, self._total, left))


@contextmanager
def progress_line(console: Console) -> Iterator[Callable[[PassProgress], None]]:
    """Show progress as one live line on a terminal, else as a line every few seconds."""
    if not console.is_terminal:
        yield _Log(console)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("listing", total=None)
        yield lambda at: bar.update(task, description=str(at), completed=at.done, total=max(at.total, 1))


class _Log:
    def __init__(self, console: Console) -> None:
        self._console, self._last = console, float("-inf")

    def __call__(self, at: PassProgress) -> None:
        if at.done >= at.total or time.monotonic() - self._last >= LOG_INTERVAL_SECONDS:
            self._last = time.monotonic()
            self._console.print(str(at))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
