"""What a sweep keeps of each trial: `trials/NAME/trial.json` when it starts, `outcome.json` when it ends.

A trial is named by what it is: the digest of its point and seed. So a sweep that was killed finds what is finished, and
starts what was running under its old name, where it goes on from its checkpoints.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from cluster.configuration.stored_file import DamagedFileError, place_of, read_json
from cluster.storage.uris import Store
from trainers.finetuning.loop import is_state
from trainers.reporting.metrics import finite
from tune.search.space import Point

FOLDER, STARTED, OUTCOME, ERROR = "trials", "trial.json", "outcome.json", "error.txt"
_RAY = re.compile(r"ray/[0-9a-f]{12}/.+")
"""What Ray Train keeps of a run, in a folder that trainers/pretraining/driver.py names."""
_SCRATCH = re.compile(r"ray/start-\d{16,20}/.+")
"""What Tune keeps of a start of a search, in a folder that tune/trials/trials.py names."""
Status = Literal["finished", "stopped", "failed", "unfinished"]


@dataclass(frozen=True)
class TrialRecord:
    """One trial, as far as it is known."""

    name: str
    point: Point
    seed: int
    number: int
    """Order of starting, from 1."""
    status: Status = "unfinished"
    score: float | None = None
    """Best validation score, more is better; None if there was none."""
    seconds: float = 0.0
    """From start to end, of the last start."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """Of the last validation that was reported."""
    error: str = ""
    """Why it failed."""


def trial_name(point: Point, seed: int) -> str:
    """12 hexadecimal digits of what is tried."""
    return hashlib.blake2b(
        json.dumps([sorted(point.items()), seed], allow_nan=False).encode(), digest_size=6
    ).hexdigest()


def record_start(sweep: Store, record: TrialRecord) -> None:
    """Write down what is tried; that of an earlier start stays."""
    sweep.put_if_absent(
        f"{FOLDER}/{record.name}/{STARTED}", json.dumps(asdict(record), allow_nan=False).encode()
    )


def record_outcome(sweep: Store, record: TrialRecord) -> None:
    """Write down how a trial ended; the first ending counts."""
    content = json.dumps(finite(asdict(record)), indent=2, allow_nan=False)
    sweep.put_if_absent(f"{FOLDER}/{record.name}/{OUTCOME}", content.encode())


def read_trials(sweep: Store) -> list[TrialRecord]:
    """All trials of the sweep, in the order of starting."""
    found: dict[str, TrialRecord] = {}
    for info in sweep.list(f"{FOLDER}/"):
        _, name, *file = info.path.split("/")
        if file in ([STARTED], [OUTCOME]) and (file == [OUTCOME] or name not in found):
            found[name] = read_trial(sweep, name, info.path)
    return sorted(found.values(), key=lambda record: record.number)


def read_trial(sweep: Store, name: str, path: str) -> TrialRecord:
    """What a file says of the trial of that name. Raises `DamagedFileError`."""
    remedy = f"put it back from a copy, or delete {FOLDER}/{name}/: the trial is done anew"
    record: TrialRecord = read_json(sweep, path, TrialRecord, remedy, not_finite=True)
    if not record.name == name == trial_name(record.point, record.seed):
        wrong = f"it is of the point {trial_name(record.point, record.seed)}"
        raise DamagedFileError(place_of(sweep, path), wrong, remedy)
    return without_diverged_score(record)


def without_diverged_score(record: TrialRecord) -> TrialRecord:
    """The record as failed where its loss is not finite: older versions kept such a trial's accuracy as its score."""
    loss = record.metrics.get("loss", 0.0)
    if record.score is None or (loss is not None and math.isfinite(loss)):
        return record
    return replace(record, status="failed", score=None, error="DivergedModelError: the loss is not finite")


def discard_scratch(sweep: Store) -> None:
    """Remove what Tune kept of starts that are over: a killed one's would stay, with a folder for each trial."""
    for info in sweep.list("ray/"):
        if _SCRATCH.fullmatch(info.path):
            sweep.delete(info.path)


def discard_checkpoints(sweep: Store, name: str) -> None:
    """Remove what a trial that has ended would have gone on from: of large models it would fill the storage."""
    for info in sweep.list(f"{FOLDER}/{name}/"):
        path = re.sub(r"^(seed-\d+)/", "", info.path.removeprefix(f"{FOLDER}/{name}/"))
        if is_state(path) or _RAY.fullmatch(path):
            sweep.delete(info.path)
