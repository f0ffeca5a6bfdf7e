"""The columns of a manifest, and the Parquet file that they lie in: a row per shard, those of its fragments as lists.

The file comes from a store that others may write to. What it would take in memory is bounded by its own size before it
is decoded; whether its content is the one that was meant, its digest says (`data/shards/manifest.py`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.reading.parquet_claims import claims
from data.reading.unpacking import UnpackingError

# Arrow reads no more than 100 MB of a schema's metadata, so what grows with the corpus stands in columns. The first
# format held the shards there too, up to some 400,000 of them. Before the third fragments had no hash but CRC-32, which
# whoever alters them can make fit. Files of both are read as before.
FORMAT, UNHASHED_FORMAT, FIRST_FORMAT = "token-manifest-3", "token-manifest-2", "token-manifest-1"
HASH_BYTES = 16
"""Of the BLAKE2b of a fragment and of a footer: `data/shards/shard_hashes.py`."""
# What a file may take in memory: a fragment has 4 bytes or more that do not compress, a shard 64; the floor is for
# small ones.
VALUES_PER_BYTE, BYTES_PER_BYTE = 1, 64
FLOOR_VALUES, FLOOR_BYTES = 1 << 20, 64 << 20


class UnknownFormatError(ValueError):
    """A manifest is of a format that this code does not know; the message is its name."""


@dataclass(frozen=True)
class Shard:
    """One token shard: a Parquet file of tokenized documents of one split and one source."""

    path: str
    """Relative to the prepared corpus."""
    split: str
    source: str
    num_bytes: int
    """Size of the file."""
    sha256: str
    """Of the file, in hex."""
    footer_bytes: int = 0
    """At the file's end, its length and magic number included; 0 without hashes."""
    footer_blake2b: str = ""
    """Of these, in hex; empty in manifests of before there were hashes."""


@dataclass(frozen=True)
class Fragments:
    """The fragments of all shards, one entry each in equally long arrays, in the manifest's order."""

    shard: np.ndarray
    """int32: index into `Manifest.shards`."""
    row_group: np.ndarray
    """int32: index of the row group in that shard."""
    num_tokens: np.ndarray
    """int64, boundaries included."""
    num_bytes: np.ndarray
    """int64: UTF-8 bytes of the normalised text behind the tokens."""
    num_documents: np.ndarray
    """int64: documents that begin in the fragment (later parts of a cut document do not count)."""
    checksum: np.ndarray
    """uint32: CRC-32 of the fragment's tokens as little-endian bytes."""
    blake2b: np.ndarray
    """V16: BLAKE2b of the row group as it lies in the file; zeros in manifests of before there were hashes."""

    def __len__(self) -> int:
        return len(self.shard)

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> "Fragments":
        """Make fragments of one sequence per field name; values are cast to the field's type.

        Hashes are a list of hex, or an array; without any they are zeros.
        """
        numbers = {name: _whole(columns[name], dtype) for name, dtype in FRAGMENT_DTYPES.items()}
        hashes = columns.get("blake2b")
        if hashes is None:
            hashes = np.zeros(len(numbers["shard"]), HASH_DTYPE)
        elif not isinstance(hashes, np.ndarray):
            hashes = np.frombuffer(bytes.fromhex("".join(hashes)), HASH_DTYPE)
        return cls(**numbers, blake2b=hashes)


FRAGMENT_DTYPES = {
    "shard": np.int32,
    "row_group": np.int32,
    "num_tokens": np.int64,
    "num_bytes": np.int64,
    "num_documents": np.int64,
    "checksum": np.uint32,
}
HASH_DTYPE = np.dtype(f"V{HASH_BYTES}")
LISTED = tuple(name for name in FRAGMENT_DTYPES if name != "shard")
"""Numbers of fragments that stand as lists beside their shard."""
SHARD_SCHEMA = pa.schema(
    [(each.name, pa.int64() if each.type is int else pa.string()) for each in fields(Shard)]
)
UNHASHED_SHARD_SCHEMA = pa.schema([each for each in SHARD_SCHEMA if not each.name.startswith("footer_")])


def _whole(values: Any, dtype: type) -> np.ndarray:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"a column of fragments holds {array.dtype}")
    return array.astype(dtype, copy=False)


def encode(
    header: Mapping[str, Any], shards: Sequence[Shard], fragments: Fragments, *, hashed: bool
) -> bytes:
    """The file of a manifest; `header` is the rest of it, ready for JSON."""
    of_shard = fragments.shard
    assert np.all(of_shard[1:] >= of_shard[:-1]), "fragments stand in the order of their shards"
    schema = SHARD_SCHEMA if hashed else UNHASHED_SHARD_SCHEMA
    table = pa.table([[getattr(shard, name) for shard in shards] for name in schema.names], schema)
    bounds = pa.array(np.searchsorted(of_shard, np.arange(len(table) + 1)), pa.int32())
    columns = {name: pa.array(getattr(fragments, name)) for name in LISTED}
    if hashed:
        packed = pa.py_buffer(np.ascontiguousarray(fragments.blake2b))
        columns["blake2b"] = pa.Array.from_buffers(pa.binary(HASH_BYTES), len(fragments), [None, packed])
    for name, values in columns.items():
        table = table.append_column(f"fragment_{name}", pa.ListArray.from_arrays(bounds, values))
    content = dict(header) | {"format": FORMAT if hashed else UNHASHED_FORMAT}
    table = table.replace_schema_metadata({"manifest": json.dumps(content, sort_keys=True, allow_nan=False)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def decode(content: bytes) -> tuple[dict[str, Any], tuple[Shard, ...], Fragments]:
    """The header, shards and fragments of a file.

    Raises:
        UnknownFormatError: it is of no format that this code knows.
        Exception: it is damaged. Of which type, depends on how; nothing of it may be believed.
    """
    footer, num_bytes, num_values = claims(content)
    most_bytes = max(FLOOR_BYTES, BYTES_PER_BYTE * len(content))
    most_values = max(FLOOR_VALUES, VALUES_PER_BYTE * len(content))
    if num_bytes > most_bytes or num_values > most_values:
        raise UnpackingError(
            f"its {len(content):,} bytes claim to hold {num_bytes:,}, and {num_values:,} values"
        )
    header = json.loads(footer.metadata[b"manifest"])
    written = header.pop("format")
    if written == FIRST_FORMAT:
        table = pq.read_table(pa.BufferReader(content), use_threads=False)
        columns: dict[str, Any] = {name: table.column(name).to_numpy() for name in FRAGMENT_DTYPES}
        shards = tuple(Shard(**shard) for shard in header.pop("shards"))
        return header, shards, Fragments.from_columns(columns)
    if written not in (UNHASHED_FORMAT, FORMAT):
        raise UnknownFormatError(written)
    schema = SHARD_SCHEMA if written == FORMAT else UNHASHED_SHARD_SCHEMA
    texts = [each.name for each in schema if each.type == pa.string()]
    file = pq.ParquetFile(pa.BufferReader(content), read_dictionary=texts, page_checksum_verification=True)
    table = file.read(use_threads=False)
    columns = {name: _flat(table, name).to_numpy() for name in LISTED}
    if written == FORMAT:
        columns["blake2b"] = _hashes(_flat(table, "blake2b"))
    num_fragments = pc.list_value_length(table.column("fragment_row_group")).to_numpy()
    columns["shard"] = np.repeat(np.arange(len(table)), num_fragments)
    values = zip(*(_values(table.column(name), most_bytes) for name in schema.names), strict=True)
    return header, tuple(Shard(*each) for each in values), Fragments.from_columns(columns)


def _flat(table: pa.Table, name: str) -> pa.ChunkedArray:
    return pc.list_flatten(table.column(f"fragment_{name}"))


def _hashes(column: pa.ChunkedArray) -> np.ndarray:
    if column.type != pa.binary(HASH_BYTES) or column.null_count:
        raise TypeError(f"fragment_blake2b is {column.type}")
    parts = [
        np.frombuffer(chunk.buffers()[1], HASH_DTYPE)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate(parts) if parts else np.empty(0, HASH_DTYPE)


def _values(column: pa.ChunkedArray, most_bytes: int) -> list[Any]:
    """A column of shards as Python's values; one text that stands in very many rows may not fill the memory."""
    if not pa.types.is_dictionary(column.type):
        return column.to_numpy().tolist()
    texts = []
    num_bytes = 0
    for chunk in column.chunks:
        lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
        num_bytes += pc.sum(lengths).as_py() or 0
        if num_bytes > most_bytes:
            raise UnpackingError(f"its texts claim {num_bytes:,} bytes")
        texts += chunk.dictionary.to_numpy(zero_copy_only=False)[chunk.indices.to_numpy()].tolist()
    return texts
