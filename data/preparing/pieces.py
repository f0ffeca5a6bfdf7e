"""The work on one piece of the corpus: read its raw shards once for hashes, once more for tokens.

Both halves end by putting a record whose name is a digest of everything that went in. A record that is there
is a piece of work that is done: it is skipped after a kill, and when other shards are added.
`data/prepare.py` deals the pieces out.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from cluster.configuration.stored_file import DamagedFileError
from cluster.storage.scratch import scratch_folder, writing_locally
from cluster.storage.store import former_version
from cluster.storage.uris import Store, open_store
from data.curation.exact_duplicates import (
    HashFile,
    duplicates_of,
    find_duplicates,
    merge_hashes,
    record_duplicates,
    write_hashes,
)
from data.finished_pieces.records import put_record, read_record, record_path
from data.reading.documents import KEPT_BYTES, Broken, Document, read_documents
from data.reading.raw_shards import CorpusConfig, CorpusError, RawShard
from data.reading.splits import matching_pattern, split_of
from data.shards.manifest import SPLITS
from data.shards.manifest_table import Shard
from data.shards.shard_hashes import AlteredError, hash_stored
from data.shards.shards import ShardWriter
from data.tokens.tokenizer import Encoder, FixedTokenizer, load_tokenizer

# Part of every piece's name: raise it when the same input shall give other output.
FORMAT = 2
# Large enough that calling the tokenizer costs nothing beside its work, small enough to stay in the cache.
BATCH_CHARACTERS = 1_048_576
# In a survey's record, which all are in memory together; the file of what was set aside has the reason of each in it.
REASONS_COUNTED, OTHER_REASONS = 100, "other reasons"
# Of a piece. Of 100 broken records, 1,000 bytes each, the file has 0.1 to 0.6 MB; those beyond are counted, by reason.
SET_ASIDE_RECORDS, SET_ASIDE_BYTES = 10_000, 16 << 20
# Broken records of a piece from which on the limit acts while it is read: so many are no accident.
BROKEN_RECORDS_TRIED = 10_000
EMPTIED = "empty after the tokenizer's own normalisation"


@dataclass(frozen=True)
class Piece:
    """Raw shards of one source that are prepared as one unit of work."""

    shards: tuple[RawShard, ...]

    @property
    def source(self) -> str:
        return self.shards[0].source

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    def survey_digest(self, config: CorpusConfig) -> str:
        """Names the first half of the work by its input: raw shards with versions, and how they are read."""
        shards = [asdict(shard) for shard in self.shards]
        return digest_of("pinned survey", shards, _reading(config), asdict(config.splits))

    def former_survey_digest(self, config: CorpusConfig) -> str:
        """As `survey_digest` was before a survey pinned ids and splits, and a local file's version its change time."""
        shards = [asdict(shard) | {"version": former_version(shard.version)} for shard in self.shards]
        return digest_of("survey", shards, _reading(config), asdict(config.splits))


def _reading(config: CorpusConfig) -> tuple[str, str, str, int]:
    return config.text_column, config.id_column, config.normalization, config.max_record_bytes


def digest_of(*parts: Any) -> str:
    """16 hex digits of a sha256 over JSON."""
    content = json.dumps([FORMAT, *parts], sort_keys=True, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def hashes_path(survey_digest: str) -> str:
    """Where a survey puts the hashes of its documents."""
    return f"pieces/hashes-{survey_digest}.parquet"


def read_piece(piece: Piece, config: CorpusConfig) -> Iterator[tuple[RawShard, Document | Broken]]:
    """All records of a piece with the shard that each is from, in order."""
    store = open_store(config.named_sources()[piece.source])
    for shard in piece.shards:
        for record in read_documents(store, shard, config):
            yield shard, record


def survey(piece: Piece, config: CorpusConfig) -> None:
    """First half: hash and deal to splits all documents, set broken records aside, put the record of that.

    The record: documents, bytes by split, kinds of broken records with counts, shards that cannot be read to
    their end, how often each pattern of `splits` named a document, `pinned`, the digest of `_Pin`, and `content`, a
    digest of all texts in order.

    Raises:
        CorpusError: more of its records than `BROKEN_RECORDS_TRIED`, and a greater share than the limit, are broken.
    """
    prepared, name = open_store(config.prepared), piece.survey_digest(config)
    contents, splits, order, pin = bytearray(), bytearray(), hashlib.sha256(), _Pin()
    bytes_of, named, reasons = Counter[str](), Counter[str](), Counter[str]()
    torn = dict[str, str]()
    with _SetAside(prepared, f"set_aside/{name}.jsonl") as set_aside:
        for shard, record in read_piece(piece, config):
            if isinstance(record, Broken):
                set_aside.add(shard, record)
                counted = record.kind in reasons or len(reasons) < REASONS_COUNTED
                reasons[record.kind if counted else OTHER_REASONS] += 1
                if record.torn:
                    torn[shard.path] = record.reason
                if _is_beyond(config, set_aside.num_records, len(splits)):
                    break
                continue
            split = split_of(config.splits, shard.path, record.id, record.content)
            contents += record.content
            splits.append(SPLITS.index(split))
            order.update(record.content)
            pin.add(split, record)
            bytes_of[split] += record.num_bytes
            if pattern := matching_pattern(config.splits, shard.path, record.id):
                named["=".join(pattern)] += 1
    if _is_beyond(config, set_aside.num_records, len(splits)):
        raise CorpusError(_too_many_broken(config, shard, set_aside.num_records, len(splits), reasons))
    prepared.put(hashes_path(name), write_hashes(bytes(contents), bytes(splits)))
    summary = {
        "shards": [shard.path for shard in piece.shards],
        "documents": len(splits),
        "bytes": bytes_of,
        "set_aside": set_aside.num_records,
        "reasons": reasons,
        "torn": torn,
        "named": named,
        "content": order.hexdigest(),
        "pinned": pin.hexdigest(),
    }
    put_record(prepared, record_path("survey", name), summary)


class _Pin:
    """Digest of all that decides what becomes of a piece's documents: id, split and text of each, in order."""

    def __init__(self) -> None:
        self._sum = hashlib.sha256()

    def add(self, split: str, document: Document) -> None:
        name = document.id.encode()
        head = len(name).to_bytes(8, "little") + bytes([SPLITS.index(split)])
        self._sum.update(head + name + document.content)

    def hexdigest(self) -> str:
        return self._sum.hexdigest()


def changed_since_survey(piece: Piece, config: CorpusConfig) -> CorpusError:
    """The error of a piece that holds other documents than were surveyed, which it is then surveyed for anew."""
    open_store(config.prepared).delete(record_path("survey", piece.survey_digest(config)))
    paths = ", ".join(shard.path for shard in piece.shards[:4])
    return CorpusError(f"{paths}: changed while it was being prepared; run the same command again")


def _is_beyond(config: CorpusConfig, broken: int, documents: int) -> bool:
    return broken >= BROKEN_RECORDS_TRIED and broken > config.set_aside_limit * (broken + documents)


def _too_many_broken(
    config: CorpusConfig, shard: RawShard, broken: int, documents: int, reasons: Counter[str]
) -> str:
    common = "; ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(3))
    return (
        f"{shard.path} (source {shard.source!r}): {broken:,} of the first {broken + documents:,} records of its piece "
        f"of work are broken, more than corpus.set_aside_limit={config.set_aside_limit}: {common}. The first of them "
        f"are in {config.prepared}/set_aside/; leave the shard out by corpus.include, or raise the limit"
    )


class _SetAside:
    """Broken records on their way to the store: the first ones, on the local disk until then; all are counted."""

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path = store, path
        self.num_records = self._num_bytes = 0
        self._scratch = ExitStack()

    def __enter__(self) -> "_SetAside":
        self._local = self._scratch.enter_context(scratch_folder()) / "set_aside.jsonl"
        with writing_locally():
            self._file = self._local.open("w")
        return self

    def add(self, shard: RawShard, broken: Broken) -> None:
        self.num_records += 1
        if self.num_records > SET_ASIDE_RECORDS or self._num_bytes >= SET_ASIDE_BYTES:
            return
        where = {"source": shard.source, "shard": shard.path, "line": broken.line}
        with writing_locally():
            self._num_bytes += self._file.write(
                json.dumps(where | {"reason": broken.reason, "raw": broken.raw}, allow_nan=False) + "\n"
            )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._scratch, writing_locally():
            self._file.close()
            if kind is None and self.num_records:
                self._store.upload(self._local, self._path)


@dataclass(frozen=True)
class HashGroup:
    """Consecutive pieces whose hashes are merged into one file."""

    digest: str
    """Names the result: the pieces' documents."""
    surveys: tuple[str, ...]
    first_piece: int

    @property
    def file(self) -> HashFile:
        return HashFile(f"pieces/merged-{self.digest}.parquet", self.first_piece)


def merge(work: HashGroup, config: CorpusConfig) -> None:
    """Between the halves, of a corpus of very many pieces: merge the hashes of some. The record says nothing."""
    prepared = open_store(config.prepared)
    files = [HashFile(hashes_path(digest), piece) for piece, digest in enumerate(work.surveys)]
    prepared.put(work.file.path, merge_hashes(prepared, files))
    put_record(prepared, record_path("merged", work.digest), {})


@dataclass(frozen=True)
class HashRange:
    """One range of all content hashes, in which duplicates are looked for."""

    digest: str
    """Names the result: the documents of all pieces, and the range."""
    files: tuple[HashFile, ...]
    """The hashes of all pieces, in the corpus's order."""
    index: int
    num_ranges: int

    @property
    def path(self) -> str:
        """Where the duplicates are noted."""
        return f"pieces/duplicates-{self.digest}.parquet"


def deduplicate(work: HashRange, config: CorpusConfig) -> None:
    """Between the halves: note which documents of all pieces repeat another. The record:
    `record_duplicates`."""
    prepared = open_store(config.prepared)
    found = find_duplicates(prepared, work.files, work.index, work.num_ranges)
    record = record_duplicates(prepared, work.path, found)
    put_record(prepared, record_path("duplicates", work.digest), record)


@dataclass(frozen=True)
class TokenWork:
    """What the second half of the work on a piece needs to know."""

    digest: str
    """Names the result: documents, duplicates, tokenizer, fragment size."""
    piece: Piece
    index: int
    """The piece's place in the corpus, as in the files of duplicates."""
    duplicates: tuple[str, ...]
    """Paths of those files."""
    pinned: str
    """Digest of all documents, from the survey."""
    tokenizer: str
    """Fingerprint."""
    fragment_tokens: int
    former: str = ""
    """Path of the record of the same work from before shards had hashes: they are hashed, and not written anew."""


def tokenize(work: TokenWork, config: CorpusConfig) -> None:
    """Second half: encode the documents that stay, write token shards per split, put the record of them.

    The record: {"shards": [{"shard": fields of `Shard`, "fragments": columns}]}, by split in the order of
    `SPLITS`, "set_aside": documents of which the tokenizer's own normaliser leaves nothing}.

    Raises:
        CorpusError: texts, ids or splits are not those of the survey: a raw shard was changed while it was being
            prepared.
    """
    prepared = open_store(config.prepared)
    if work.former and (adopted := _with_hashes(prepared, work.former)):
        return put_record(prepared, record_path("tokens", work.digest), adopted)
    left_out = frozenset(duplicates_of(prepared, list(work.duplicates), work.index).tolist())
    tokenizer, encoder = _tokenizer(config.prepared, work.tokenizer, config.tokenizer.boundary)
    pin = _Pin()
    with ExitStack() as stack:
        set_aside = stack.enter_context(_SetAside(prepared, f"set_aside/{work.digest}.jsonl"))
        writers = {
            split: stack.enter_context(
                ShardWriter(
                    prepared,
                    split=split,
                    source=work.piece.source,
                    token_dtype=tokenizer.token_dtype,
                    fragment_tokens=work.fragment_tokens,
                )
            )
            for split in SPLITS
        }
        for batch in _batches(_kept_documents(work.piece, config, left_out, pin)):
            tokens = encoder.encode([document.text for _, _, document in batch])
            for (shard, split, document), ids in zip(batch, tokens, strict=True):
                if len(ids) > 1:
                    writers[split].add(document.id, ids, document.num_bytes)
                else:  # the boundary alone
                    set_aside.add(shard, Broken(document.line, EMPTIED, document.text[:KEPT_BYTES]))
        if pin.hexdigest() != work.pinned:
            raise changed_since_survey(work.piece, config)
        written = [shard for split in SPLITS for shard in writers[split].finish()]
    shards = [{"shard": asdict(each.shard), "fragments": each.fragments} for each in written]
    record = {"shards": shards, "set_aside": set_aside.num_records}
    put_record(prepared, record_path("tokens", work.digest), record)


def _with_hashes(prepared: Store, former: str) -> dict[str, Any] | None:
    """A record of before shards had hashes, with them; None where it is damaged, or a shard is lost or altered."""
    try:
        record = read_record(prepared, former)
    except DamagedFileError:
        return None
    for written in record["shards"]:
        shard = Shard(**written["shard"])
        try:
            found = hash_stored(prepared, shard)
        except (FileNotFoundError, AlteredError):
            return None
        written["shard"] = asdict(found.add_to(shard))
        written["fragments"]["blake2b"] = found.blake2b
    return record


@lru_cache(maxsize=1)
def _tokenizer(prepared: str, fingerprint: str, boundary: str) -> tuple[FixedTokenizer, Encoder]:
    """Kept from task to task of a process: a vocabulary of 128,000 takes half a second to build."""
    tokenizer = load_tokenizer(open_store(prepared), fingerprint, boundary)
    return tokenizer, Encoder(tokenizer)


def _kept_documents(
    piece: Piece, config: CorpusConfig, left_out: frozenset[int], pin: _Pin
) -> Iterator[tuple[RawShard, str, Document]]:
    """Documents that stay, with their shards and splits; all, also those left out, go into `pin`."""
    ordinal = -1
    for shard, record in read_piece(piece, config):
        if isinstance(record, Broken):
            continue
        ordinal += 1
        split = split_of(config.splits, shard.path, record.id, record.content)
        pin.add(split, record)
        if ordinal not in left_out:
            yield shard, split, record


def _batches(
    documents: Iterable[tuple[RawShard, str, Document]],
) -> Iterator[list[tuple[RawShard, str, Document]]]:
    batch: list[tuple[RawShard, str, Document]] = []
    characters = 0
    for shard, split, document in documents:
        batch.append((shard, split, document))
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
