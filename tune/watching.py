"""A run on Ray's workers, watched from the trial that started it: its validations are read from its metrics."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from cluster.storage import Store
from trainers.metrics import read_metrics

POLL_SECONDS = 2.0
"""The workers flush their metrics every 5 s."""

Result = TypeVar("Result")


def watched(
    run: Store, work: Callable[[], Result], on_validation: Callable[[int, Mapping[str, float]], None]
) -> Result:
    """Do `work` in a thread of its own, and tell of each validation that the run's metrics show meanwhile, in the
    thread of the caller: finished steps, and what was measured."""
    told = 0
    with ThreadPoolExecutor(1, thread_name_prefix="trial") as thread:
        working = thread.submit(work)
        while not working.done():
            wait([working], POLL_SECONDS)
            for record in read_metrics(run):
                if "validation" in record and record["step"] > told:
                    told = record["step"]
                    on_validation(told, record["validation"])
    return working.result()
