"""Folders for local files of a piece of work: removed at its end, or swept by the next process if its own was killed.

A living process holds a lock on its folder, which the kernel frees however the process ends; a process id alone may be
another's by then.
"""

import fcntl
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from cluster.storage.store import StorageError

_LOCK, _FILES = "lock", "files"
_REMEDY = "free space there, or set TMPDIR to a folder that this user may write and that has room"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder below TMPDIR, with all that is in it for as long as the context lasts.

    Raises:
        StorageError: there is no folder for temporary files that can be written.
    """
    with writing_locally():
        place = tempfile.gettempdir()
        _sweep(place)
        folder, lock = _locked_folder(place)
    try:
        with writing_locally():
            (folder / _FILES).mkdir()
        yield folder / _FILES
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what stays is swept by another process
        os.close(lock)


@contextmanager
def writing_locally() -> Iterator[None]:
    """Tells in one line with a remedy where a local file could not be written."""
    try:
        yield
    except StorageError:
        raise
    except OSError as failed:
        place = tempfile.tempdir or "TMPDIR"
        cause = os.strerror(failed.errno) if failed.errno else str(failed)
        raise StorageError(f"{place}: cannot write temporary files: {cause}; {_REMEDY}") from failed


def problem_writing_locally(num_bytes: int) -> str | None:
    """Why this machine has no room for temporary files of so many bytes, in one line; None if it has. Tries it."""
    try:
        with scratch_folder() as folder, writing_locally():
            free = shutil.disk_usage(folder).free
            (folder / "probe").write_bytes(bytes(2**16))
    except StorageError as error:
        return str(error)
    if free < num_bytes:
        return f"{tempfile.gettempdir()}: {free:,} bytes are free, a piece of work may take {num_bytes:,}; {_REMEDY}"
    return None


def _prefix() -> str:
    return f"pretraining-scratch-{socket.gethostname()}-"


def _locked_folder(place: str) -> tuple[Path, int]:
    """A new folder, and a descriptor that locks it. One that is swept before it is locked is made again."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_prefix()}{os.getpid()}-", dir=place))
        with suppress(FileNotFoundError):
            lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            with suppress(OSError):  # a file system without locks: no sweeper gets one there either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock).st_nlink:
                return folder, lock
            os.close(lock)


@cache
def _sweep(place: str) -> None:
    """Remove what killed processes of this user left on this host. Other hosts' locks may not be seen from here."""
    name = re.compile(re.escape(_prefix()) + r"\d+-[a-z0-9_]{8}")
    with os.scandir(place) as entries:
        for entry in [each for each in entries if name.fullmatch(each.name)]:
            with suppress(FileNotFoundError):  # its owner, or another sweeper, was first
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
                    _remove_if_abandoned(Path(entry.path))


def _remove_if_abandoned(folder: Path) -> None:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:  # not locked yet; if its process lives it makes another one
        with suppress(OSError):
            folder.rmdir()
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # it lives
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
