"""A folder of an object store, fetched once per node however many processes there read it."""

import hashlib
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from cluster.storage import Store, open_store


def local_copy(source: Store, cache: Path | None = None) -> Store:
    """The same objects in a local folder, fetched unless this version of them is there; a local store as it is.

    Processes that find it absent at the same time each fetch, and the first to finish gives the folder its name.
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
        unfinished = cache / f".{digest}-{uuid.uuid4().hex}"
        store = open_store(str(unfinished))
        for info in infos:
            store.put(info.path, source.read(info.path))
        try:
            unfinished.rename(target)
        except OSError:  # another process was first
            shutil.rmtree(unfinished)
    return open_store(str(target))
