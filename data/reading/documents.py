"""Reading raw shards of any size: a stream of documents, and of records that hold none."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import IO, Any, cast

import pyarrow as pa

from cluster.configuration.keys import nearest
from cluster.storage.store import is_hidden
from cluster.storage.uris import StorageError, Store, open_store, path_within
from data.reading.clean import content_hash, normalise
from data.reading.json_records import parse_record
from data.reading.parquet_rows import ParquetRows, RepeatedColumnError, stored_value
from data.reading.raw_shards import CorpusConfig, CorpusError, RawShard, list_raw_shards
from data.reading.unpacking import (
    RECORD_BYTES,
    Expansion,
    Unpacked,
    UnpackingError,
    Watched,
    lines_of,
    read_exactly,
)

# Enough to recognise a broken record by; the raw shard keeps all of it.
KEPT_BYTES = 1_000
LONGEST_REASON = 300
# A longer name in Parquet is cut: its length is whatever a file says.
LONGEST_ID = 65_536
# Of a record without the text column: enough to find a misspelt one.
KEYS_COMPARED, LONGEST_KEY = 100, 100
# Of each source before a worker starts: a wrong column shows in all of them.
RECORDS_TRIED = 20
WRITTEN = ("manifests/latest", "pieces/survey-.json", "set_aside/.jsonl", "shards/.parquet")
"""Like the files of a prepared corpus, of each kind of name."""
# What of a reason differs from record to record.
_PLACE = re.compile(r"(: line \d+ column \d+ \(char \d+\)| at (byte|character) \d+)$")


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus, normalised."""

    line: int
    """1-based line of JSONL or of plain text, row of Parquet."""
    id: str
    text: str
    num_bytes: int
    """Of the text in UTF-8."""
    content: bytes
    """`content_hash` of the text."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A record that holds no document."""

    line: int
    """As in `Document`; the next one where a shard cannot be read any further."""
    reason: str
    raw: str
    """The record's first `KEPT_BYTES`, with bytes that are not UTF-8 written as \\xff."""
    torn: bool = False
    """Nothing behind it in the shard can be read."""

    @property
    def kind(self) -> str:
        """The reason without its place in the record, by which mistakes are counted."""
        return _PLACE.sub("", self.reason)


# What a reader makes of a record: line, id if it has one, text of whatever type, and the raw bytes if there
# are any.
_Record = tuple[int, Any, Any, bytes]


def raw_texts(uri: str) -> Iterator[str]:
    """The texts of a raw corpus in the default format, records that hold none left out.

    Raises:
        CorpusError, StorageError: as `list_raw_shards` and `read_documents`.
    """
    config = CorpusConfig(uri=uri, prepared=f"{uri}-unused")
    store = open_store(uri)
    for shard in list_raw_shards(config):
        for document in read_documents(store, shard, config):
            if isinstance(document, Document):
                yield document.text


def read_documents(store: Store, shard: RawShard, config: CorpusConfig) -> Iterator[Document | Broken]:
    """Read a raw shard in order, holding one record (of Parquet: a page and a row) at a time.

    Args:
        store: The shard's source.

    Raises:
        CorpusError: a Parquet file has no text column, or one that is not text; the shard is gone, or unpacks to
            more than `max_expansion` allows.
        StorageError: the store failed; that is never taken for a broken record.
    """
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text}
    packed = shard.compression is not None or shard.format == "parquet"
    expansion = Expansion(shard.num_bytes, config.max_expansion if packed else math.inf)
    line = 0
    try:
        with store.open(shard.path) as file:
            for record in readers[shard.format](cast(IO[bytes], Watched(file)), shard, config, expansion):
                expansion.add(RECORD_BYTES)
                found = record if isinstance(record, Broken) else _document(*record, shard, config)
                line = found.line
                yield found
    except FileNotFoundError as gone:
        raise CorpusError(f"{gone}: it was there when the source was listed; run the command again") from gone
    except UnpackingError as bomb:
        at = f"{shard.path} (source {shard.source!r})"
        remedy = f"leave it out by corpus.include, or raise corpus.max_expansion={config.max_expansion:,}"
        raise CorpusError(f"{at}: {bomb}; {remedy}") from bomb
    except (StorageError, CorpusError):
        raise
    except (OSError, pa.ArrowException) as torn:
        yield Broken(line + 1, f"the shard cannot be read any further: {torn}", "", torn=True)


def _document(
    line: int, name: Any, text: Any, raw: bytes, shard: RawShard, config: CorpusConfig
) -> Document | Broken:
    try:
        if isinstance(text, bytes):
            text = text.decode()
        if not isinstance(text, str):
            kind = "null" if text is None else type(text).__name__
            return _broken(line, f"{config.text_column!r} is {kind}, not a string", raw)
        text = normalise(text, config.normalization)
        encoded = text.encode()
    except UnicodeDecodeError as invalid:
        return _broken(line, f"invalid UTF-8 at byte {invalid.start}", raw or invalid.object)
    except UnicodeEncodeError as invalid:
        return _broken(line, f"half of a surrogate pair at character {invalid.start}", raw)
    if not encoded.strip():
        return _broken(line, "empty after normalisation", raw)
    named = str(name) if isinstance(name, str | int) else ""
    # Half of a surrogate pair in an id is written as \ud800: the document can be stored, and is worth more.
    document_id = named.encode(errors="backslashreplace").decode() or f"{shard.path}:{line}"
    return Document(line, document_id, text, len(encoded), content_hash(encoded))


def _broken(line: int, reason: str, raw: bytes) -> Broken:
    return Broken(line, reason[:LONGEST_REASON], raw[:KEPT_BYTES].decode(errors="backslashreplace"))


def _read_jsonl(
    file: IO[bytes], shard: RawShard, config: CorpusConfig, expansion: Expansion
) -> Iterator[_Record | Broken]:
    stream, columns = _unpacked(file, shard, expansion), (config.text_column, config.id_column)
    for number, line in enumerate(lines_of(stream, config.max_record_bytes), start=1):
        if len(line) > config.max_record_bytes:
            yield _broken(number, f"longer than corpus.max_record_bytes={config.max_record_bytes:,}", line)
            continue
        if not line.strip():
            stream.skip_line()
            continue
        record = parse_record(line, columns, is_first=number == 1)
        if isinstance(record, str):
            yield _broken(number, record, line)
        elif config.text_column not in record:
            yield _broken(number, _missing(config.text_column, list(record)), line)
        else:
            yield number, record.get(config.id_column), record[config.text_column], line


def _read_parquet(
    file: IO[bytes], shard: RawShard, config: CorpusConfig, expansion: Expansion
) -> Iterator[_Record | Broken]:
    at = f"{shard.path} (source {shard.source!r})"
    try:
        rows = ParquetRows(file, (config.text_column, config.id_column), config.max_expansion)
    except RepeatedColumnError as twice:
        raise CorpusError(f"{at}: {twice}") from twice
    if config.text_column not in rows.columns:
        remedy = "set corpus.text_column"
        raise CorpusError(f"{at}: {_missing(config.text_column, rows.schema.names)}; {remedy}")
    kind = rows.schema.field(config.text_column).type
    if not (_is_string(kind) or _is_binary(kind)):
        raise CorpusError(f"{at}: corpus.text_column={config.text_column!r} is of type {kind}, not a string")
    line = 0
    for batch in rows.batches():
        texts = batch.column(config.text_column)
        ids = batch.column(config.id_column) if config.id_column in rows.columns else None
        for index in range(batch.num_rows):
            line += 1
            stored = stored_value(texts, index)
            expansion.add(0 if stored is None else stored.size)
            if stored is not None and stored.size > config.max_record_bytes:
                first = stored[:KEPT_BYTES].to_pybytes()
                yield _broken(line, f"longer than corpus.max_record_bytes={config.max_record_bytes:,}", first)
            else:
                text = None if stored is None else stored.to_pybytes()
                yield line, None if ids is None else _id_at(ids, index), text, text or b""


def _id_at(ids: pa.Array, index: int) -> Any:
    """A text, a whole number or a truth value; None for anything else."""
    if _is_string(ids.type):
        name = stored_value(ids, index)
        return None if name is None else name[:LONGEST_ID].to_pybytes().decode(errors="backslashreplace")
    kind = _value_type(ids.type)
    return ids[index].as_py() if pa.types.is_integer(kind) or pa.types.is_boolean(kind) else None


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_string(kind: pa.DataType) -> bool:
    return _value_type(kind) in (pa.string(), pa.large_string(), pa.string_view())


def _is_binary(kind: pa.DataType) -> bool:
    return _value_type(kind) in (pa.binary(), pa.large_binary(), pa.binary_view())


def _read_text(
    file: IO[bytes], shard: RawShard, config: CorpusConfig, expansion: Expansion
) -> Iterator[_Record]:
    """One document per file; a longer one than `max_record_bytes` is cut at line feeds into several."""
    stream = _unpacked(file, shard, expansion)
    line, rest, last = 1, b"", False
    while not last:
        more = b"".join(read_exactly(stream, config.max_record_bytes + 1 - len(rest)))
        text, last = rest + more, len(rest) + len(more) <= config.max_record_bytes
        end = len(text) if last else text.rfind(b"\n") + 1 or _character_start(text)
        if end or line == 1:
            yield line, shard.path if last and line == 1 else None, text[:end], text[:end]
        line += text.count(b"\n", 0, end) or 1
        rest = text[end:]


def _character_start(text: bytes) -> int:
    """Where the last character begins, for cutting text without line feeds."""
    end = len(text) - 1
    while end > len(text) - 4 and text[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _unpacked(file: IO[bytes], shard: RawShard, expansion: Expansion) -> Any:
    return Unpacked(file, shard.compression, expansion)


def _missing(column: str, present: list[str]) -> str:
    present = [key for key in present[:KEYS_COMPARED] if len(key) <= LONGEST_KEY]
    closest = nearest(column, present)
    shown = f"nearest: {closest!r}" if closest else f"present: {', '.join(present[:8])}"
    return f"no {column!r}; {shown}"


def own_input_problems(config: CorpusConfig) -> Iterator[str]:
    """A line for each source in which preparing would write what its next start reads as raw shards."""
    for source, uri in config.named_sources().items():
        if (within := path_within(config.prepared, uri)) is None:
            continue
        read = [path for name in WRITTEN if not is_hidden(path := within + name)]
        if any(fnmatchcase(path, pattern) for path in read for pattern in config.include):
            yield (
                f"corpus.prepared={config.prepared} lies in the source {source!r}, {uri}: what is prepared would be "
                "read as raw shards; choose a folder beside it, or name the raw ones alone by corpus.include"
            )


def corpus_problems(config: CorpusConfig) -> list[str]:
    """Everything that can be found wrong with a corpus before a worker starts: lists it, reads some first
    records.

    Returns:
        One line with a remedy each: sources that cannot be read, shards of unknown format, a missing text
        column, a prepared corpus that cannot be written.
    """
    if problems := list(own_input_problems(config)):
        return problems
    sources = {name: open_store(uri) for name, uri in config.named_sources().items()}
    found = [store.problem_reading() for store in sources.values()] + [
        open_store(config.prepared).problem_writing()
    ]
    problems = [each for each in found if each]
    if problems:
        return problems
    try:
        shards = list_raw_shards(config)
        for name, store in sources.items():
            first = next(shard for shard in shards if shard.source == name)
            records = list(islice(read_documents(store, first, config), RECORDS_TRIED))
            broken = [record for record in records if isinstance(record, Broken)]
            if records and len(broken) == len(records):
                at = f"{store.uri}/{first.path}"
                problems.append(f"{at}: the first {len(records)} records are broken: {broken[0].reason}")
    except (CorpusError, StorageError) as error:
        return str(error).splitlines()
    return problems
