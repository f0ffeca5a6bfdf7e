"""How a run ends before its last step: asked to by an object named `stop` in its folder, or by an error for good.

Through storage, because a signal reaches the driver, the workers are on other nodes, and Ray Train hands them
nothing. It works from anywhere: put an empty object `stop` into the run's folder, and worker 0 finds it.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from cluster.storage.store import StorageError
from cluster.storage.uris import Store
from trainers.evaluation.verdict import TestSplitError
from trainers.recovery.background import Background
from trainers.recovery.guard import TrainingDiverged

if TYPE_CHECKING:  # seconds to import
    from trainers.engine.collectives import Workers

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
def stop_on_signal(*runs: Store) -> Iterator[threading.Event]:
    """Turn SIGTERM and Ctrl-C into the object, in each run's folder, and set the event; the second signal ends the
    process at once."""
    asked, over = threading.Event(), threading.Event()

    def put(run: Store) -> None:
        while not over.is_set():
            try:
                return run.put(STOP, b"")
            except StorageError as error:
                print(f"cannot ask the workers to end, trying again: {error}", flush=True)
                over.wait(POLL_SECONDS)

    def ask(name: str) -> None:
        # Not in the handler, which holds up the main thread, would end it where the store is away for long, and may
        # have interrupted it in what it takes to print or to put.
        print(f"\n{name}: the run saves after this step and ends; again: ends at once", flush=True)
        for run in runs:
            put(run)

    asking: list[threading.Thread] = []

    def request(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        asked.set()
        name = signal.Signals(number).name
        asking.append(threading.Thread(target=ask, args=(name,), name="stop", daemon=True))
        asking[-1].start()

    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        over.set()
        for thread in asking:
            thread.join()
        for run in runs:
            run.delete(STOP)


class RunStopped(RuntimeError):
    """The run was asked to stop, has saved, and is not done."""


class RunFailed(RuntimeError):
    """What ended the run would end it again, or has ended it too often: it was not started anew."""


def raise_final(run: Store) -> None:
    """RunFailed if a worker wrote down that no restart would help."""
    if run.exists(FAILURE):
        raise RunFailed(run.read(FAILURE).decode(errors="replace"))


@contextmanager
def telling_final_errors(run: Store, workers: "Workers | None" = None) -> Iterator[None]:
    """Write down an error that every further attempt would end with; the driver raises it, and starts none.

    Without `workers` this process is the only one.
    """
    try:
        yield
    except TrainingDiverged as error:
        # On all workers at once, but worker 0 alone has read what was in the step.
        if workers is None or workers.leads:
            run.put(FAILURE, str(error).encode())
        if workers:
            workers.broadcast(None)  # the first one that ends takes the others with it
        raise
    except (TestSplitError, ValueError) as error:
        run.put(FAILURE, str(error).encode())
        raise
