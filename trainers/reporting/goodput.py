"""Where the time of a run went: every second from its first asking for workers to its report has one name.

The report accounts for what is on storage, the driver for the same records as they come
(trainers/reporting/live_metrics.py).
Start-up that happens in steps is no training (trainers/reporting/start_up.py).
"""

import math
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise

from trainers.reporting.metrics import TRAINED, Record
from trainers.reporting.start_up import FirstStep, compiled_in, computed_in
from trainers.reporting.units import duration
from trainers.stored.run_files import Interval


@dataclass(frozen=True)
class Goodput:
    """Seconds by what they were spent on."""

    training: float
    """Steps that count, without what they waited and what was start-up."""
    data_wait: float
    checkpoint_stall: float
    recomputed: float
    """Steps that were done again later, because no checkpoint held them."""
    validating: float
    starting: float
    """From a worker's start to its first step, and what that took beyond a usual one: restoring, building, waiting for
    the first rows, warming up."""
    compiling: float
    """By worker 0, in steps and validations."""
    waiting_for_nodes: float
    """From a failure, or from when the driver asked for workers, to their start: noticing it, waiting for nodes,
    starting processes."""
    down: float
    """No driver asked for workers: the run was stopped, or its driver had ended and began anew."""
    concluding: float
    """From the end of training on: test, export, floor, samples, report."""
    other: float
    """The rest, such as the last save of an attempt."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @property
    def share(self) -> float:
        """The goodput: the share of the time that went into training; 0 before the first step."""
        return self.training / self.total if self.total else 0.0


@dataclass
class Span:
    """When an attempt's workers were asked for, began, did their first step, had no more to train, and were last heard
    of; unix time."""

    first_step: int
    """Finished steps when it began."""
    asked: float | None
    began: float
    heard: float
    stepped: float | None = None
    trained: float | None = None
    first: FirstStep | None = None

    @property
    def ready(self) -> float:
        """When it had started: at its first step, or with nothing to train; so far it starts."""
        known = [time for time in (self.stepped, self.trained) if time is not None]
        return known[0] if known else self.heard

    def take(self, step: Record) -> None:
        if self.first is None:
            self.stepped = max(self.began, step["time"] - step["step_seconds"])
            self.first = FirstStep(step["step"], computed_in(step))
        else:
            self.first.follow(computed_in(step))


class Accounts:
    """Takes a run's records as they come, an attempt's in their order; tells at any time where the time went."""

    def __init__(self) -> None:
        # By number, of the steps that count: eight bytes each, for a run may have millions. Without compiling.
        self._seconds, self._waited, self._stalled = array("d"), array("d"), array("d")
        self._recomputed = self._validating = self._compiling = 0.0
        self._spans: dict[int, Span] = {}
        self._asked: float | None = None
        self._conclusions: list[Interval] = []

    def ask(self, time: float) -> None:
        """The driver asks for workers, from which nothing is heard yet."""
        self._asked = time

    def add(self, record: Record) -> None:
        """Takes a record with attempt and time."""
        is_step = "event" not in record and "validation" not in record
        span = self._span_of(record, finished=record["step"] - is_step)
        span.heard = max(span.heard, record["time"])
        if "validation" in record:
            compiling = record["validation"].get("compile_seconds", 0.0)
            self._validating += record["validation"].get("seconds", 0.0) - compiling
            self._compiling += compiling
        elif is_step:
            span.take(record)
            self._compiling += compiled_in(record)
            self._count(record)
        elif record["event"] == TRAINED:
            span.trained = record["time"]

    def conclude(self, interval: Interval) -> None:
        """Takes from when to when a driver was there that concluded the run, or trained and concluded it."""
        self._conclusions.append(interval)

    def _span_of(self, record: Record, finished: int) -> Span:
        """The record's attempt; a new one does what lies after its first step anew."""
        number = record["attempt"]
        if number not in self._spans:
            began: float = record["began"] if "began" in record else record["time"]
            self._spans[number] = Span(finished, record.get("asked"), began, record["time"])
            if number == max(self._spans):
                self._recomputed += sum(self._seconds[finished:])
                for each in (self._seconds, self._waited, self._stalled):
                    del each[finished:]
        return self._spans[number]

    def _count(self, step: Record) -> None:
        seconds = step["step_seconds"] - compiled_in(step)
        if step["step"] > self._valid_to(step["attempt"]):
            # A worker that was cut off may write its last records after its successor began.
            self._recomputed += seconds
            return
        missing = max(0, step["step"] - len(self._seconds))  # above one, the records before are lost
        for each in (self._seconds, self._waited, self._stalled):
            each.extend([0.0] * missing)
        at = step["step"] - 1
        self._seconds[at] = seconds
        self._waited[at] = step["data_wait_seconds"]
        self._stalled[at] = step["checkpoint_stall_seconds"]

    def _valid_to(self, attempt: int) -> float:
        """The last step of an attempt that no later one does anew."""
        return min((span.first_step for n, span in self._spans.items() if n > attempt), default=math.inf)

    def goodput(self, now: float | None = None, lacks_nodes: bool = False) -> Goodput:
        """Account for every second up to the last record, or up to now, as far as the records tell already.

        What passed since then goes to concluding where nothing is left to train, and to waiting where no worker
        answered the last asking, or nodes are missing.
        """
        spans = [span for _, span in sorted(self._spans.items())]
        kept, waited, stalled = sum(self._seconds), sum(self._waited), sum(self._stalled)
        kept_excess, lost_excess = self._excess()
        named = {
            "training": kept - waited - stalled - kept_excess,
            "data_wait": waited,
            "checkpoint_stall": stalled,
            "recomputed": self._recomputed - lost_excess,
            "validating": self._validating,
            "starting": kept_excess + lost_excess + sum(span.ready - span.began for span in spans),
            "compiling": self._compiling,
            "waiting_for_nodes": 0.0,
            "down": 0.0,
            "concluding": sum(span.heard - span.trained for span in spans if span.trained is not None),
        }
        gaps = [(before.heard, after.asked, after.began) for before, after in pairwise(spans)]
        if spans and spans[0].asked is not None:
            gaps.append((spans[0].asked, spans[0].asked, spans[0].began))
        heard = max((span.heard for span in spans), default=self._asked)
        if heard is None:
            return Goodput(**named, other=0.0)
        for began, ended in self._conclusions:
            named["down"] += max(0.0, began - heard)
            named["concluding"] += max(0.0, ended - max(began, heard))
            heard = max(heard, ended)
        if now is not None:
            if self._asked is not None and self._asked >= heard:
                gaps.append((heard, self._asked, now))
            elif spans[-1].trained is not None:
                named["concluding"] += now - heard
            elif lacks_nodes:
                gaps.append((heard, heard, now))
            elif spans[-1].stepped is None:
                named["starting"] += now - heard
        for last, asked, end in gaps:
            waiting = max(0.0, end - max(last, end if asked is None else asked))
            named["waiting_for_nodes"] += waiting
            named["down"] += max(0.0, end - last) - waiting
        first = min([spans[0].began, spans[0].asked or spans[0].began]) if spans else heard
        total = max(heard, now or heard) - first
        return Goodput(**named, other=total - sum(named.values()))

    def _excess(self) -> tuple[float, float]:
        """Seconds of first steps beyond usual ones: of those that count, and of those that were done again."""
        firsts = {number: span.first for number, span in self._spans.items() if span.first is not None}
        others = [seconds for first in firsts.values() for seconds in first.following]
        kept = lost = 0.0
        for number, first in firsts.items():
            if first.number > self._valid_to(number):
                lost += first.excess(others)
            else:
                kept += first.excess(others)
        return kept, lost


def goodput_of(attempts: Iterable[Record], conclusions: Iterable[Interval] = ()) -> Goodput:
    """Account for every second of a run, from every record of every attempt, and what its drivers did after them."""
    accounts = Accounts()
    for record in sorted(attempts, key=lambda record: record["attempt"]):
        accounts.add(record)
    for interval in conclusions:
        accounts.conclude(interval)
    return accounts.goodput()


def parts_of(goodput: Goodput) -> list[tuple[str, float]]:
    """Every part by name with its seconds, the longest first."""
    return sorted(
        ((key.replace("_", " "), value) for key, value in asdict(goodput).items()), key=lambda part: -part[1]
    )


def goodput_line(goodput: Goodput) -> str:
    """The share of the time that went into training, and what took more than a hundredth of the rest."""
    named = [
        f"{name} {duration(seconds)}"
        for name, seconds in parts_of(goodput)
        if name != "training" and seconds >= 0.01 * goodput.total
    ]
    return f"goodput {goodput.share:.1%} of {duration(goodput.total)}" + "".join(
        f", {part}" for part in named
    )
