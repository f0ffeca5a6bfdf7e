"""A folder of an object store, fetched once per node and user however many processes there read it."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from cluster.storage.store import checked_path
from cluster.storage.uris import ObjectInfo, Store, open_store
from cluster.storage.user_cache import check_contents, check_private, user_cache, write_private


def local_copy(source: Store, cache: Path | None = None) -> Store:
    """The same objects in a local folder, fetched unless this version of them is there; a local store as it is.

    The folder lies in the user's cache, where versions stay until the user removes them; nobody else can read what is
    there, nor has put it there. Of processes that find it absent at the same time one fetches, the others wait; one
    that dies frees them.

    Raises:
        FileNotFoundError: the source holds nothing.
        PrivateFolderError: the cache, or what lies in it, is not this user's alone.
    """
    if source.uri.startswith("file://"):
        return source
    infos = source.list()
    if not infos:
        raise FileNotFoundError(f"{source.uri}: nothing is there")
    digest = hashlib.blake2b(repr((source.uri, infos)).encode(), digest_size=12).hexdigest()
    cache = cache or user_cache()
    check_private(cache)
    target = cache / digest
    if not target.is_symlink() and not target.exists():
        with FileLock(cache / f".{digest}.lock", mode=0o600):
            if not target.exists():
                fetch(source, infos, cache / f".{digest}").rename(target)
    check_private(target)
    check_contents(target)
    return open_store(str(target))


def fetch(source: Store, infos: Sequence[ObjectInfo], folder: Path) -> Path:
    """Put the objects into a folder, in place of what a process that died left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    for info in infos:
        write_private(folder, checked_path(info.path), source.read(info.path))
    return folder
