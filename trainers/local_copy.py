"""A folder of an object store, fetched once per node however many processes there read it."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from cluster.storage import ObjectInfo, Store, open_store


def local_copy(source: Store, cache: Path | None = None) -> Store:
    """The same objects in a local folder, fetched unless this version of them is there; a local store as it is.

    Of processes that find it absent at the same time one fetches, the others wait; one that dies frees them.
    Raises FileNotFoundError if the source holds nothing.
    """
    if source.uri.startswith("file://"):
        return source
    infos = source.list()
    if not infos:
        raise FileNotFoundError(f"{source.uri}: nothing is there")
    digest = hashlib.blake2b(repr((source.uri, infos)).encode(), digest_size=12).hexdigest()
    cache = cache or Path(tempfile.gettempdir()) / f"backbones-{os.getuid()}"
    target = cache / digest
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{digest}.lock"):
            if not target.exists():
                fetch(source, infos, cache / f".{digest}").rename(target)
    return open_store(str(target))


def fetch(source: Store, infos: Sequence[ObjectInfo], folder: Path) -> Path:
    """Put the objects into a folder, in place of what a process that died left there."""
    shutil.rmtree(folder, ignore_errors=True)
    store = open_store(str(folder))
    for info in infos:
        store.put(info.path, source.read(info.path))
    return folder
