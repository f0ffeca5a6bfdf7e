"""What a store of objects is, and the store in a folder. `cluster.storage` opens this and others by URI."""

import contextlib
import errno
import os
import shutil
import stat
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import BinaryIO

# Of a file from `open`: at 30 ms a request, 1 MiB is 33 MB/s; who needs more reads larger ranges.
READ_AHEAD_BYTES = 1 << 20
TOO_SHORT = "it was cut or replaced since its size was noted: write it again"
_UNFINISHED = ".unfinished-"  # files that are being written; a reader never sees them
_HARD_LINKS = "choose a file system with hard links: that only one job owns a run stands on them"

_REMEDIES = {
    errno.EACCES: "give this user the right",
    errno.EPERM: _HARD_LINKS,
    errno.ENOTSUP: _HARD_LINKS,
    errno.ENOSYS: _HARD_LINKS,
    errno.ENOSPC: "free space on the disk",
    errno.EROFS: "choose a folder on a writable disk",
    errno.ENOTDIR: "a part of the path is a file: correct the URI",
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

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object whose path begins with `prefix`, however deep, sorted; a folder's ends in "/"."""
        return sorted(self.scan(prefix), key=lambda info: info.path)

    def child(self, path: str) -> "Store":
        """The store at a path within this one."""
        return replace(self, uri=f"{self.uri.rstrip('/')}/{checked_path(path)}")

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
            remedy = _REMEDIES.get(error.errno or 0, "see the host's log")
            raise self._error(operation, path, error.strerror or str(error), remedy) from error

    def _error(self, operation: str, path: str, cause: str, remedy: str) -> StorageError:
        return StorageError(f"{self.uri.rstrip('/')}/{path}: cannot {operation}: {cause}; {remedy}")

    def _absent(self, path: str) -> FileNotFoundError:
        return FileNotFoundError(f"{self.uri.rstrip('/')}/{path}: no such object")

    def _whole(self, path: str, data: bytes, start: int, length: int) -> bytes:
        if len(data) != length:
            cause = f"it has {len(data):,} of the {length:,} bytes wanted from byte {start:,}"
            raise self._error("read", path, cause, TOO_SHORT)
        return data


def checked_path(path: str) -> str:
    """`path` without a trailing "/". Raises `ValueError` if it leads out of its store."""
    if path.startswith("/") or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{path} is not a path within a store: it may not begin with / or contain ..")
    return path.rstrip("/")


# --- a folder ---


class LocalStore(Store):
    """A folder on a disk, or on a file system that all hosts mount, with rename and hard links."""

    def _path(self, path: str) -> Path:
        return Path(self.uri.removeprefix("file://")) / checked_path(path)

    def read(self, path: str) -> bytes:
        with self._named("read", path):
            return self._path(path).read_bytes()

    def read_range(self, path: str, start: int, length: int) -> bytes:
        with self._named("read", path), open(self._path(path), "rb") as file:
            file.seek(start)
            return self._whole(path, file.read(length), start, length)

    def open(self, path: str) -> BinaryIO:
        with self._named("open", path):
            return open(self._path(path), "rb", buffering=READ_AHEAD_BYTES)

    def put(self, path: str, data: bytes | memoryview) -> None:
        with self._named("write", path), self._unfinished(path) as temporary:
            temporary.write_bytes(data)
            self._publish(temporary, path, os.replace)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        try:
            with self._named("write", path), self._unfinished(path) as temporary:
                temporary.write_bytes(data)
                self._publish(temporary, path, os.link)  # unlike rename, link refuses a name that is taken
        except FileExistsError:
            return False
        return True

    def upload(self, local: Path, path: str) -> None:
        with self._named("write", path), self._unfinished(path) as temporary:
            shutil.copyfile(local, temporary)
            self._publish(temporary, path, os.replace)

    @contextlib.contextmanager
    def _unfinished(self, path: str) -> Iterator[Path]:
        """A file in the folder of `path` to be written and published; gone in the end, also on an error."""
        target = self._path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{_UNFINISHED}{uuid.uuid4().hex}")
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _publish(self, temporary: Path, path: str, give_name: Callable[[Path, Path], None]) -> None:
        """Contents reach the disk before the name, the name before we return: a power cut tears nothing."""
        target = self._path(path)
        _sync(temporary)
        give_name(temporary, target)
        _sync(target.parent)

    def size(self, path: str) -> int:
        with self._named("look up", path):
            status = self._path(path).stat()
            if not stat.S_ISREG(status.st_mode):
                raise FileNotFoundError  # a folder is no object
            return status.st_size

    def delete(self, path: str) -> None:
        with self._named("delete", path):
            self._path(path).unlink(missing_ok=True)

    def scan(self, prefix: str = "") -> Iterator[ObjectInfo]:
        root = self._path("")
        start = root / prefix.rpartition("/")[0]
        with self._named("list", prefix):
            for folder, _, names in os.walk(start, followlinks=True, onerror=_refuse):
                for path in (Path(folder, name) for name in names if not name.startswith(_UNFINISHED)):
                    inside = path.relative_to(root).as_posix()
                    if not inside.startswith(prefix):
                        continue
                    try:
                        status = path.stat()
                    except FileNotFoundError:
                        if path.is_symlink():  # and leads nowhere
                            raise
                        continue  # deleted while we walk
                    yield ObjectInfo(inside, status.st_size, f"{status.st_mtime_ns}-{status.st_size}")

    def clock(self) -> float:
        """Of a file system that hosts mount it is the server's."""
        with self._named("write", ""), self._unfinished("clock") as temporary:
            temporary.touch()
            return temporary.stat().st_mtime

    def problem_writing(self) -> str | None:
        """As for every store, but makes no folder: asks the nearest one that is there."""
        root = self._path("")
        there = next(folder for folder in (root, *root.parents) if folder.exists())
        if not there.is_dir():
            return str(self._error("write", "", f"{there} is a file", "correct the URI"))
        if not os.access(there, os.W_OK | os.X_OK):
            return str(self._error("write", "", f"{there} is not writable", _REMEDIES[errno.EACCES]))
        probe = LocalStore(f"file://{there}")
        try:
            name = f".probe-{uuid.uuid4().hex}"
            probe.put_if_absent(name, b"")
            probe.delete(name)
        except StorageError as error:
            return str(error)
        return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed is an error; one that is absent, or goes while we walk, is empty."""
    if not isinstance(error, FileNotFoundError):
        raise error
