"""Token shards: Parquet files with one row per document, whose row groups ("fragments") are the unit of
reading.

Tokens lie in a binary column as little-endian integers. A list column of integers decodes 5 to 10 times
slower (1.1 M tokens: 14 ms plain against 2 ms, 2 cores, pyarrow 26), and a fragment's bytes then need one
copy.
"""

import zlib
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.console.errors import UserError
from cluster.storage.scratch import scratch_folder, writing_locally
from cluster.storage.uris import StorageError, Store
from data.shards.manifest import Manifest, Shard
from data.shards.shard_hashes import AlteredError, forget_footers, hash_shard, read_row_group

# A byte flipped on the way (seen with ranged GETs, which no client notices) is gone when read again; one on disk is
# not. A fragment takes two requests, of the footer and of itself, and either may be hit.
READ_ATTEMPTS = 3


class ShardError(UserError, RuntimeError):
    """A token shard does not hold what the manifest says.

    No ValueError, which ends a run for good: what a host reads damaged, another may read whole, or the same one later.
    """


SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("tokens", pa.binary(), nullable=False),
        pa.field("num_bytes", pa.uint32(), nullable=False),
    ]
)

# 256 MiB of uint16: few enough objects for a corpus of trillions of tokens, small enough for a worker's local
# disk.
SHARD_TOKENS = 134_217_728
# Longer documents are cut, so that one book cannot make a fragment that dwarfs the others. Contexts up to
# here stay whole.
PART_TOKENS = 65_536


@dataclass
class WrittenShard:
    """A finished token shard with the columns of its fragments, as `Fragments.from_columns` takes them, but `shard`."""

    shard: Shard
    fragments: dict[str, list[Any]]


@dataclass
class _Fragment:
    """Documents collected for the next row group."""

    ids: list[str] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_documents: int = 0


class ShardWriter:
    """Writes documents of one split and source into token shards, each put into the store when it is full.

    Fragments close before the document that would take them over `fragment_tokens`, so their bounds follow
    from the documents alone. Use as a context manager: what was begun on the local disk is removed in any
    case.

    Args:
        store: The prepared corpus.
        fragment_tokens: Tokens per fragment; a longer document makes a fragment of its own, up to
            `PART_TOKENS`.
        shard_tokens: Tokens after which a shard is finished at the next fragment.
    """

    def __init__(
        self,
        store: Store,
        *,
        split: str,
        source: str,
        token_dtype: str,
        fragment_tokens: int,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self._store, self._split, self._source = store, split, source
        self._dtype = np.dtype(token_dtype).newbyteorder("<")
        self._fragment_tokens, self._shard_tokens = fragment_tokens, shard_tokens
        self._part_tokens = max(fragment_tokens, PART_TOKENS)
        self._pending = _Fragment()
        self._columns: dict[str, list[Any]] = {}
        self._written_tokens = 0
        self._file: pq.ParquetWriter | None = None
        self._local: Path | None = None
        self._scratch = ExitStack()
        self._finished: list[WrittenShard] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with self._scratch:
            if self._file is not None:
                with suppress(OSError):  # what is thrown away needs no end, for which a full disk has no room
                    self._file.close()

    def add(self, document_id: str, tokens: np.ndarray, num_bytes: int) -> None:
        """Append a document: its boundary and tokens [n], and the UTF-8 bytes of its normalised text."""
        num_parts = -(-len(tokens) // self._part_tokens)
        for part in range(num_parts):
            start, stop = part * self._part_tokens, min((part + 1) * self._part_tokens, len(tokens))
            # The parts' bytes are shared out by tokens; they add up to the document's.
            part_bytes = num_bytes * stop // len(tokens) - num_bytes * start // len(tokens)
            part_id = f"{document_id}#{part + 1}" if num_parts > 1 else document_id
            self._append(part_id, tokens[start:stop], part_bytes, begins=part == 0)

    def finish(self) -> list[WrittenShard]:
        """Write what is pending and return all shards in order; empty if no document came."""
        if self._pending.ids:
            self._write_fragment()
        if self._file is not None:
            self._put_shard()
        return self._finished

    def _append(self, part_id: str, tokens: np.ndarray, num_bytes: int, begins: bool) -> None:
        if self._pending.ids and self._pending.num_tokens + len(tokens) > self._fragment_tokens:
            self._write_fragment()
        self._pending.ids.append(part_id)
        self._pending.tokens.append(tokens.astype(self._dtype))
        self._pending.num_bytes.append(num_bytes)
        self._pending.num_tokens += len(tokens)
        self._pending.num_documents += begins

    def _write_fragment(self) -> None:
        pending, self._pending = self._pending, _Fragment()
        values = np.concatenate(pending.tokens)
        ends = np.cumsum([0, *(len(tokens) for tokens in pending.tokens)]) * self._dtype.itemsize
        offsets = pa.py_buffer(ends.astype(np.int32))
        binary = pa.Array.from_buffers(pa.binary(), len(pending.ids), [None, offsets, pa.py_buffer(values)])
        columns = [pa.array(pending.ids), binary, pa.array(pending.num_bytes, pa.uint32())]
        with writing_locally():
            file = self._file or self._open_file()
            file.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), row_group_size=len(pending.ids))
        entry = {
            "row_group": len(self._columns.get("row_group", ())),
            "num_tokens": len(values),
            "num_bytes": sum(pending.num_bytes),
            "num_documents": pending.num_documents,
            "checksum": zlib.crc32(values.data),
        }
        for name, value in entry.items():
            self._columns.setdefault(name, []).append(value)
        self._written_tokens += len(values)
        if self._written_tokens >= self._shard_tokens:
            self._put_shard()

    def _open_file(self) -> pq.ParquetWriter:
        folder = self._scratch.enter_context(scratch_folder())
        self._local = folder / "shard.parquet"
        self._file = pq.ParquetWriter(
            self._local,
            SCHEMA,
            # Token ids of a trained vocabulary are close to incompressible, and unpacking them costs more
            # than it saves.
            compression={"id": "zstd", "tokens": "none", "num_bytes": "zstd"},
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        return self._file

    def _put_shard(self) -> None:
        assert self._file is not None and self._local is not None
        with writing_locally():
            self._file.close()
        found = hash_shard(self._local)
        path = f"shards/{found.sha256[:16]}.parquet"
        self._store.upload(self._local, path)
        self._scratch.close()
        shard = found.add_to(Shard(path, self._split, self._source, found.num_bytes, found.sha256))
        self._finished.append(WrittenShard(shard, self._columns | {"blake2b": found.blake2b}))
        self._columns, self._written_tokens, self._file, self._local = {}, 0, None, None


def read_fragment(store: Store, manifest: Manifest, fragment: int) -> np.ndarray:
    """Read one fragment's tokens.

    Args:
        store: The prepared corpus.
        fragment: Index into `manifest.fragments`.

    Returns:
        [num_tokens], little-endian uint16 or uint32, read-only: documents joined, each beginning with the
        boundary.

    Raises:
        ShardError: the fragment does not have the manifest's hash or checksum, also when read again.
        StorageError: the store could not be read.
    """
    column = _read_verified(store, manifest, fragment, ["tokens"]).column("tokens")
    return _join(column, np.dtype(manifest.token_dtype).newbyteorder("<"))


def read_fragment_documents(store: Store, manifest: Manifest, fragment: int) -> tuple[list[str], np.ndarray]:
    """Ids of a fragment's documents (or parts of documents) and where each begins: int64 token offsets
    [documents].

    Raises:
        ShardError: as `read_fragment`.
    """
    table = _read_verified(store, manifest, fragment, ["id", "tokens"])
    lengths = pc.binary_length(table.column("tokens")).to_numpy().astype(np.int64)
    ends = np.cumsum(lengths // np.dtype(manifest.token_dtype).itemsize)
    return table.column("id").to_pylist(), np.concatenate([[0], ends[:-1]])


def _read_verified(store: Store, manifest: Manifest, fragment: int, columns: list[str]) -> pa.Table:
    fragments = manifest.fragments
    shard = manifest.shards[int(fragments.shard[fragment])]
    row_group, checksum = int(fragments.row_group[fragment]), int(fragments.checksum[fragment])
    blake2b = fragments.blake2b[fragment].tobytes() if shard.footer_blake2b else None
    reason = ""
    for _ in range(READ_ATTEMPTS):
        try:
            table = read_row_group(store, shard, row_group, blake2b, columns)
        except StorageError:
            raise
        except (AlteredError, OSError, pa.ArrowException) as broken:
            reason = str(broken)
        else:
            found = zlib.crc32(_join(table.column("tokens"), np.dtype(np.uint8)).data)
            if found == checksum:
                return table
            reason = f"checksum {found:#010x} instead of {checksum:#010x}"
        forget_footers()
    raise ShardError(
        f"{store.uri}/{shard.path}, fragment {row_group}: {reason}; the shard was altered after manifest "
        f"{manifest.digest} was written. Delete it and run data/prepare.py again"
    )


def _join(column: pa.ChunkedArray, dtype: np.dtype) -> np.ndarray:
    """View the bytes of a binary column, all rows joined, as one array; without a copy where it is one
    chunk."""
    chunks = []
    for chunk in column.chunks:
        _, offsets, values = chunk.buffers()
        bounds = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        chunks.append(np.frombuffer(values, np.uint8)[bounds[0] : bounds[-1]])
    joined = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    return joined.view(dtype)
