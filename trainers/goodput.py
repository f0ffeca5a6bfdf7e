"""Where the time of a run went: every second from its first asking for workers to its last record has one name.

The report accounts for what is on storage, the driver for the same records as they come (trainers/live_metrics.py).
"""

from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise

from trainers.metrics import Record
from trainers.units import duration


@dataclass(frozen=True)
class Goodput:
    """Seconds by what they were spent on."""

    training: float
    """Steps that count, without what they waited."""
    data_wait: float
    checkpoint_stall: float
    recomputed: float
    """Steps that were done again later, because no checkpoint held them."""
    validating: float
    starting: float
    """From a worker's start to its first step: restoring, building, compiling, waiting for the first rows."""
    waiting_for_nodes: float
    """From a failure, or from when the driver asked for workers, to their start: noticing it, waiting for nodes,
    starting processes."""
    down: float
    """No driver asked for workers: the run was stopped, or its driver had ended and began anew."""
    other: float
    """The rest, such as the last save and the test of an attempt."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @property
    def share(self) -> float:
        """The goodput: the share of the time that went into training; 0 before the first step."""
        return self.training / self.total if self.total else 0.0


@dataclass
class Span:
    """When an attempt's workers were asked for, began, did their first step, and were last heard of; unix time."""

    first_step: int
    """Finished steps when it began."""
    asked: float | None
    began: float
    heard: float
    stepped: float | None = None


class Accounts:
    """Takes a run's records as they come, an attempt's in their order; tells at any time where the time went."""

    def __init__(self) -> None:
        # By number, of the steps that count: eight bytes each, for a run may have millions.
        self._seconds, self._waited, self._stalled = array("d"), array("d"), array("d")
        self._recomputed = self._validating = 0.0
        self._spans: dict[int, Span] = {}
        self._asked: float | None = None

    def ask(self, time: float) -> None:
        """The driver asks for workers, from which nothing is heard yet."""
        self._asked = time

    def add(self, record: Record) -> None:
        """Takes a record with attempt and time."""
        is_step = "event" not in record and "validation" not in record
        span = self._span_of(record, finished=record["step"] - is_step)
        span.heard = max(span.heard, record["time"])
        if "validation" in record:
            self._validating += record["validation"].get("seconds", 0.0)
        if is_step:
            if span.stepped is None:
                span.stepped = max(span.began, record["time"] - record["step_seconds"])
            self._count(record)

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
        later = [span.first_step for number, span in self._spans.items() if number > step["attempt"]]
        if step["step"] > min(later, default=step["step"]):
            # A worker that was cut off may write its last records after its successor began.
            self._recomputed += step["step_seconds"]
            return
        missing = max(0, step["step"] - len(self._seconds))  # above one, the records before are lost
        for each in (self._seconds, self._waited, self._stalled):
            each.extend([0.0] * missing)
        at = step["step"] - 1
        self._seconds[at] = step["step_seconds"]
        self._waited[at] = step["data_wait_seconds"]
        self._stalled[at] = step["checkpoint_stall_seconds"]

    def goodput(self, now: float | None = None, lacks_nodes: bool = False) -> Goodput:
        """Account for every second up to the last record, or up to now, as far as the records tell already.

        What passed since then goes to waiting where no worker answered the last asking, or nodes are missing.
        """
        spans = [span for _, span in sorted(self._spans.items())]
        kept, waited, stalled = sum(self._seconds), sum(self._waited), sum(self._stalled)
        named = {
            "training": kept - waited - stalled,
            "data_wait": waited,
            "checkpoint_stall": stalled,
            "recomputed": self._recomputed,
            "validating": self._validating,
            "starting": sum(
                (span.heard if span.stepped is None else span.stepped) - span.began for span in spans
            ),
            "waiting_for_nodes": 0.0,
            "down": 0.0,
        }
        gaps = [(before.heard, after.asked, after.began) for before, after in pairwise(spans)]
        if spans and spans[0].asked is not None:
            gaps.append((spans[0].asked, spans[0].asked, spans[0].began))
        heard = max((span.heard for span in spans), default=self._asked)
        if now is not None and heard is not None:
            if self._asked is not None and self._asked >= heard:
                gaps.append((heard, self._asked, now))
            elif lacks_nodes:
                gaps.append((heard, heard, now))
            elif spans[-1].stepped is None:
                named["starting"] += now - heard
        for last, asked, end in gaps:
            waiting = max(0.0, end - max(last, end if asked is None else asked))
            named["waiting_for_nodes"] += waiting
            named["down"] += max(0.0, end - last) - waiting
        if heard is None:
            total = 0.0
        else:
            first = min([spans[0].began, spans[0].asked or spans[0].began]) if spans else heard
            total = max(heard, now or heard) - first
        return Goodput(**named, other=total - sum(named.values()))


def goodput_of(attempts: Iterable[Record]) -> Goodput:
    """Account for every second of a run, from every record of every attempt."""
    accounts = Accounts()
    for record in sorted(attempts, key=lambda record: record["attempt"]):
        accounts.add(record)
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
