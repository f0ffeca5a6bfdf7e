"""A store in a folder of this machine, or of a file system that all hosts mount. `cluster.storage.uris` opens it by
URI."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from cluster.storage.store import (
    READ_AHEAD_BYTES,
    REMEDIES,
    ObjectInfo,
    StorageError,
    Store,
    checked_path,
    is_hidden,
)

_UNFINISHED = ".unfinished-"  # files that are being written; a reader never sees them
_TEMPORARY = re.compile(re.escape(_UNFINISHED) + "([0-9a-f]{8})[0-9a-f]{24}")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_KERNEL = hashlib.blake2b(
    _BOOT.read_bytes() if _BOOT.exists() else socket.gethostname().encode(), digest_size=4
).hexdigest()
"""Whose locks are seen from here; part of an unfinished file's name. Its writer holds a lock on it."""
ABANDONED_SECONDS = 3_600.0
"""After its last byte another kernel's unfinished file is a killed writer's: a living one takes seconds from there to
its name."""
_swept: set[Path] = set()  # folders that this process has looked through already


@dataclass(frozen=True)
class LocalStore(Store):
    """A folder on a disk, or on a file system that all hosts mount, with rename and hard links.

    The folder that was opened by URI may be a link or lie under one. Links below it are followed only while they stay
    inside of this store; so neither a `child` store's folder nor one on the way to it leads to another place. A link
    to a folder is refused by a listing.
    """

    root: str = field(default="", repr=False)
    """URI of the folder that was opened, if this store is a part of it."""

    def child(self, path: str) -> Store:
        return replace(self, uri=super().child(path).uri, root=self.root or self.uri)

    def storage_path(self) -> str:
        self._resolved("")  # Ray would follow a link that leads out
        return str(self._path(""))

    def _path(self, path: str) -> Path:
        return _folder(self.uri) / checked_path(path)

    def _resolved(self, path: str) -> Path:
        """Where `path` leads, links followed. Raises `StorageError` if that is outside of the store."""
        opened = _folder(self.root or self.uri)
        home = Path(os.path.realpath(opened), _folder(self.uri).relative_to(opened))
        found = Path(os.path.realpath(self._path(path)))
        if not found.is_relative_to(home):
            remedy = "put what it leads to in its place, or give that folder itself"
            raise self._error("use", path, f"a link there leads out of {home}", remedy)
        return found

    def _target(self, path: str) -> Path:
        """Where an object is written or removed: a link in its place is replaced or removed, not followed."""
        folder, _, name = checked_path(path).rpartition("/")
        return self._resolved(folder) / name

    def _open(self, path: str, buffering: int = -1) -> BinaryIO:
        return open(self._resolved(path), "rb", buffering=buffering, opener=open_regular)

    def read(self, path: str) -> bytes:
        with self._named("read", path), self._open(path) as file:
            return file.read()

    def read_range(self, path: str, start: int, length: int) -> bytes:
        with self._named("read", path), self._open(path) as file:
            file.seek(start)
            return self._whole(path, file.read(length), start, length)

    def open(self, path: str) -> BinaryIO:
        with self._named("open", path):
            return self._open(path, READ_AHEAD_BYTES)

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

    @contextmanager
    def _unfinished(self, path: str) -> Iterator[Path]:
        """A file in the folder of `path` to be written and published; gone in the end, also on an error."""
        target = self._target(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # which would mean that the object is there
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        temporary, lock = _locked_file(target.parent)
        try:
            if target.parent not in _swept:
                _swept.add(target.parent)
                _remove_abandoned(target.parent, temporary.stat().st_mtime)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
            os.close(lock)

    def _publish(self, temporary: Path, path: str, give_name: Callable[[Path, Path], None]) -> None:
        """Contents reach the disk before the name, the name before we return: a power cut tears nothing."""
        target = self._target(path)
        _sync(temporary)
        give_name(temporary, target)
        _sync(target.parent)

    def size(self, path: str) -> int:
        with self._named("look up", path):
            status = self._resolved(path).stat()
            if stat.S_ISDIR(status.st_mode):
                raise FileNotFoundError  # a folder is no object
            return _regular(status).st_size

    def delete(self, path: str) -> None:
        with self._named("delete", path):
            self._target(path).unlink(missing_ok=True)

    def scan(self, prefix: str = "") -> Iterator[ObjectInfo]:
        start = checked_path(prefix.rpartition("/")[0])
        folders = [f"{start}/" if start else ""]
        while folders:
            folder = folders.pop()
            for entry in self._entries(folder):
                path = folder + entry.name
                if not path.startswith(prefix) or entry.name.startswith(_UNFINISHED):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{path}/")
                elif status := self._listed(path, entry):
                    yield ObjectInfo(path, status.st_size, _version(status))

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """What a folder holds; one that is absent, or goes while we walk, is empty."""
        with (
            _unless_hidden(folder),
            self._named("list", folder),
            suppress(FileNotFoundError),
            os.scandir(self._resolved(folder)) as found,
        ):
            return list(found)
        return []

    def _listed(self, path: str, entry: os.DirEntry[str]) -> os.stat_result | None:
        """The state of a file; None if it is gone meanwhile. Raises `StorageError` for what cannot be read as one."""
        with _unless_hidden(path), self._named("list", path):
            try:
                if not entry.is_symlink():
                    return _regular(entry.stat(follow_symlinks=False))
                status = self._resolved(path).stat()
                if stat.S_ISDIR(status.st_mode):
                    raise self._error(
                        "list", path, "it is a link to a folder", "put that folder in its place"
                    )
                return _regular(status)
            except FileNotFoundError:
                if not os.path.islink(entry.path):
                    return None
                raise self._error("list", path, "it is a link to nothing", "remove it") from None
        return None

    def sweep(self, prefix: str = "") -> None:
        below = os.walk(self._resolved(prefix))
        found = [Path(folder) for folder, _, names in below if any(map(_TEMPORARY.fullmatch, names))]
        with suppress(StorageError):  # of a file system that is read-only: it is in nobody's way
            now = self.clock() if found else 0.0
            for folder in found:
                _remove_abandoned(folder, now)

    def clock(self) -> float:
        """Of a file system that hosts mount it is the server's."""
        with self._named("write", ""), self._unfinished("clock") as temporary:
            temporary.touch()
            return temporary.stat().st_mtime

    def problem_writing(self) -> str | None:
        """As for every store, but makes no folder: asks the nearest one that is there."""
        try:
            root = self._resolved("")
        except StorageError as error:
            return str(error)
        there = next(folder for folder in (root, *root.parents) if folder.exists())
        if not there.is_dir():
            return str(self._error("write", "", f"{there} is a file", "correct the URI"))
        if not os.access(there, os.W_OK | os.X_OK):
            return str(self._error("write", "", f"{there} is not writable", REMEDIES[errno.EACCES]))
        probe = LocalStore(f"file://{there}")
        try:
            name = f".probe-{uuid.uuid4().hex}"
            probe.put_if_absent(name, b"")
            probe.delete(name)
        except StorageError as error:
            return str(error)
        return None


def _locked_file(folder: Path) -> tuple[Path, int]:
    """A new unfinished file, and a descriptor that locks it. One that is removed before it is locked is made again."""
    while True:
        path = folder / f"{_UNFINISHED}{_KERNEL}{uuid.uuid4().hex[8:]}"
        lock = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        with suppress(OSError):  # a file system without locks: nobody else gets one there either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return path, lock
        os.close(lock)


def _remove_abandoned(folder: Path, now: float) -> None:
    """Remove what killed writers left in a folder; `now` by the clock of its file system, whatever this host's says."""
    with suppress(OSError):  # another user's folder
        for path in folder.glob(f"{_UNFINISHED}*"):
            if not (ours := _TEMPORARY.fullmatch(path.name)):
                continue
            with suppress(OSError):  # gone meanwhile, or a link, or another user's: it is in nobody's way
                is_old = path.lstat().st_mtime < now - ABANDONED_SECONDS
                if is_old and ours[1] != _KERNEL:
                    path.unlink()
                elif ours[1] == _KERNEL:
                    _remove_unless_locked(path, is_old)


def _remove_unless_locked(path: Path, is_old: bool) -> None:
    """Remove an unfinished file of this kernel's unless its writer lives, which holds a lock on it until it ends,
    however long it sleeps. Where a file system knows no locks, age decides."""
    lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:
            if not is_old:
                return
        path.unlink()
    finally:
        os.close(lock)


def _unless_hidden(path: str) -> AbstractContextManager[None]:
    """Lets a `StorageError` pass, but not of what is no data: a checkout's `.venv` is full of links, a lock file is one
    to nothing."""
    return suppress(StorageError) if is_hidden(path) else nullcontext()


def _version(status: os.stat_result) -> str:
    """Of a file. The number of its inode would tell no more, and changes with each mount of a bucket (FUSE)."""
    return f"{status.st_mtime_ns}-{status.st_size}-{status.st_ctime_ns}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _folder(uri: str) -> Path:
    return Path(uri.removeprefix("file://"))


def open_regular(path: str, flags: int) -> int:
    """An opener for `open`. A FIFO does not hold it up; a link that appears meanwhile is not followed."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        _regular(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _regular(status: os.stat_result) -> os.stat_result:
    """`status`, if it is that of a regular file: a device has no end, a FIFO and a socket wait for others."""
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.ENXIO, "it is not a regular file")
    return status
