"""How a run is asked to save and end: an object named `stop` in its folder, which worker 0 looks for.

Through storage, because a signal reaches the driver, the workers are on other nodes, and Ray Train hands them
nothing. It works from anywhere: put an empty object `stop` into the run's folder.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cluster.storage import Store
from cluster.store import StorageError
from trainers.background import Background

STOP = "stop"
# What it holds where the driver put it for the nodes' sake: more workers fit, a node of theirs drains, or the driver's.
GROW, DRAIN, HEAD_DRAINS = b"grow", b"drain", b"head drains"
FAILURE = "failure.txt"
"""Why a run cannot go on, if no restart would help: written by the worker that found it."""
# `ray job stop` sends SIGKILL 3 s after SIGTERM unless told otherwise; looking costs one small request.
POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


class StopRequest(Background):
    """Looks for the request in a thread of its own; asking it costs nothing."""

    def __init__(self, run: Store) -> None:
        super().__init__("stop request")
        self._store, self._found = run, threading.Event()

    def __call__(self) -> bool:
        return self._found.is_set()

    def _run(self) -> None:
        while not self._ended.wait(POLL_SECONDS) and not self._found.is_set():
            try:
                if self._store.exists(STOP):
                    self._found.set()
            except StorageError as error:
                logger.warning("cannot look for a request to stop, training goes on: %s", error)


@contextmanager
def stop_on_signal(run: Store) -> Iterator[threading.Event]:
    """Turn SIGTERM and Ctrl-C into the object, and set the event; the second signal ends the process at once."""
    asked, over = threading.Event(), threading.Event()

    def put() -> None:
        # Not in the handler, which holds up the main thread, and would end it where the store is away for long.
        while not over.is_set():
            try:
                return run.put(STOP, b"")
            except StorageError as error:
                print(f"cannot ask the workers to end, trying again: {error}", flush=True)
                over.wait(POLL_SECONDS)

    putting = threading.Thread(target=put, name="stop", daemon=True)

    def request(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        print(
            f"\n{signal.Signals(number).name}: the run saves after this step and ends; again: ends at once",
            flush=True,
        )
        if not asked.is_set():
            asked.set()
            putting.start()

    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        over.set()
        if asked.is_set():
            putting.join()
        run.delete(STOP)
