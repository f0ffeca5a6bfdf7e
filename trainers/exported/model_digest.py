"""Digest of what a model's folder holds, by content, and a store that takes it of the files that are loaded.

Size and time tell nothing: a copy may have both of another model. A model that is replaced in place between two reads
is found where it is loaded, from the very bytes.
"""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from cluster.storage.store import former_version
from cluster.storage.uris import ObjectInfo, Store
from trainers.exported.formats import CONFIG, TASK
from trainers.exported.model_files import INDEX, ModelFolderError, weight_files

BLOCK_BYTES = 32 << 20
"""Read at a time where a file is hashed and not loaded."""
FORMER_LENGTH = 24
"""Digits of a digest as it was made of sizes and times."""


@dataclass(frozen=True)
class HashedStore(Store):
    """A store whose files are hashed as they are read whole; it is for reading alone."""

    source: Store = field(kw_only=True)
    hashes: dict[str, str] = field(default_factory=dict, kw_only=True, compare=False, repr=False)
    """Of each file that was read, by path."""

    def digest(self) -> str:
        """Names what was read: 32 hexadecimal digits."""
        return digest_of(self.hashes)

    def read(self, path: str) -> bytes:
        content = self.source.read(path)
        found = hashlib.blake2b(content, digest_size=16).hexdigest()
        if self.hashes.setdefault(path, found) != found:
            raise ModelFolderError(f"{self.uri}/{path} changed while it was read; start again")
        return content

    def read_range(self, path: str, start: int, length: int) -> bytes:
        return self.source.read_range(path, start, length)

    def open(self, path: str) -> BinaryIO:
        return self.source.open(path)

    def size(self, path: str) -> int:
        return self.source.size(path)

    def scan(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self.source.scan(prefix)

    def clock(self) -> float:
        return self.source.clock()

    def put(self, path: str, data: bytes | memoryview) -> None:
        raise NotImplementedError(path)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        raise NotImplementedError(path)

    def upload(self, local: Path, path: str) -> None:
        raise NotImplementedError(path)

    def delete(self, path: str) -> None:
        raise NotImplementedError(path)


def hashed(source: Store) -> HashedStore:
    """The same objects, hashed as they are read."""
    return HashedStore(source.uri, source.policy, source=source)


def content_digest(source: Store, *, of_task: bool = False) -> str:
    """The digest that a `HashedStore` has once a model was loaded from it.

    Args:
        of_task: It is a fine-tuned model, which has a file more.

    Raises:
        FileNotFoundError: a file is missing.
        ModelFolderError: the index of its weights is no index.
    """
    # Within a process files that have not changed are hashed once, also for each run of a curve.
    return _digest_of_files(source, of_task, tuple(source.list()))


@functools.lru_cache(maxsize=8)
def _digest_of_files(source: Store, of_task: bool, infos: Sequence[ObjectInfo]) -> str:
    files = [CONFIG, "tokenizer.json", *([TASK] if of_task else []), *weight_files(source)]
    if source.exists(INDEX):
        files.append(INDEX)
    return digest_of({path: _hash_of(source, path) for path in files})


def _hash_of(source: Store, path: str) -> str:
    size, found = source.size(path), hashlib.blake2b(digest_size=16)
    for start in range(0, size, BLOCK_BYTES):
        found.update(source.read_range(path, start, min(BLOCK_BYTES, size - start)))
    return found.hexdigest()


def digest_of(hashes: Mapping[str, str]) -> str:
    """One digest of the hashes of files, by path."""
    return hashlib.blake2b(
        json.dumps(sorted(hashes.items()), allow_nan=False).encode(), digest_size=16
    ).hexdigest()


def listing_digest(infos: Sequence[ObjectInfo]) -> str:
    """As the digest was before it was one of content: of path, size and version of each file, without the time of its
    last change."""
    listed = sorted((info.path, info.num_bytes, former_version(info.version)) for info in infos)
    return hashlib.blake2b(
        json.dumps(listed, allow_nan=False).encode(), digest_size=FORMER_LENGTH // 2
    ).hexdigest()
