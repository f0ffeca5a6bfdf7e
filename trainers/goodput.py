"""Where the time of a run went: every second from its first worker's start to its last record has one name."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise

from trainers.metrics import Record, attempt_starts, events_of, one_history, steps_of, validations_of


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
    down: float
    """Between an attempt's last record and the next one's start: noticing a failure, waiting for nodes, starting
    processes."""
    other: float
    """The rest, such as the last save and the test of an attempt."""

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    @property
    def share(self) -> float:
        """The goodput: the share of the time that went into training; 0 before the first step."""
        return self.training / self.total if self.total else 0.0


def goodput_of(attempts: Iterable[Record]) -> Goodput:
    """Account for every second of a run, from every record of every attempt."""
    records = list(attempts)
    by_attempt = [
        [r for r in records if r["attempt"] == number] for number in sorted(attempt_starts(records))
    ]
    spans = [span_of(own) for own in by_attempt]
    history = one_history(records)
    counted = steps_of(history)
    waited = sum(step["data_wait_seconds"] for step in counted)
    stalled = sum(step["checkpoint_stall_seconds"] for step in counted)
    kept = sum(step["step_seconds"] for step in counted)
    named = {
        "training": kept - waited - stalled,
        "data_wait": waited,
        "checkpoint_stall": stalled,
        "recomputed": sum(step["step_seconds"] for step in steps_of(records)) - kept,
        "validating": sum(r["validation"].get("seconds", 0.0) for r in validations_of(records)),
        "starting": sum(starting_seconds(own) for own in by_attempt),
        # A worker that was cut off may write its last records after its successor began.
        "down": sum(max(0.0, after[0] - before[1]) for before, after in pairwise(spans)),
    }
    total = max(span[1] for span in spans) - spans[0][0] if spans else 0.0
    return Goodput(**named, other=total - sum(named.values()))


def span_of(own: list[Record]) -> tuple[float, float]:
    """When an attempt began and when it was last heard of, unix time."""
    times = [record["time"] for record in own]
    return began(own), max(times)


def began(own: list[Record]) -> float:
    """When an attempt's workers started: said by its start, which comes when they have built everything."""
    starts = [record.get("began", record["time"]) for record in events_of(own, "start")]
    return min(starts or [record["time"] for record in own])


def starting_seconds(own: list[Record]) -> float:
    """From an attempt's start to the beginning of its first step, or to its last record if it came to none."""
    steps = steps_of(own)
    if not steps:
        return max(record["time"] for record in own) - began(own)
    return max(0.0, steps[0]["time"] - steps[0]["step_seconds"] - began(own))
