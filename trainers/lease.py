"""Who drives a run: one driver at a time, told by an object in the run's folder that only a living one renews.

No clocks are compared, for two hosts' may differ: whoever finds another's lease watches whether it changes.

A driver that was away for longer than that (a suspended machine, a partition) finds another's lease, or none, where
its own was, and ends at once, without saving. Each gentler way does harm: an exception in the main thread waits for
Ray Train's, whose workers meanwhile write beside the successor's, and a signal asks for `stop`, which the successor
obeys. Nothing is lost, for the successor goes on from the newest commit, and Ray ends the workers of a driver that is
gone.
"""

import json
import os
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from cluster.config import ConfigError
from cluster.storage import StorageError, Store

LEASE = "driver.json"
RENEW_SECONDS = 5.0
# Three missed renewals, of which a slow store may explain two.
PATIENCE_SECONDS = 15.0
# Longer than it takes between reading a dead driver's lease and writing over it.
SETTLE_SECONDS = 1.0


class RunTakenError(ConfigError):
    """Another driver lives that drives this run."""


def end_process(message: str) -> None:
    """End this process as kill -9 would, with a word about why."""
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


@contextmanager
def lease(
    run: Store,
    say: Callable[[str], None] = print,
    patience: float = PATIENCE_SECONDS,
    on_lost: Callable[[str], None] = end_process,
) -> Iterator[None]:
    """Hold the run for the length of a with-block; a dead driver's lease is taken over.

    Args:
        say: is told if there is something to wait for.
        patience: seconds without a renewal after which a driver on another host is taken for dead.
        on_lost: is told, in a thread of its own, that the run is another's by now: nothing may be written any more.

    Raises:
        RunTakenError: another driver renews its lease.
    """
    own = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "token": uuid.uuid4().hex,
    }
    while not run.put_if_absent(LEASE, content(own, 0)):
        refuse_living(run, say, patience)
        # Over the dead one's, not after deleting it: of several that take over, the last to write holds it.
        run.put(LEASE, content(own, 0))
        threading.Event().wait(SETTLE_SECONDS)
        if is_held(run, own):
            break
    ended = threading.Event()
    renewing = threading.Thread(target=renew, args=(run, own, ended, on_lost), name="lease", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        if is_held(run, own):
            run.delete(LEASE)


def content(own: dict[str, Any], renewals: int) -> bytes:
    return json.dumps({**own, "renewals": renewals}).encode()


def holder_of(run: Store) -> dict[str, Any] | None:
    """What the lease says; None if there is none."""
    try:
        return json.loads(run.read(LEASE))
    except FileNotFoundError:
        return None


def is_held(run: Store, own: dict[str, Any]) -> bool:
    """Whether the lease that is there is this driver's."""
    holder = holder_of(run)
    return holder is not None and holder["token"] == own["token"]


def renew(run: Store, own: dict[str, Any], ended: threading.Event, on_lost: Callable[[str], None]) -> None:
    """Show that this driver lives, until it ends or the run is another's.

    A store that does not answer is asked again at the next turn: whoever reads from it has the same trouble.
    """
    renewals = 0
    while not ended.wait(RENEW_SECONDS):
        renewals += 1
        try:
            if not is_held(run, own):
                return on_lost(lost(run))
            run.put(LEASE, content(own, renewals))
        except StorageError:
            continue


def lost(run: Store) -> str:
    holder = holder_of(run)
    who = f"process {holder['pid']} on {holder['host']} drives it now" if holder else f"its {LEASE} is gone"
    return (
        f"{run.uri}: this driver did not answer for so long that the run was taken from it ({who}); it ends without "
        "saving; run the same command again only if no other goes on with the run"
    )


def refuse_living(run: Store, say: Callable[[str], None], patience: float) -> None:
    """Return once the lease is gone or its holder is dead; RunTakenError if it lives."""
    try:
        seen = run.read(LEASE)
    except FileNotFoundError:
        return
    holder = json.loads(seen)
    who = f"process {holder['pid']} on {holder['host']}"
    if holder["host"] == socket.gethostname():
        if not lives(holder):
            return
    else:
        say(f"{run.uri} was driven by {who}; waiting {patience:.0f} s to see whether it still is")
        if not changes(run, seen, patience):
            return
    raise RunTakenError(
        [
            f"run.name: {run.uri} is being driven by {who}; stop that one (an empty object `stop` in the run's "
            "folder does it), or choose another name"
        ]
    )


def lives(holder: dict[str, Any]) -> bool:
    """Whether the holder's process is still there, on this host; its number may be another process's by now."""
    try:
        return psutil.Process(holder["pid"]).create_time() == holder["process_started"]
    except psutil.NoSuchProcess:
        return False


def changes(run: Store, seen: bytes, patience: float) -> bool:
    """Whether the lease is renewed within the patience."""
    pause = threading.Event()
    for _ in range(3):
        pause.wait(patience / 3)
        try:
            if run.read(LEASE) != seen:
                return True
        except FileNotFoundError:
            return False
    return False
