"""A store in a folder of this machine, or of a file system that all hosts mount. `cluster.storage` opens it by URI."""

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cluster.store import READ_AHEAD_BYTES, REMEDIES, ObjectInfo, StorageError, Store, checked_path

_UNFINISHED = ".unfinished-"  # files that are being written; a reader never sees them
ABANDONED_SECONDS = 3_600.0
"""After its last byte an unfinished file is a killed writer's: a living one takes seconds from there to its name."""
_swept: set[Path] = set()  # folders that this process has looked through already


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

    @contextmanager
    def _unfinished(self, path: str) -> Iterator[Path]:
        """A file in the folder of `path` to be written and published; gone in the end, also on an error."""
        target = self._path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{_UNFINISHED}{uuid.uuid4().hex}")
        try:
            if target.parent not in _swept:
                _swept.add(target.parent)
                temporary.touch()
                _remove_abandoned(target.parent, temporary.stat().st_mtime)
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

    def sweep(self, prefix: str = "") -> None:
        now = self.clock()
        for folder, _, _ in os.walk(self._path(prefix)):
            _remove_abandoned(Path(folder), now)

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
            return str(self._error("write", "", f"{there} is not writable", REMEDIES[errno.EACCES]))
        probe = LocalStore(f"file://{there}")
        try:
            name = f".probe-{uuid.uuid4().hex}"
            probe.put_if_absent(name, b"")
            probe.delete(name)
        except StorageError as error:
            return str(error)
        return None


def _remove_abandoned(folder: Path, now: float) -> None:
    """Remove what killed writers left in a folder; `now` by the clock of its file system, whatever this host's says."""
    with suppress(OSError):  # of another user, or of a file system that is read-only: it is in nobody's way
        for path in folder.glob(f"{_UNFINISHED}*"):
            with suppress(FileNotFoundError):  # its writer lives after all, or another one removed it
                if path.stat().st_mtime < now - ABANDONED_SECONDS:
                    path.unlink()


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
