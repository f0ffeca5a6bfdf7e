"""What a prepared corpus holds: an immutable, columnar list of token shards and fragments, named by its
digest.

A prepared corpus lies under one URI:

    manifests/DIGEST.parquet                this file: its columns are in data/shards/manifest_table.py, the rest is
                                            JSON in the schema's metadata
    manifests/latest                        the digest of the manifest written last
    tokenizers/FINGERPRINT/tokenizer.json
    shards/…parquet                         token shards (data/shards/shards.py), named by their content
    set_aside/…jsonl                        broken records with shard, line and reason
    pieces/…                                finished pieces of work, for resuming (data/prepare.py)

The digest depends on content alone: not on paths of the raw shards' store, times, or the number of workers.
The same corpus prepared elsewhere with the same settings has the same digest.
"""

import hashlib
import json
import re
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from cluster.console.errors import UserError
from cluster.storage.uris import Store
from data.shards.manifest_table import (
    FIRST_FORMAT,
    FORMAT,
    FRAGMENT_DTYPES,
    SHARD_SCHEMA,
    UNHASHED_SHARD_SCHEMA,
    Fragments,
    Shard,
    UnknownFormatError,
    decode,
    encode,
)

SPLITS = ("train", "validation", "test")
LATEST = "manifests/latest"
LATEST_BYTES = 128
NAME = "[0-9a-f]{16}|[0-9a-f]{32}"
MANIFEST_BYTES = 8 << 30
"""Of a manifest's file at most: 28 million fragments, a petabyte of text, have 1 GB."""


class ManifestError(UserError, ValueError):
    """A manifest is missing, altered, or of a format that this code cannot read."""


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

    @property
    def hashed(self) -> bool:
        """Whether it has hashes of footers and fragments; not without a shard."""
        return any(shard.footer_blake2b for shard in self.shards)

    @property
    def weakness(self) -> str | None:
        """What protects its fragments too little, with the remedy, in one line; None if nothing does."""
        if self.hashed or not self.shards:
            return None
        return (
            f"manifest {self.digest} protects its fragments by CRC-32 alone, which finds accidents and no intent; "
            "data/prepare.py with the same corpus.* makes one with hashes, and tokenizes nothing again"
        )

    @cached_property
    def digest(self) -> str:
        """The manifest's name: 32 hex digits of a sha256 over all of its fields; 16 where it has no hashes."""
        # Without hashes the content is the same in both formats, so that what was once named keeps its name.
        names = (SHARD_SCHEMA if self.hashed else UNHASHED_SHARD_SCHEMA).names
        everything = self._header() | {
            "format": FORMAT if self.hashed else FIRST_FORMAT,
            "shards": [{name: getattr(shard, name) for name in names} for shard in self.shards],
        }
        content = hashlib.sha256(json.dumps(everything, sort_keys=True, allow_nan=False).encode())
        for name, dtype in FRAGMENT_DTYPES.items():
            column = getattr(self.fragments, name)
            content.update(np.ascontiguousarray(column, np.dtype(dtype).newbyteorder("<")).data)
        if not self.hashed:
            return content.hexdigest()[:16]
        content.update(self.fragments.blake2b.tobytes())
        return content.hexdigest()[:32]

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
        columns = {each.name: getattr(self.fragments, each.name)[chosen] for each in fields(Fragments)}
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
    header, hashed = manifest._header(), manifest.hashed
    store.put(path, encode(header, manifest.shards, manifest.fragments, hashed=hashed))
    mark_latest(store, manifest)
    return path


def mark_latest(store: Store, manifest: Manifest) -> None:
    """Let `read_manifest` without a digest find this one."""
    store.put(LATEST, manifest.digest.encode())


def read_manifest(store: Store, digest: str = "latest") -> Manifest:
    """Read the manifest of this digest, or the one written last.

    Raises:
        ManifestError: there is none, or its content does not have the digest that it is named by.
    """
    try:
        name = _latest(store) if digest == "latest" else digest
        if not re.fullmatch(NAME, name):
            raise ManifestError(
                f"{name!r} names no manifest of {store.uri}: a digest has 16 or 32 hex digits"
            )
        path = manifest_path(name)
        if (num_bytes := store.size(path)) > MANIFEST_BYTES:
            raise ManifestError(_altered(store, name, f"it has {num_bytes:,} bytes"))
        content = store.read(path)
    except FileNotFoundError as absent:
        remedy = "run data/prepare.py with corpus.prepared set to this URI"
        raise ManifestError(f"no manifest {digest!r} under {store.uri}; {remedy}") from absent
    try:
        manifest = _decode(content)
        found = manifest.digest
    except UnknownFormatError as other:
        remedy = "run data/prepare.py again"
        raise ManifestError(f"{store.uri}/{path} has the format {other}, not {FORMAT}; {remedy}") from other
    except (
        Exception
    ) as broken:  # of a dozen types, by what altered bytes happen to say to Arrow, JSON and NumPy
        reason = f"{type(broken).__name__}: {' '.join(str(broken).split())[:200]}"
        raise ManifestError(_altered(store, name, reason)) from broken
    if found != name:
        raise ManifestError(_altered(store, name, f"its content has the digest {found}"))
    return manifest


def _decode(content: bytes) -> Manifest:
    header, shards, fragments = decode(content)
    header["sources"] = tuple(header["sources"])
    return Manifest(shards=shards, fragments=fragments, **header)


def _latest(store: Store) -> str:
    if store.size(LATEST) <= LATEST_BYTES:
        name = store.read(LATEST).decode("ascii", "replace").strip()
        if re.fullmatch(NAME, name):
            return name
    remedy = "run data/prepare.py again, which names it, or write the digest of a file of manifests/ into it"
    raise ManifestError(f"{store.uri}/{LATEST} names no manifest; {remedy}")


def manifest_path(digest: str) -> str:
    """Where the manifest of this digest lies in a prepared corpus."""
    return f"manifests/{digest}.parquet"


def _altered(store: Store, name: str, reason: str) -> str:
    return (
        f"{store.uri}/{manifest_path(name)} was altered ({reason}); delete it and run data/prepare.py again: "
        "finished pieces are not done again"
    )
