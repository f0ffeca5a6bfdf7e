"""The hashes of a token shard: of its footer, and of each row group as it lies in the file.

What is read of a shard is held against them before Parquet's reader sees a byte of it: a footer or a row group that is
not the one that was written is never interpreted. The manifest has the hashes, and its digest covers them.

BLAKE2b of 16 bytes. Who alters a fragment has to find another with its hash, 2^128 attempts; two fragments of one hash,
2^64, help nobody, for whoever could plant the one as text could as well plant the other. On a core of an AMD EPYC
(Zen 5) a MiB takes 0.74 ms by hashlib's BLAKE2b, 0.50 by its SHA-256, but 1.44 where the processor has no SHA
extensions, and 0.11 by the package `blake3`. A million tokens of uint16 are 2 MB, so 1.5 ms: no package is added for
what is little beside the seconds that training them takes.
"""

import hashlib
import io
import os
import shutil
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage.scratch import scratch_folder, writing_locally
from cluster.storage.uris import Store, open_store
from data.shards.manifest_table import HASH_BYTES, Shard

# Footers are immutable and a few KiB to a few hundred; keeping them saves a request per fragment.
KEPT_FOOTERS = 256
COPY_BYTES = 1 << 20
TAIL_BYTES = 8
"""Of a Parquet file: the footer's length and a magic number."""


class AlteredError(ValueError):
    """Bytes of a shard are not those that were written."""


@dataclass(frozen=True)
class ShardHashes:
    """What the manifest has of a shard's file."""

    num_bytes: int
    sha256: str
    footer_bytes: int
    footer_blake2b: str
    blake2b: list[str]
    """Of each row group."""

    def add_to(self, shard: Shard) -> Shard:
        return replace(shard, footer_bytes=self.footer_bytes, footer_blake2b=self.footer_blake2b)


def hash_of(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def hash_shard(local: Path, expected_sha256: str | None = None) -> ShardHashes:
    """Hash a finished shard on the local disk; AlteredError if it has another SHA-256 than is expected."""
    num_bytes = local.stat().st_size
    with local.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if expected_sha256 not in (None, sha256):
            raise AlteredError(f"it has the SHA-256 {sha256} instead of {expected_sha256}")
        file.seek(num_bytes - TAIL_BYTES)
        footer_bytes = int.from_bytes(file.read(4), "little") + TAIL_BYTES
        file.seek(num_bytes - footer_bytes)
        footer = file.read(footer_bytes)
        metadata, hashes = pq.read_metadata(pa.BufferReader(footer)), []
        for row_group in range(metadata.num_row_groups):
            start, length = _place(metadata, row_group)
            file.seek(start)
            hashes.append(hash_of(file.read(length)).hex())
    return ShardHashes(num_bytes, sha256, footer_bytes, hash_of(footer).hex(), hashes)


def hash_stored(store: Store, shard: Shard) -> ShardHashes:
    """As `hash_shard`, of one that was written before there were hashes and is now held against its SHA-256."""
    with scratch_folder() as folder:
        local = folder / "shard.parquet"
        with store.open(shard.path) as source, writing_locally(), local.open("wb") as target:
            shutil.copyfileobj(source, target, COPY_BYTES)
        return hash_shard(local, shard.sha256)


def read_row_group(
    store: Store, shard: Shard, row_group: int, blake2b: bytes | None, columns: list[str]
) -> pa.Table:
    """Columns of a row group, in one request where the footer is known.

    Args:
        blake2b: Of the row group; None where the manifest has no hashes.

    Raises:
        AlteredError: its bytes, or those of the footer, do not have their hash.
        pa.ArrowException, OSError: it cannot be read as Parquet.
    """
    footer = _footer(store.uri, shard)
    if blake2b is None:
        # Nothing of such a footer may be asked for: where it is damaged, pyarrow would end the process.
        with store.open(shard.path) as source, pq.ParquetFile(source, metadata=footer) as file:
            return file.read_row_group(row_group, columns=columns, use_threads=False)
    start, length = _place(footer, row_group)
    data = store.read_range(shard.path, start, length)
    _check("its bytes", data, blake2b)
    with pq.ParquetFile(_Part(data, start, shard.num_bytes), metadata=footer) as file:
        return file.read_row_group(row_group, columns=columns, use_threads=False)


def forget_footers() -> None:
    """Read them anew: one may be what was damaged."""
    _footer.cache_clear()


@lru_cache(maxsize=KEPT_FOOTERS)
def _footer(uri: str, shard: Shard) -> pq.FileMetaData:
    store = open_store(uri)
    if not shard.footer_blake2b:
        with store.open(shard.path) as source:
            return pq.read_metadata(source)
    data = store.read_range(shard.path, shard.num_bytes - shard.footer_bytes, shard.footer_bytes)
    _check("its footer", data, bytes.fromhex(shard.footer_blake2b))
    return pq.read_metadata(pa.BufferReader(data))


def _check(what: str, data: bytes, expected: bytes) -> None:
    if (found := hash_of(data)) != expected:
        raise AlteredError(f"{what} have the BLAKE2b {found.hex()} instead of {expected.hex()}")


def _place(metadata: pq.FileMetaData, row_group: int) -> tuple[int, int]:
    """Where a row group begins in the file, and its bytes."""
    group = metadata.row_group(row_group)
    chunks = [group.column(index) for index in range(group.num_columns)]
    starts = [
        chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
        for chunk in chunks
    ]
    stop = max(start + chunk.total_compressed_size for start, chunk in zip(starts, chunks, strict=True))
    return min(starts), stop - min(starts)


class _Part(io.RawIOBase):
    """A file of which one part is there, at its place."""

    def __init__(self, data: bytes, start: int, num_bytes: int) -> None:
        self._data, self._start, self._num_bytes, self._position = memoryview(data), start, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._num_bytes}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> memoryview:  # type: ignore[override]  # a view: Arrow takes any buffer
        begin = self._position - self._start
        if begin < 0 or size < 0 or begin + size > len(self._data):
            raise OSError(f"{size:,} bytes at {self._position:,} are outside of the row group")
        self._position += size
        return self._data[begin : begin + size]
