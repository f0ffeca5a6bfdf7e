"""What a prepared corpus holds: an immutable, columnar list of token shards and fragments, named by its
digest.

A prepared corpus lies under one URI:

    manifests/DIGEST.parquet                this file: a row per shard, the columns of its fragments as
                                            lists, the rest as JSON in the schema's metadata
    manifests/latest                        the digest of the manifest written last
    tokenizers/FINGERPRINT/tokenizer.json
    shards/…parquet                         token shards (data/shards.py), named by their content
    set_aside/…jsonl                        broken records with shard, line and reason
    pieces/…                                finished pieces of work, for resuming (data/prepare.py)

The digest depends on content alone: not on paths of the raw shards' store, times, or the number of workers.
The same corpus prepared elsewhere with the same settings has the same digest.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.config import UserError
from cluster.storage import Store

SPLITS = ("train", "validation", "test")
# Arrow reads no more than 100 MB of a schema's metadata, so what grows with the corpus stands in columns. The first
# format held the shards there too, up to some 400,000 of them; its files are read as before.
FORMAT, FIRST_FORMAT = "token-manifest-2", "token-manifest-1"


class ManifestError(UserError, ValueError):
    """A manifest is missing, altered, or of a format that this code cannot read."""


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

    def __len__(self) -> int:
        return len(self.shard)

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> "Fragments":
        """Make fragments of one sequence per field name; values are cast to the field's type."""
        return cls(**{name: np.asarray(columns[name], dtype) for name, dtype in FRAGMENT_DTYPES.items()})


FRAGMENT_DTYPES = {
    "shard": np.int32,
    "row_group": np.int32,
    "num_tokens": np.int64,
    "num_bytes": np.int64,
    "num_documents": np.int64,
    "checksum": np.uint32,
}
LISTED = tuple(name for name in FRAGMENT_DTYPES if name != "shard")
"""Columns of fragments that stand as lists beside their shard."""
SHARD_SCHEMA = pa.schema(
    [(each.name, pa.int64() if each.type is int else pa.string()) for each in fields(Shard)]
)


@dataclass(frozen=True)
class Manifest:
    """Everything that training needs to know about a prepared corpus without reading it."""

    tokenizer: str
    """Fingerprint: the first 16 hex digits of the sha256 of tokenizer.json."""
    vocab_size: int
    """Entries: one more than the greatest token id."""
    boundary_id: int
    """The token that every document begins with; text never yields it."""
    token_dtype: Literal["uint16", "uint32"]
    sources: tuple[str, ...]
    shards: tuple[Shard, ...]
    fragments: Fragments
    duplicates: dict[str, dict[str, int]]
    """Documents left out as exact duplicates, by split and source."""
    set_aside: dict[str, int]
    """Broken records by source. Their text could not be read, so they have no split."""

    @cached_property
    def digest(self) -> str:
        """The manifest's name: 16 hex digits of a sha256 over all of its fields."""
        # The content is the same in both formats: a corpus prepared anew keeps its name, and runs on it go on.
        everything = self._header() | {
            "format": FIRST_FORMAT,
            "shards": [vars(shard) for shard in self.shards],
        }
        content = hashlib.sha256(json.dumps(everything, sort_keys=True).encode())
        for name, dtype in FRAGMENT_DTYPES.items():
            column = getattr(self.fragments, name)
            content.update(np.ascontiguousarray(column, np.dtype(dtype).newbyteorder("<")).data)
        return content.hexdigest()[:16]

    def select(self, split: str, source: str | None = None) -> np.ndarray:
        """Indices (int64, ascending) of the fragments of a split, and of one source where named.

        Raises:
            ManifestError: no such split or source. An empty split of a known name gives an empty array.
        """
        for kind, name, known in (("split", split, SPLITS), ("source", source, (*self.sources, None))):
            if name not in known:
                named = ", ".join(str(each) for each in known if each is not None)
                raise ManifestError(f"manifest {self.digest} has no {kind} {name!r}; it has: {named}")
        wanted = np.array(
            [shard.split == split and source in (None, shard.source) for shard in self.shards], dtype=bool
        )
        return np.flatnonzero(wanted[self.fragments.shard]) if len(self.shards) else np.empty(0, np.int64)

    def part(self, chosen: np.ndarray) -> "Manifest":
        """Some fragments (int64 indices) and their shards alone: what a reader elsewhere needs to be sent.

        It goes by the digest of the whole, which errors are to name.
        """
        shards, shard = np.unique(self.fragments.shard[chosen], return_inverse=True)
        columns = {name: getattr(self.fragments, name)[chosen] for name in FRAGMENT_DTYPES}
        part = replace(
            self,
            shards=tuple(self.shards[index] for index in shards),
            fragments=Fragments.from_columns(columns | {"shard": shard}),
        )
        vars(part)["digest"] = self.digest
        return part

    def summary(self) -> dict[str, Any]:
        """Counts for tables.

        Returns:
            {"splits": {split: {source: {"fragments", "documents", "bytes", "tokens", "bytes_per_token",
            "duplicates"}}}, "set_aside": {source: records}}
        """
        splits = {split: {source: self._totals(split, source) for source in self.sources} for split in SPLITS}
        return {"splits": splits, "set_aside": dict(self.set_aside)}

    def _totals(self, split: str, source: str) -> dict[str, Any]:
        chosen = self.select(split, source)
        tokens = int(self.fragments.num_tokens[chosen].sum())
        num_bytes = int(self.fragments.num_bytes[chosen].sum())
        return {
            "fragments": len(chosen),
            "documents": int(self.fragments.num_documents[chosen].sum()),
            "bytes": num_bytes,
            "tokens": tokens,
            "bytes_per_token": num_bytes / tokens if tokens else 0.0,
            "duplicates": self.duplicates.get(split, {}).get(source, 0),
        }

    def _header(self) -> dict[str, Any]:
        """The fields that do not grow with the corpus, ready for JSON."""
        columnar = ("shards", "fragments")
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in columnar}


def write_manifest(store: Store, manifest: Manifest) -> str:
    """Put the manifest and then name it the latest; returns its path. Writing it again changes nothing."""
    path = manifest_path(manifest.digest)
    header = json.dumps(manifest._header() | {"format": FORMAT}, sort_keys=True)
    sink = pa.BufferOutputStream()
    table = _by_shard(manifest).replace_schema_metadata({"manifest": header})
    pq.write_table(table, sink, compression="zstd")
    store.put(path, sink.getvalue().to_pybytes())
    mark_latest(store, manifest)
    return path


def mark_latest(store: Store, manifest: Manifest) -> None:
    """Let `read_manifest` without a digest find this one."""
    store.put("manifests/latest", manifest.digest.encode())


def read_manifest(store: Store, digest: str = "latest") -> Manifest:
    """Read the manifest of this digest, or the one written last.

    Raises:
        ManifestError: there is none, or its content does not have the digest that it is named by.
    """
    try:
        name = store.read("manifests/latest").decode().strip() if digest == "latest" else digest
        content = store.read(manifest_path(name))
    except FileNotFoundError as absent:
        remedy = "run data/prepare.py with corpus.prepared set to this URI"
        raise ManifestError(f"no manifest {digest!r} under {store.uri}; {remedy}") from absent
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowInvalid, OSError) as broken:  # OSError: of what Parquet's own layer cannot read
        raise ManifestError(_altered(store, name, str(broken))) from broken
    header = json.loads((table.schema.metadata or {}).get(b"manifest", b"{}"))
    header["sources"] = tuple(header.get("sources", ()))
    written = header.pop("format", None)
    if written == FORMAT:
        shards, fragments = _from_shards(table)
    elif written == FIRST_FORMAT:
        shards, fragments = _from_fragments(table, header.pop("shards"))
    else:
        at, remedy = f"{store.uri}/{manifest_path(name)}", "run data/prepare.py again"
        raise ManifestError(f"{at} has the format {written}, not {FORMAT}; {remedy}")
    manifest = Manifest(shards=shards, fragments=fragments, **header)
    if manifest.digest != name:
        raise ManifestError(_altered(store, name, f"its content has the digest {manifest.digest}"))
    return manifest


def _by_shard(manifest: Manifest) -> pa.Table:
    """A row per shard: its fields, and those of its fragments as lists."""
    of_shard = manifest.fragments.shard
    assert np.all(of_shard[1:] >= of_shard[:-1]), "fragments stand in the order of their shards"
    columns = [[getattr(shard, name) for shard in manifest.shards] for name in SHARD_SCHEMA.names]
    table = pa.table(columns, SHARD_SCHEMA)
    bounds = pa.array(np.searchsorted(of_shard, np.arange(len(table) + 1)), pa.int32())
    for name in LISTED:
        values = pa.array(getattr(manifest.fragments, name))
        table = table.append_column(f"fragment_{name}", pa.ListArray.from_arrays(bounds, values))
    return table


def _from_shards(table: pa.Table) -> tuple[tuple[Shard, ...], Fragments]:
    """What `_by_shard` made a table of."""
    names = SHARD_SCHEMA.names
    values = zip(*(table.column(name).to_numpy().tolist() for name in names), strict=True)
    columns = {name: pc.list_flatten(table.column(f"fragment_{name}")).to_numpy() for name in LISTED}
    num_fragments = pc.list_value_length(table.column("fragment_row_group")).to_numpy()
    columns["shard"] = np.repeat(np.arange(len(table)), num_fragments)
    return tuple(Shard(*each) for each in values), Fragments.from_columns(columns)


def _from_fragments(table: pa.Table, shards: list[dict[str, Any]]) -> tuple[tuple[Shard, ...], Fragments]:
    """The same of the first format: a row per fragment."""
    columns = {name: table.column(name).to_numpy() for name in FRAGMENT_DTYPES}
    return tuple(Shard(**shard) for shard in shards), Fragments.from_columns(columns)


def manifest_path(digest: str) -> str:
    """Where the manifest of this digest lies in a prepared corpus."""
    return f"manifests/{digest}.parquet"


def _altered(store: Store, name: str, reason: str) -> str:
    return (
        f"{store.uri}/{manifest_path(name)} was altered ({reason}); delete it and run data/prepare.py again: "
        "finished pieces are not done again"
    )
