"""A run on Ray's workers, watched by the process that started it: its validations are read from its metrics."""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from cluster.storage.uris import StorageError, Store
from trainers.reporting.metrics import Record, validations_of
from trainers.reporting.progress import Tail

SCRAPE_SECONDS_VARIABLE = "PRETRAIN_SCRAPE_SECONDS"
"""How long a driver stays after its run's end, so that Prometheus sees it: more than its interval and Ray's 10 s."""


POLL_SECONDS = 2.0
"""The workers flush their metrics every 5 s."""

Result = TypeVar("Result")


def watched(
    run: Store,
    work: Callable[[], Result],
    on_validation: Callable[[int, Mapping[str, float]], None],
    told: int = 0,
) -> Result:
    """Do `work` in a thread of its own, and tell of each validation that the run's metrics show meanwhile, in the
    thread of the caller: finished steps, and what was measured, NaN where it was no number.

    Args:
        told: steps up to which the caller knows of the validations.
    """
    tail = Tail(run, whole=True)
    thread = ThreadPoolExecutor(1, thread_name_prefix="watched")
    try:
        working = thread.submit(work)
        while not working.done():
            wait([working], POLL_SECONDS)
            for record in new_validations(tail):
                if record["step"] > told:
                    told = record["step"]
                    found = record["validation"].items()
                    on_validation(told, {key: math.nan if value is None else value for key, value in found})
        return working.result()
    finally:
        thread.shutdown(wait=False)  # interrupted, it ends with the Ray session


def new_validations(tail: Tail) -> list[Record]:
    """What came to the metrics on storage since the last call; nothing while the storage does not answer."""
    try:
        return validations_of(tail.poll())
    except StorageError:
        return []
