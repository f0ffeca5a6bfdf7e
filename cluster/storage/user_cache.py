"""A folder of this user's alone, for copies that others may neither read nor put theirs in the place of."""

import atexit
import functools
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from cluster.console.errors import UserError
from cluster.storage.scratch import scratch_folder

NAME = "ray-pretraining"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_REMEDY = "or set XDG_CACHE_HOME to a folder of your own"
logger = logging.getLogger(__name__)


class PrivateFolderError(UserError):
    """A folder or file that should be this user's alone is not."""


def user_cache() -> Path:
    """The project's folder in the user's cache: $XDG_CACHE_HOME or ~/.cache, with mode 0700.

    Where there is none that can be written, as in a container without a home, a new folder that lasts as long as this
    process; a warning says so.

    Raises:
        PrivateFolderError: it is somebody else's, open to others, or a link.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        base = given if given.is_absolute() else Path.home() / ".cache"  # as its specification has it
        folder = base / NAME
        if not folder.is_symlink() and not folder.exists():
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        return process_folder(f"there is no cache of this user's ({error})")
    check_private(folder)
    return folder if os.access(folder, os.W_OK | os.X_OK) else process_folder(f"{folder} cannot be written")


def check_private(folder: Path) -> None:
    """Raise PrivateFolderError unless this is a folder, no link to one, of this user's, and closed to others."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise PrivateFolderError(f"{folder} is a link or no folder; remove it, {_REMEDY}")
    _check(folder, status)


def check_contents(folder: Path) -> None:
    """Raise PrivateFolderError unless all that lies in a folder is folders and files of this user's alone, no links."""
    for path in _below(folder):
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
            raise PrivateFolderError(f"{path} is neither a file nor a folder; remove {folder}")
        _check(path, status)


def write_private(folder: Path, path: str, data: bytes) -> None:
    """Write a new file with mode 0600 at a path below a folder; folders on the way get 0700."""
    *parents, name = Path(path).parts
    for part in parents:
        folder = folder / part
        folder.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "wb") as file:
        file.write(data)


def _below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):  # which follows no links
        yield from (Path(parent, name) for name in (*folders, *files))


def _check(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise PrivateFolderError(
            f"{path} belongs to user {status.st_uid}, who may have put it there for you, user {os.geteuid()}; "
            f"remove it, {_REMEDY}"
        )
    if status.st_mode & _OTHERS:
        mode = stat.S_IMODE(status.st_mode)
        raise PrivateFolderError(f"{path} has mode {mode:04o}, open to others; chmod go= it, {_REMEDY}")


@functools.cache
def process_folder(reason: str) -> Path:
    """A new folder of this user's alone that goes with this process, in place of a lasting one; a warning says why."""
    held, owner = ExitStack(), os.getpid()
    folder = held.enter_context(scratch_folder()) / NAME
    folder.mkdir(mode=0o700)
    logger.warning(
        "%s: %s is used, for this process alone; set XDG_CACHE_HOME on each node to a folder that this user can write",
        reason,
        folder,
    )

    def remove() -> None:
        if os.getpid() == owner:  # a process that was forked would remove it from under this one
            held.close()

    atexit.register(remove)
    return folder
