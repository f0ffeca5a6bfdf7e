"""What a prepared corpus holds: an immutable, columnar list of token shards and fragments, named by its
digest.

A prepared corpus lies under one URI:

    manifests/DIGEST.parquet      this file: one row per fragment, everything else as JSON in the schema's
    metadata manifests/latest              the digest of the manifest written last
    tokenizers/FINGERPRINT/tokenizer.json shards/…parquet               token shards (data/shards.py), named
    by their content set_aside/…jsonl              broken records with shard, line and reason pieces/…
    finished pieces of work, for resuming (data/prepare.py)

The digest depends on content alone: not on paths of the raw shards' store, times, or the number of workers.
The same corpus prepared elsewhere with the same settings has the same digest.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Store

SPLITS = ("train", "validation", "test")
FORMAT = "token-manifest-1"


class ManifestError(ValueError):
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
        content = hashlib.sha256(json.dumps(self._header(), sort_keys=True).encode())
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
        header = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "fragments"}
        return header | {"format": FORMAT, "shards": [asdict(shard) for shard in self.shards]}


def write_manifest(store: Store, manifest: Manifest) -> str:
    """Put the manifest and then name it the latest; returns its path. Writing it again changes nothing."""
    path = manifest_path(manifest.digest)
    columns = {name: getattr(manifest.fragments, name) for name in FRAGMENT_DTYPES}
    metadata = {"manifest": json.dumps(manifest._header(), sort_keys=True)}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), sink, compression="zstd")
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
        table = pq.read_table(pa.BufferReader(store.read(manifest_path(name))))
    except FileNotFoundError as absent:
        remedy = "run data/prepare.py with corpus.prepared set to this URI"
        raise ManifestError(f"no manifest {digest!r} under {store.uri}; {remedy}") from absent
    except pa.ArrowInvalid as broken:
        raise ManifestError(_altered(store, name, str(broken))) from broken
    header = json.loads((table.schema.metadata or {}).get(b"manifest", b"{}"))
    if header.pop("format", None) != FORMAT:
        raise ManifestError(f"{store.uri}/{manifest_path(name)} is not a manifest of format {FORMAT}")
    header["sources"] = tuple(header["sources"])
    header["shards"] = tuple(Shard(**shard) for shard in header["shards"])
    columns = {column: table.column(column).to_numpy() for column in FRAGMENT_DTYPES}
    manifest = Manifest(fragments=Fragments.from_columns(columns), **header)
    if manifest.digest != name:
        raise ManifestError(_altered(store, name, f"its content has the digest {manifest.digest}"))
    return manifest


def manifest_path(digest: str) -> str:
    """Where the manifest of this digest lies in a prepared corpus."""
    return f"manifests/{digest}.parquet"


def _altered(store: Store, name: str, reason: str) -> str:
    return (
        f"{store.uri}/{manifest_path(name)} was altered ({reason}); delete it and run data/prepare.py again: "
        "finished pieces are not done again"
    )
