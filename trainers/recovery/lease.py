"""Who drives a run: one driver at a time, told by objects in the run's folder that only a living one renews.

    drivers/00000003.json      who drove it third: place, process and a token; written once, if absent
    drivers/00000003.renewed   how often that driver said that it lives
    drivers/00000003.ended     that it left

The greatest number drives. Taking over writes the next number, which one driver alone can, and no driver writes over
another's object: a renewal that a slow store or a repeated request carries out minutes later takes the run from nobody.
Nothing is deleted, so that no number is written twice: whoever counted from a listing that was old by then finds its
number taken, and looks again.

No clocks are compared, for two hosts' may differ, and one may be set while a run lives: whoever finds another's lease
watches whether it is renewed.

A driver that was away for longer than that (a suspended machine, a partition) finds another's lease, or none, where
its own was, and ends at once, without saving. Each gentler way does harm: an exception in the main thread waits for
Ray Train's, whose workers meanwhile write beside the successor's, and a signal asks for `stop`, which the successor
obeys. Nothing is lost, for the successor goes on from the newest commit, and Ray ends the workers of a driver that is
gone.
"""

import json
import os
import re
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import psutil
import pydantic
from pydantic import Field
from typing_extensions import TypedDict

from cluster.configuration.stored_file import WITH_OTHER_KEYS, DamagedFileError, read_json
from cluster.console.errors import ConfigError
from cluster.storage.uris import StorageError, Store

FOLDER = "drivers"
RENEW_SECONDS = 5.0
# Three missed renewals, of which a slow store may explain two.
PATIENCE_SECONDS = 15.0
BOOT = Path("/proc/sys/kernel/random/boot_id")


class RunTakenError(ConfigError):
    """Another driver lives that drives this run: `holder`."""

    def __init__(self, run: Store, holder: str) -> None:
        self.holder = holder
        super().__init__(
            [
                f"run.name: {run.uri} is being driven by {holder}; stop that one (an empty object `stop` in the run's "
                "folder does it), or choose another name"
            ]
        )


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
        patience: seconds without a renewal after which a driver in another place is taken for dead.
        on_lost: is told, in a thread of its own, that the run is another's by now: nothing may be written any more.

    Raises:
        RunTakenError: another driver renews its lease.
    """
    own = {
        **place(),
        "pid": os.getpid(),
        "process_started": seconds_after_boot(psutil.Process()),
        "token": uuid.uuid4().hex,
    }
    number = take(run, own, say, patience)
    run.sweep()  # what a killed driver, or a worker of its, was writing
    ended = threading.Event()
    renewing = threading.Thread(
        target=renew, args=(run, number, own, ended, on_lost), name="lease", daemon=True
    )
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        if is_held(run, number, own):
            run.put(path_of(number, "ended"), b"")


def take(run: Store, own: dict[str, Any], say: Callable[[str], None], patience: float) -> int:
    """Make the next lease this driver's own, once the newest is nobody's any more; its number."""
    while True:
        last = newest(run)
        if last:
            refuse_living(run, last, say, patience)
        # Of several that take over, one makes it; the others find that it lives.
        if run.put_if_absent(path_of(last + 1, "json"), json.dumps(own, allow_nan=False).encode()):
            return last + 1


def path_of(number: int, what: str) -> str:
    return f"{FOLDER}/{number:08d}.{what}"


def newest(run: Store) -> int:
    """The number of the newest lease; 0 if there is none. Files with other names are nobody's lease."""
    leases = (re.fullmatch(rf"{FOLDER}/(\d{{8,12}})\.json", info.path) for info in run.list(f"{FOLDER}/"))
    return max((int(lease[1]) for lease in leases if lease), default=0)


@pydantic.with_config(WITH_OTHER_KEYS)
class Holder(TypedDict):
    """Who drives: content of `NUMBER.json`, beside `place()`."""

    host: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    process_started: float
    token: str


def read_holder(run: Store, number: int) -> dict[str, Any]:
    """Raises FileNotFoundError, or DamagedFileError."""
    remedy = "it is held for as long as its driver renews it"
    return read_json(run, path_of(number, "json"), Holder, remedy)


def place() -> dict[str, str]:
    """What two processes have in common that see each other by their numbers. The host's name alone does not say it: a
    container may bear the name of the machine, and two machines the same."""
    found = {"host": socket.gethostname()}
    if BOOT.exists():  # not on macOS
        found |= {"boot": BOOT.read_text().strip(), "pid_namespace": os.readlink("/proc/self/ns/pid")}
    return found


def seconds_after_boot(process: psutil.Process) -> float:
    """When a process started: by the clock it would be another time once the clock is set."""
    return round(process.create_time() - psutil.boot_time(), 2)


def is_held(run: Store, number: int, own: dict[str, Any]) -> bool:
    """Whether the newest lease is this driver's. A damaged one is: who takes over writes another."""
    if newest(run) != number:
        return False
    try:
        return read_holder(run, number)["token"] == own["token"]
    except FileNotFoundError:
        return False
    except DamagedFileError:
        return True


def renew(
    run: Store, number: int, own: dict[str, Any], ended: threading.Event, on_lost: Callable[[str], None]
) -> None:
    """Show that this driver lives, until it ends or the run is another's.

    A store that does not answer is asked again at the next turn: whoever reads from it has the same trouble.
    """
    renewals = 0
    while not ended.wait(RENEW_SECONDS):
        renewals += 1
        try:
            if not is_held(run, number, own):
                return on_lost(lost(run))
            run.put(path_of(number, "renewed"), str(renewals).encode())
        except StorageError:
            continue


def lost(run: Store) -> str:
    try:
        holder = read_holder(run, newest(run))
        who = f"process {holder['pid']} on {holder['host']} drives it now"
    except FileNotFoundError:
        who = f"its {FOLDER}/ is gone"
    except DamagedFileError:
        who = "by whom cannot be read"
    return (
        f"{run.uri}: this driver did not answer for so long that the run was taken from it ({who}); it ends without "
        "saving; run the same command again only if no other goes on with the run"
    )


def refuse_living(run: Store, number: int, say: Callable[[str], None], patience: float) -> None:
    """Return once that lease's holder has left, or is dead; RunTakenError if it lives."""
    if run.exists(path_of(number, "ended")):
        return
    try:
        holder = read_holder(run, number)
        who = f"process {holder['pid']} on {holder['host']}"
    except DamagedFileError as damaged:
        holder, who = {}, f"an unknown process ({damaged})"
    if place().items() <= holder.items():
        if not lives(holder):
            return
    else:
        say(f"{run.uri} was driven by {who}; waiting {patience:.0f} s to see whether it still is")
        if not is_renewed(run, number, patience):
            return
    raise RunTakenError(run, who)


def lives(holder: dict[str, Any]) -> bool:
    """Whether the holder's process, of this place, is still there; its number may be another process's by now."""
    try:
        process = psutil.Process(holder["pid"])
        # What was killed stays there as a zombie until its parent asks for it.
        is_dead = process.status() == psutil.STATUS_ZOMBIE
        return not is_dead and seconds_after_boot(process) == holder["process_started"]
    except psutil.NoSuchProcess:
        return False


def is_renewed(run: Store, number: int, patience: float) -> bool:
    """Whether that lease is renewed within the patience; not if its driver leaves meanwhile."""
    seen, pause = renewals_of(run, number), threading.Event()
    for _ in range(3):
        pause.wait(patience / 3)
        if run.exists(path_of(number, "ended")):
            return False
        if renewals_of(run, number) != seen:
            return True
    return False


def renewals_of(run: Store, number: int) -> bytes:
    try:
        return run.read(path_of(number, "renewed"))
    except FileNotFoundError:
        return b""
