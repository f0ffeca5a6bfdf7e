"""Records of a run's metrics, read back line by line: what is damaged is left out, counted and told in one line.

A half last line is usual after a kill on a storage that appends; a flipped bit leaves a line that is no record. Such
lines cost the report a step, and nobody the run.
"""

import logging
import re
from typing import Annotated, Any, NotRequired

import pydantic
from pydantic import Field
from typing_extensions import TypedDict

from cluster.configuration.stored_file import WITH_OTHER_KEYS, decode_json, matches

Record = dict[str, Any]

FOLDER = "metrics"
MERGED = "metrics.jsonl"
METERED = ("step_seconds", "data_wait_seconds", "checkpoint_stall_seconds", "tokens", "tokens_per_second")
"""What each step of a pretraining run has, and one of fine-tuning not all of."""
MOST_STEPS_LOST = 10_000_000
"""Between two records of a file: a greater step is a flipped digit, and would take memory for all between."""

# Bounds so wide that only damage lies outside, and so narrow that sums and dates stay numbers.
Count = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
FlopsPerSecond = Annotated[float, Field(gt=0, le=1e21)]
UnixTime = Annotated[float, Field(ge=0, le=1e11)]
Measured = Annotated[float, Field(ge=-3.5e38, le=3.5e38)] | None
"""A float32; None for one that was not finite."""

logger = logging.getLogger(__name__)


@pydantic.with_config(WITH_OTHER_KEYS)
class Step(TypedDict):
    """A step; one of fine-tuning has not all of it."""

    step: Count
    attempt: Count
    time: UnixTime
    loss: Measured
    tokens: NotRequired[Count]
    lr: NotRequired[Measured]
    grad_norm: NotRequired[Measured]
    mfu: NotRequired[Measured]
    memory_bytes: NotRequired[Count | None]
    step_seconds: NotRequired[Annotated[float, Field(gt=0, le=1e9)]]
    data_wait_seconds: NotRequired[Seconds]
    checkpoint_stall_seconds: NotRequired[Seconds]
    compile_seconds: NotRequired[Seconds]
    tokens_per_second: NotRequired[Annotated[float, Field(ge=0, le=1e18)]]


class Validation(TypedDict):
    step: Count
    attempt: Count
    time: UnixTime
    validation: dict[str, Measured]


@pydantic.with_config(WITH_OTHER_KEYS)
class Event(TypedDict):
    step: Count
    attempt: Count
    time: UnixTime
    event: str
    world_size: NotRequired[Annotated[int, Field(ge=1, lt=2**31)]]
    watts: NotRequired[Annotated[float, Field(ge=0, le=1e9)] | None]
    peak_flops_per_second: NotRequired[FlopsPerSecond]
    peak_source: NotRequired[str]
    peak_is_measured: NotRequired[bool]
    asked: NotRequired[UnixTime | None]
    began: NotRequired[UnixTime]
    reason: NotRequired[str]
    documents: NotRequired[list[str]]


def parse(data: bytes, path: str = MERGED, needed: tuple[str, ...] = ()) -> list[Record]:
    """The records of a file of metrics, without the lines that are none; `needed` are keys that steps must have."""
    records: list[Record] = []
    left_out: list[str] = []
    name = re.fullmatch(rf"{FOLDER}/(\d{{8,}})-(\d+)\.jsonl", path)
    reached, attempt = (int(name[1]), int(name[2])) if name else (0, None)
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        try:
            record = _record(line, reached, attempt, needed)
        except (ValueError, RecursionError) as error:
            left_out.append(f"line {number:,}: {' '.join(str(error).split()) or 'nested too deep'}")
            continue
        records.append(record)
        reached = max(reached, record["step"])
    if left_out:
        logger.warning(
            "%s: %s damaged and left out, the first %s", path,
            f"{len(left_out):,} of {len(records) + len(left_out):,} lines are", left_out[0][:200],
        )  # fmt: skip
    return records


def _record(line: bytes, reached: int, attempt: int | None, needed: tuple[str, ...]) -> Record:
    """A record; ValueError or RecursionError where the line holds none of this file."""
    record: Record = decode_json(line)
    if not isinstance(record, dict):
        raise ValueError("it is no record")
    shape: Any = Event if "event" in record else Validation if "validation" in record else Step
    if wrong := matches(record, shape):
        raise ValueError(wrong)
    if attempt is not None and record["attempt"] != attempt:
        raise ValueError(f"it is of attempt {record['attempt']}, the file of {attempt}")
    if record["step"] > reached + MOST_STEPS_LOST:
        raise ValueError(f"step {record['step']:,} follows step {reached:,}")
    if shape is Step and (lacking := [key for key in needed if key not in record]):
        raise ValueError(f"the step has no {lacking[0]}")
    return record
