"""Which checkpoints a run has: how often one is made, which to go on from, which to keep.

A checkpoint is what `trainers/checkpoints/commit.py` calls valid; folders without a commit record are not
checkpoints, whatever stands in them. All functions take the run's store, which holds `checkpoints/` and
`best.json`.
"""

import logging
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from cluster.configuration.keys import may_change
from cluster.configuration.stored_file import DamagedFileError, place_of, read_json
from cluster.storage.uris import Store
from trainers.checkpoints.commit import (
    FOLDER,
    RECORD,
    CheckpointRecord,
    faults,
    file_path,
    is_checkpoint_file,
    parse_folder_name,
    read_record,
)
from trainers.checkpoints.layout import CheckpointError
from trainers.stored.run_files import Best

BEST = "best.json"
ATTEMPTS = "attempts"

Gather = Callable[[Any], list[Any]]
"""A collective: all workers' values in the order of their ranks, on every worker."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often a run is saved, and which checkpoints are kept."""

    every_steps: int = may_change(500)
    """Steps between two checkpoints."""
    keep_last: int = may_change(2)
    """Newest checkpoints that are kept. With 1, a damaged one leaves nothing to go back to."""
    keep_every_steps: int = may_change(0)
    """Checkpoints at multiples of this many steps are kept for good; 0: none but the best and the last."""
    file_bytes: int = may_change(64 << 20)
    """Largest file that a worker writes; also the unit of its host memory, of upload and of retry."""
    upload_threads: int = may_change(4)
    """Files that one worker uploads at the same time."""
    commit_timeout_seconds: float = may_change(900.0)
    """How long worker 0 waits for the others' parts before it gives the checkpoint up."""

    def problems(self, at: str) -> Iterator[str]:
        for key in ("every_steps", "keep_last", "upload_threads"):
            if getattr(self, key) < 1:
                yield f"{at}.{key}={getattr(self, key)} must be at least 1"
        if self.keep_every_steps < 0:
            yield f"{at}.keep_every_steps={self.keep_every_steps} is negative; 0 keeps none for good"
        elif self.every_steps > 0 and self.keep_every_steps % self.every_steps:
            nearest = max(1, round(self.keep_every_steps / self.every_steps)) * self.every_steps
            yield (
                f"{at}.keep_every_steps={self.keep_every_steps} is not a multiple of "
                f"{at}.every_steps={self.every_steps}; nearest: {nearest}"
            )
        if not 2 << 20 <= self.file_bytes <= 4 << 30:
            yield f"{at}.file_bytes={self.file_bytes:,} must be 2 MiB to 4 GiB: S3 takes 5 GB in one put"
        if self.commit_timeout_seconds <= 0:
            yield f"{at}.commit_timeout_seconds={self.commit_timeout_seconds} must be positive"


def alone(value: Any) -> list[Any]:
    """The `Gather` of a single process."""
    return [value]


def claim_attempt(store: Store, world_size: int = 1) -> int:
    """A number that no other start of this run has, above all former ones. One worker calls it per start."""
    attempt = latest_attempt(store) + 1
    while not store.put_if_absent(f"{ATTEMPTS}/{attempt:05d}", str(world_size).encode()):
        attempt += 1
    return attempt


def latest_attempt(store: Store) -> int:
    """The number claimed last; 0 if none was. Files with other names are nobody's claim."""
    claims = (re.fullmatch(rf"{ATTEMPTS}/([0-9]{{5,9}})", info.path) for info in store.list(f"{ATTEMPTS}/"))
    return max((int(claim[1]) for claim in claims if claim), default=0)


def latest_world_size(store: Store) -> int:
    """Workers of the newest start; 0 before the first. Raises `DamagedFileError`."""
    if not (attempt := latest_attempt(store)):
        return 0
    path = f"{ATTEMPTS}/{attempt:05d}"
    content = store.read(path)  # of older runs it is empty
    if not re.fullmatch(rb"\d{0,9}", content):
        wrong = f"{content[:20]!r} is no number of workers"
        raise DamagedFileError(place_of(store, path), wrong, "the next start of the run writes another")
    return int(content or 1)


def committed(store: Store) -> list[str]:
    """Names of the checkpoints that have a commit record, newest first: by step, then by attempt."""
    names = {name for name, files in _folders(store).items() if RECORD in files}
    return sorted(names, key=_age, reverse=True)


def latest_checkpoint(
    store: Store,
    *,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = alone,
    sections: Collection[str] = (),
) -> CheckpointRecord | None:
    """The newest committed checkpoint whose every file has the recorded size and hash; None if there is none.

    A damaged one is refused with a warning that names the file, and the one before is taken; so is one whose trainer's
    state lacks one of `sections`, objects that the trainer goes on from. With several workers, all take what worker 0
    sees, each verifies every `world_size`-th file, and all learn the outcome.
    """
    for name in gather(committed(store))[0]:
        record, found = _examine(store, name, rank, world_size, gather, sections)
        if record is not None and not found:
            return record
        if rank == 0:
            logger.warning("checkpoint %s is refused, the one before is taken: %s", name, _some(found))
    return None


def checkpoint_at(
    store: Store,
    which: int | Literal["best", "last"],
    *,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = alone,
) -> CheckpointRecord:
    """The checkpoint after that many steps, the one that validation chose, or the newest good one.

    Several workers join as in `latest_checkpoint`. CheckpointError if there is none or, for a step and for
    `best`, if it is damaged: who asks for one checkpoint gets no other.
    """
    if which == "last":
        record = latest_checkpoint(store, rank=rank, world_size=world_size, gather=gather)
        if record is None:
            raise CheckpointError(f"{store.uri}/{FOLDER} holds no good checkpoint")
        return record
    names = committed(store)
    wanted = best_name(store) if which == "best" else next((n for n in names if _age(n)[0] == which), None)
    name = gather(wanted if wanted in names else None)[0]
    if name is None:
        steps = sorted({_age(name)[0] for name in names})
        wanted = which if which == "best" else f"step {which}"
        raise CheckpointError(f"no checkpoint for {wanted} in {store.uri}/{FOLDER}; steps: {steps}")
    record, found = _examine(store, name, rank, world_size, gather)
    if record is None or found:
        raise CheckpointError(f"checkpoint {name} is damaged: {_some(found)}")
    return record


def best_name(store: Store) -> str | None:
    """Name of the checkpoint in `best.json` (its key `checkpoint`); None before the first validation. Raises
    `DamagedFileError`."""
    best = read_best(store)
    return best and best["checkpoint"]


def read_best(store: Store) -> Best | None:
    """Content of `best.json`; None before the first validation. Raises `DamagedFileError`."""
    remedy = (
        "delete it: the next validation that is better writes it anew, and until then name a step, not best"
    )
    try:
        return read_json(store, BEST, Best, remedy)
    except FileNotFoundError:
        return None


def retire(store: Store, config: CheckpointConfig, newest: str, resumed_step: int | None = None) -> list[str]:
    """Delete what is no longer kept; the names. Called by worker 0 alone, after it committed `newest`.

    Kept: the last k by step, every n-th, and the best. An earlier attempt's after `resumed_step`, where this attempt
    went on, were refused as damaged then: they are not among the k, and go once the run has passed them. The record
    goes first: one that is half deleted is not a checkpoint. Folders without a record are leftovers if an earlier
    attempt made them, or this one before `newest`, since each worker writes one checkpoint after the other; what a
    later attempt writes is never touched.
    """
    folders = _folders(store)
    own_step, own_attempt = _age(newest)
    names = sorted((name for name, files in folders.items() if RECORD in files), key=_age, reverse=True)
    refused = {
        name for name in names
        if resumed_step is not None and _age(name)[1] < own_attempt and _age(name)[0] > resumed_step
    }  # fmt: skip
    kept = {newest, best_name(store), *[name for name in names if name not in refused][: config.keep_last]}
    kept |= {name for name in refused if _age(name)[0] > own_step}
    if config.keep_every_steps:
        kept |= {name for name in names if _age(name)[0] % config.keep_every_steps == 0}
    old = [name for name in names if name not in kept and _age(name)[1] <= own_attempt]
    torn = [
        name for name in folders.keys() - set(names)
        if (_age(name)[1], _age(name)[0]) < (own_attempt, own_step)
    ]  # fmt: skip
    for name in old:
        store.delete(file_path(name, RECORD))
    for name in (*old, *torn):
        for file in folders[name] - {RECORD}:
            store.delete(file_path(name, file))
    store.sweep(FOLDER)
    return [*old, *torn]


def _folders(store: Store) -> dict[str, set[str]]:
    """Checkpoint folders, committed or not, and the names of those files in each that a writer wrote."""
    folders: dict[str, set[str]] = {}
    for info in store.list(f"{FOLDER}/"):
        if is_checkpoint_file(info.path):
            _, name, file = info.path.split("/")
            folders.setdefault(name, set()).add(file)
    return folders


def _age(name: str) -> tuple[int, int]:
    parsed = parse_folder_name(name)
    assert parsed is not None, name
    step, _, attempt = parsed
    return step, attempt


def _examine(
    store: Store, name: str, rank: int, world_size: int, gather: Gather, sections: Collection[str] = ()
) -> tuple[CheckpointRecord | None, list[str]]:
    """The record, if it is good, and all that any worker finds wrong with its share of the checkpoint."""
    record, found = None, []
    try:
        record = read_record(store, name)
        found = [
            f"{file_path(name, RECORD)} is malformed: 'run' has no object {section!r}"
            for section in sections
            if not isinstance(record.run.get(section), dict)
        ] or faults(store, record, record.files[rank::world_size])
    except (CheckpointError, FileNotFoundError) as error:
        found = [str(error)]
    return record, [fault for of_worker in gather(found) for fault in of_worker]


def _some(found: Collection[str], limit: int = 5) -> str:
    shown = "; ".join(list(found)[:limit])
    return shown if len(found) <= limit else f"{shown}; and {len(found) - limit:,} more"
