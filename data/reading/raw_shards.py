"""What the raw corpus is: its configuration, and the list of its raw shards."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Literal

from cluster.configuration.keys import may_change
from cluster.console.errors import UserError
from cluster.console.printable import printable
from cluster.sessions.workers import LEAST_CPUS, MOST_CPUS
from cluster.storage.store import name_problem
from cluster.storage.uris import open_store
from data.reading.clean import Normalization
from data.reading.splits import SplitConfig
from data.reading.unpacking import RATIO
from data.tokens.tokenizer import TokenizerConfig

Format = Literal["jsonl", "parquet", "text"]
FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

# How much text a byte of a raw shard stands for, to size fragments by: English prose under gzip and zstd.
EXPANSION = {"gzip": 3, "zstd": 3, "parquet": 2}
BYTES_PER_TOKEN = 4
# 64 lanes of 16 fragments each, so that lanes are well mixed; a power of 4 (see `fragment_tokens_for`).
FRAGMENTS_WANTED = 1_024
SMALLEST_FRAGMENT, LARGEST_FRAGMENT = 4_096, 1_048_576

# In an error: enough to see what they have in common.
NAMES_SHOWN = 3

# Smaller raw shards are joined into pieces of work up to this size: compressed, a second's work.
PIECE_BYTES = 2**20


class CorpusError(UserError, ValueError):
    """The raw corpus is not what the configuration says; names the file, the key and a remedy."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where the raw text is, how it is read, and where the prepared corpus lies."""

    uri: str = ""
    """Folder of the raw shards (a path, file://, s3:// or gs://), if there is one source; it is named
    `corpus`."""
    sources: dict[str, str] = field(default_factory=dict)
    """Folders of raw shards by name of the source, if there are several."""
    prepared: str = may_change("")
    """URI of the prepared corpus: token shards, manifests, tokenizers. Outside of all sources."""
    include: tuple[str, ...] = ("*",)
    """Patterns of the raw shards' paths relative to their source; `*` goes across folders."""
    text_column: str = "text"
    """Field of JSONL records, or column of Parquet files, that holds the text."""
    id_column: str = "id"
    """Field or column that names the document; a record without it is named PATH:LINE."""
    normalization: Normalization = "NFC"
    """Unicode form of the text: NFC, NFKC (replaces compatibility characters), or none (text as it is)."""
    max_record_bytes: int = 16_777_216
    """Bytes of the longest record; longer ones are set aside, longer plain-text files cut at a line feed."""
    max_expansion: int = may_change(RATIO)
    """Bytes that each byte of a compressed shard may unpack to; 1 GiB of each shard is free. More is refused."""
    set_aside_limit: float = 0.01
    """Share of broken records, in 0 to 1, above which preparing stops; and of shards that cannot be read to their
    end. Of a piece of work with 10,000 broken ones it stops while reading."""
    fragment_tokens: int = 0
    """Tokens per fragment; 0: by the size of the raw corpus, 4,096 to 1,048,576."""
    cpus_per_piece: float = may_change(1.0)
    """CPUs that Ray Data reserves per piece of work; each works in one thread."""
    splits: SplitConfig = field(default_factory=SplitConfig)
    """Training, validation and test."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer, given or trained."""

    def named_sources(self) -> dict[str, str]:
        """URI by name of the source, in the order of names."""
        return dict(sorted(self.sources.items())) if self.sources else {"corpus": self.uri}

    def problems(self, at: str) -> Iterator[str]:
        """Messages on keys that contradict each other; `at` is the section's dotted name. Reads nothing."""
        if bool(self.uri) == bool(self.sources):
            yield f"{at}.uri={self.uri!r} and {at}.sources={self.sources!r}: give exactly one of them"
        if not self.prepared:
            yield f"{at}.prepared is empty; give the URI where token shards and manifests shall lie"
        for name, uri in self.named_sources().items():
            if uri and self.prepared and _location(self.prepared).startswith(_location(uri)):
                yield f"{at}.prepared={self.prepared} lies inside source {name!r} ({uri}); put it beside it"
        if not 0 <= self.set_aside_limit <= 1:
            yield f"{at}.set_aside_limit={self.set_aside_limit} is not a share; give 0 to 1, as 0.01"
        if self.fragment_tokens and not 256 <= self.fragment_tokens <= 2**26:
            yield f"{at}.fragment_tokens={self.fragment_tokens:,} is outside 256 to 67,108,864; 0 chooses one"
        if self.max_record_bytes < 1_024:
            yield f"{at}.max_record_bytes={self.max_record_bytes:,} is below 1,024"
        if self.max_expansion < 1:
            yield f"{at}.max_expansion={self.max_expansion} is below 1; give the ratio of the best packed shard"
        if not LEAST_CPUS <= self.cpus_per_piece <= MOST_CPUS:
            yield (
                f"{at}.cpus_per_piece={self.cpus_per_piece} must be {LEAST_CPUS:g} to {MOST_CPUS:,}; "
                "give 1, or less to share CPUs"
            )
        yield from self.splits.problems(f"{at}.splits")
        yield from self.tokenizer.problems(f"{at}.tokenizer")


def _location(uri: str) -> str:
    """A folder's one name, with a slash at its end: a prepared corpus inside a source, however both are spelled, would
    be met by the source's next listing."""
    try:
        scheme, _, place = open_store(uri).uri.partition("://")
    except ValueError:
        return f"{uri}/"  # whoever opens it says what is wrong with it
    if scheme == "file":
        place = os.path.realpath(place)
    return f"{scheme}://{place.rstrip('/')}/"


@dataclass(frozen=True)
class RawShard:
    """One file of the raw corpus."""

    source: str
    path: str
    """Relative to the source's URI."""
    num_bytes: int
    version: str
    """Changes when the file is written anew: the store's entity tag, or time of change and size."""

    @property
    def format(self) -> Format:
        return (_format_of(self.path) or ("text", None))[0]

    @property
    def compression(self) -> str | None:
        return (_format_of(self.path) or ("text", None))[1]

    @property
    def text_bytes(self) -> int:
        """A guess at the text in it, from its size alone."""
        return self.num_bytes * EXPANSION.get(self.compression or self.format, 1)


def list_raw_shards(config: CorpusConfig) -> list[RawShard]:
    """List all raw shards, by source and path, without what is hidden (`Store.list_input`).

    Raises:
        CorpusError: a source without any, a file of unknown format or with a name that cannot be used, or a pattern of
            `splits` that names no shard.
        StorageError: a source cannot be listed.
    """
    shards: list[RawShard] = []
    problems: list[str] = []
    for source, uri in config.named_sources().items():
        found = [
            RawShard(source, each.path, each.num_bytes, each.version)
            for each in open_store(uri).list_input()
            if any(fnmatchcase(each.path, pattern) for pattern in config.include)
        ]
        problems += [
            f"{uri}/{printable(shard.path)}: {problem}"
            for shard in found
            if (problem := name_problem(shard.path))
        ][:NAMES_SHOWN]
        if not found:
            problems.append(f"no documents at {uri} (source {source!r}, include={list(config.include)})")
        unknown = [shard.path for shard in found if _format_of(shard.path) is None]
        if unknown:
            problems.append(
                f"{uri}/{printable(unknown[0])}: unknown format ({len(unknown):,} such files); known: "
                f"{', '.join(FORMATS)}, all but Parquet also with .gz or .zst. Leave others out by "
                "corpus.include, as '*.jsonl.gz'"
            )
        shards += found
    for key, pattern in config.splits.patterns():
        if key.endswith("_shards") and not any(fnmatchcase(shard.path, pattern) for shard in shards):
            example = f"; a path looks like {shards[0].path!r}" if shards else ""
            problems.append(f"corpus.splits.{key}: {pattern!r} names no raw shard{example}")
    if problems:
        raise CorpusError("\n".join(problems))
    return sorted(shards, key=lambda shard: (shard.source, shard.path))


def _format_of(path: str) -> tuple[Format, str | None] | None:
    suffixes = PurePosixPath(path).suffixes
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes = suffixes[:-1]
    known = FORMATS.get(suffixes[-1]) if suffixes else None
    if known is None or (known == "parquet" and compression):
        return None
    return known, compression


def group_shards(shards: list[RawShard]) -> list[tuple[RawShard, ...]]:
    """Join neighbouring small raw shards of one source into pieces of work of about `PIECE_BYTES`.

    Where a piece ends depends on the shards around that place only: also at each path whose hash is a
    multiple of 256. A shard that is added or changed therefore changes its own piece and few beside it, not
    all that come after.
    """
    pieces: list[tuple[RawShard, ...]] = []
    open_piece: list[RawShard] = []
    for shard in shards:
        joins = open_piece and (
            open_piece[0].source == shard.source
            and sum(each.num_bytes for each in open_piece) + shard.num_bytes <= PIECE_BYTES
        )
        if open_piece and not joins:
            pieces.append(tuple(open_piece))
            open_piece = []
        open_piece.append(shard)
        if hashlib.blake2b(shard.path.encode()).digest()[0] == 0:
            pieces.append(tuple(open_piece))
            open_piece = []
    return [*pieces, tuple(open_piece)] if open_piece else pieces


def fragment_tokens_for(config: CorpusConfig, shards: list[RawShard]) -> int:
    """Tokens per fragment: as configured, else the largest power of 4 that gives `FRAGMENTS_WANTED`
    fragments.

    A pure function of the list of shards, so a corpus grown step by step equals one prepared at once. Being a
    power of 4, it changes at most four times while a corpus grows without bound (never above 4 GiB of text):
    only then are token shards written anew, and all the rewriting together is a third of the last one.
    """
    if config.fragment_tokens:
        return config.fragment_tokens
    tokens = sum(shard.text_bytes for shard in shards) // BYTES_PER_TOKEN
    size = SMALLEST_FRAGMENT
    while size < LARGEST_FRAGMENT and tokens >= 4 * size * FRAGMENTS_WANTED:
        size *= 4
    return size
