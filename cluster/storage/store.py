"""What a store of objects is, wherever its objects lie. `cluster.storage.uris` opens one by URI."""

import contextlib
import errno
import logging
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import quote

from cluster.console.printable import printable

logger = logging.getLogger(__name__)

# Of a file from `open`: at 30 ms a request, 1 MiB is 33 MB/s; who needs more reads larger ranges.
READ_AHEAD_BYTES = 1 << 20
PATIENCE = "STORE_PATIENCE_SECONDS"
"""Variable of the environment: for how long a store may be away."""
TOO_SHORT = "it was cut or replaced since its size was noted: write it again"
_HARD_LINKS = "choose a file system with hard links: that only one job owns a run stands on them"

REMEDIES = {
    errno.EACCES: "give this user the right",
    errno.EPERM: _HARD_LINKS,
    errno.ENOTSUP: _HARD_LINKS,
    errno.ENOSYS: _HARD_LINKS,
    errno.ENOSPC: "free space on the disk",
    errno.EROFS: "choose a folder on a writable disk",
    errno.ENOTDIR: "a part of the path is a file: correct the URI",
    errno.ELOOP: "links lead in a circle there: remove them",
    errno.ENXIO: "put a regular file in its place, or take it away",
}


class StorageError(OSError):
    """An operation that failed for good; the message names what, where, why and what helps."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long a request may take, and for how long a store may be away."""

    connect_seconds: float = 5
    """To connect: milliseconds within a region, and a lost first packet is sent again after 1 s and 3 s."""
    silence_seconds: float = 20
    """Between two packets of an answer. S3 sends its first within a second: 20 s is a dead connection."""
    give_up_seconds: float = 120
    """From the first failure: a store that restarts is back by then. `open_store` says how to raise it."""


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing tells: path within the store, size, and a version that changes with the content."""

    path: str
    num_bytes: int
    version: str
    """The entity tag of S3, the generation of Google's, MODIFIED-SIZE-CHANGED of a file, in nanoseconds and bytes."""


def former_version(version: str) -> str:
    """A version as it was noted before that of a file had the time of its last change, which `cp -p` cannot set."""
    return "-".join(version.split("-")[:2])


@dataclass(frozen=True)
class Store(ABC):
    """Objects under one URI. Paths are relative to it, with "/" between their parts.

    Every method raises `StorageError` when it fails for good, `FileNotFoundError` where an object is absent,
    and `ValueError` for a path that leads out of the store.
    """

    uri: str
    policy: RetryPolicy = field(default=RetryPolicy(), repr=False)

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The whole object."""

    @abstractmethod
    def read_range(self, path: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`."""

    @abstractmethod
    def open(self, path: str) -> BinaryIO:
        """The object as a seekable file for reading, fetched as it is read."""

    @abstractmethod
    def put(self, path: str, data: bytes | memoryview) -> None:
        """Write the object, over one that is there. Readers see the old one or the new one, whole."""

    @abstractmethod
    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write the object unless there is one. True for exactly one of any number of callers at any time."""

    @abstractmethod
    def upload(self, local: Path, path: str) -> None:
        """As `put`, from a file of any size."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of the object."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove the object; an absent one is no error."""

    @abstractmethod
    def scan(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """As `list`, in no order and without holding all."""

    @abstractmethod
    def clock(self) -> float:
        """Unix time by the store's own clock, some of which tell whole seconds."""

    def sweep(self, prefix: str = "") -> None:  # noqa: B027  (not every store needs it)
        """Remove what writers that were killed left below a folder, and no listing shows. A bucket has a rule for that:
        S3's AbortIncompleteMultipartUpload; Google's uploads expire by themselves."""

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object whose path begins with `prefix`, however deep, sorted; a folder's ends in "/"."""
        return sorted(self.scan(prefix), key=lambda info: info.path)

    def list_input(self) -> Sequence[ObjectInfo]:
        """As `list`, of a folder that others fill, for reading all of it: what `is_hidden` is left out, and counted in
        the log."""
        listed = self.list()
        visible = [info for info in listed if not is_hidden(info.path)]
        if num_hidden := len(listed) - len(visible):
            example = next(info.path for info in listed if is_hidden(info.path))
            _tell(
                f"{self.uri}: left out {num_hidden:,} files with a part of the path that begins with . or _, "
                f"as {printable(example)}"
            )
        return visible

    def child(self, path: str) -> "Store":
        """The store at a path within this one."""
        return replace(self, uri=f"{self.uri.rstrip('/')}/{checked_path(path)}")

    def storage_path(self) -> str:
        """This place as Ray and pyarrow take it: a URI with all quoted that has a meaning in one, or a local path."""
        scheme, _, place = self.uri.partition("://")
        return f"{scheme}://{quote(place)}"

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def problem_reading(self) -> str | None:
        """Why a job could not read from here, in one line with the remedy; None if it can."""
        try:
            found = next(self._impatient().scan(), None)
        except StorageError as error:
            return str(error)
        return (
            None if found else f"{self.uri}: nothing is there; correct the URI or put the input there first"
        )

    def problem_writing(self) -> str | None:
        """Why a job could not write here, in one line with the remedy; None if it can. Tries it."""
        store, probe = self._impatient(), f".probe-{uuid.uuid4().hex}"
        try:
            store.put_if_absent(probe, b"")
            overwritten = store.put_if_absent(probe, b"")
            store.delete(probe)
        except StorageError as error:
            return str(error)
        if overwritten:
            return (
                f"{self.uri}: the store ignores If-None-Match, so two jobs could own a run; use another store"
            )
        return None

    def _impatient(self) -> "Store":
        """For questions before a job starts, whose asker waits."""
        return replace(self, policy=replace(self.policy, silence_seconds=5, give_up_seconds=0))

    @contextlib.contextmanager
    def _named(self, operation: str, path: str) -> Iterator[None]:
        """Turns a file system's errors into ours."""
        try:
            yield
        except FileNotFoundError:
            raise self._absent(path) from None
        except (StorageError, FileExistsError):
            raise
        except OSError as error:
            remedy = REMEDIES.get(error.errno or 0, "see the host's log")
            raise self._error(operation, path, error.strerror or str(error), remedy) from error

    def _error(self, operation: str, path: str, cause: str, remedy: str) -> StorageError:
        told = f"{self.uri.rstrip('/')}/{path}: cannot {operation}: {cause}; {remedy}"
        return StorageError(printable(told))

    def _absent(self, path: str) -> FileNotFoundError:
        return FileNotFoundError(printable(f"{self.uri.rstrip('/')}/{path}: no such object"))

    def _whole(self, path: str, data: bytes, start: int, length: int) -> bytes:
        if len(data) != length:
            cause = f"it has {len(data):,} of the {length:,} bytes wanted from byte {start:,}"
            raise self._error("read", path, cause, TOO_SHORT)
        return data


def is_hidden(path: str) -> bool:
    """Whether a part of the path begins with "." or "_", as other tools name what is no data: `.git`, `_temporary`.

    A part with "=" is a partition, however its column is named (as in Spark).
    """
    return any(part.startswith(".") or (part.startswith("_") and "=" not in part) for part in path.split("/"))


def name_problem(path: str) -> str | None:
    """Why an object of this path cannot be worked with, and what helps; None if it can."""
    if path.startswith("/"):
        return "its key has two slashes in a row; copy it to a key without"
    try:
        path.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8; rename it"
    return None


@cache
def _tell(line: str) -> None:
    """Log a warning once per process: a folder is listed several times on the way to what is made of it."""
    logger.warning(line)


def checked_path(path: str) -> str:
    """`path` without a trailing "/". Raises `ValueError` if it leads out of its store."""
    if path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{path} is not a path within a store: it may not begin with / or contain ..")
    return path.rstrip("/")


# --- a folder ---
