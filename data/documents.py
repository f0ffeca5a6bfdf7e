"""Reading raw shards of any size: a stream of documents, and of records that hold none."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.keys import nearest
from cluster.storage import StorageError, Store, open_store
from data.clean import content_hash, normalise
from data.corpus import CorpusConfig, CorpusError, RawShard, list_raw_shards

# Of a torn compressed file the block at the tear is lost: small blocks lose little.
BLOCK_BYTES = 65_536
PARQUET_ROWS = 64
# Enough to recognise a broken record by; the raw shard keeps all of it.
KEPT_BYTES = 1_000
# Of each source before a worker starts: a wrong column shows in all of them.
RECORDS_TRIED = 20
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
    """Read a raw shard in order, holding one record (of Parquet: a page and 64 rows) at a time.

    Args:
        store: The shard's source.

    Raises:
        CorpusError: a Parquet file has no text column, or one that is not text; the shard is gone.
        StorageError: the store failed; that is never taken for a broken record.
    """
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text}
    line = 0
    try:
        with store.open(shard.path) as file:
            for record in readers[shard.format](cast(IO[bytes], _Watched(file)), shard, config):
                found = record if isinstance(record, Broken) else _document(*record, shard, config)
                line = found.line
                yield found
    except FileNotFoundError as gone:
        raise CorpusError(f"{gone}: it was there when the source was listed; run the command again") from gone
    except (StorageError, CorpusError):
        raise
    except (OSError, pa.ArrowException) as torn:
        yield Broken(line + 1, f"the shard cannot be read any further: {torn}", "", torn=True)


class _Watched:
    """A file whose failures to read are told from what torn content does to its decoder."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, num_bytes: int = -1) -> bytes:
        try:
            return self._file.read(num_bytes)
        except StorageError:
            raise
        except OSError as failed:
            raise StorageError(f"cannot read a raw shard: {failed}; run the same command again") from failed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


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
    return Broken(line, reason, raw[:KEPT_BYTES].decode(errors="backslashreplace"))


def _read_jsonl(file: IO[bytes], shard: RawShard, config: CorpusConfig) -> Iterator[_Record | Broken]:
    for number, line in enumerate(_lines(_decompressed(file, shard), config.max_record_bytes), start=1):
        if len(line) > config.max_record_bytes:
            yield _broken(number, f"longer than corpus.max_record_bytes={config.max_record_bytes:,}", line)
            continue
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as invalid:
            yield _broken(number, f"invalid UTF-8 at byte {invalid.start}", line)
        except (ValueError, RecursionError) as invalid:
            yield _broken(number, f"not JSON: {invalid}", line)
        else:
            if not isinstance(record, dict):
                yield _broken(number, f"a JSON {type(record).__name__}, not an object", line)
            elif config.text_column not in record:
                yield _broken(number, _missing(config.text_column, list(record)), line)
            else:
                yield number, record.get(config.id_column), record[config.text_column], line


def _read_parquet(file: IO[bytes], shard: RawShard, config: CorpusConfig) -> Iterator[_Record | Broken]:
    # Pages are read as they are needed (buffer_size), so a row group of any size is never in memory as a
    # whole.
    table = pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
    schema = table.schema_arrow
    at = f"{shard.path} (source {shard.source!r})"
    if config.text_column not in schema.names:
        remedy = "set corpus.text_column"
        raise CorpusError(f"{at}: {_missing(config.text_column, schema.names)}; {remedy}")
    kind = schema.field(config.text_column).type
    if not (_is_string(kind) or _is_binary(kind)):
        raise CorpusError(f"{at}: corpus.text_column={config.text_column!r} is of type {kind}, not a string")
    columns = [name for name in (config.text_column, config.id_column) if name in schema.names]
    line = 0
    for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=columns, use_threads=False):
        texts = _as_bytes(batch.column(config.text_column))
        names: list[Any] = [None] * len(texts)
        if config.id_column in columns:
            ids = batch.column(config.id_column)
            names = _decoded(_as_bytes(ids)) if _is_string(ids.type) else ids.to_pylist()
        for name, text in zip(names, texts, strict=True):
            line += 1
            if text is not None and len(text) > config.max_record_bytes:
                yield _broken(line, f"longer than corpus.max_record_bytes={config.max_record_bytes:,}", text)
            else:
                yield line, name, text, text or b""


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_string(kind: pa.DataType) -> bool:
    return _value_type(kind) in (pa.string(), pa.large_string(), pa.string_view())


def _is_binary(kind: pa.DataType) -> bool:
    return _value_type(kind) in (pa.binary(), pa.large_binary(), pa.binary_view())


def _as_bytes(column: pa.Array) -> list[bytes | None]:
    """Strings in Parquet need not be valid UTF-8, and one that is not must not take the batch with it: casts to
    strings check each value, casts to binary none."""
    return column.cast(pa.large_binary()).to_pylist()


def _decoded(names: list[bytes | None]) -> list[str | None]:
    return [None if name is None else name.decode(errors="backslashreplace") for name in names]


def _read_text(file: IO[bytes], shard: RawShard, config: CorpusConfig) -> Iterator[_Record]:
    """One document per file; a longer one than `max_record_bytes` is cut at line feeds into several."""
    stream = _decompressed(file, shard)
    line, rest, last = 1, b"", False
    while not last:
        more = b"".join(_read_exactly(stream, config.max_record_bytes + 1 - len(rest)))
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


def _decompressed(file: IO[bytes], shard: RawShard) -> Any:
    stream = pa.PythonFile(file, mode="r")
    return pa.CompressedInputStream(stream, shard.compression) if shard.compression else stream


def _read_exactly(stream: Any, num_bytes: int) -> Iterator[bytes]:
    while num_bytes > 0 and (block := stream.read(min(num_bytes, BLOCK_BYTES))):
        num_bytes -= len(block)
        yield block


def _lines(stream: Any, max_bytes: int) -> Iterator[bytes]:
    """Lines without their line feeds; of a line longer than `max_bytes` somewhat more than that, no end."""
    pieces: list[bytes] = []
    held = 0
    while block := stream.read(BLOCK_BYTES):
        first, *others = block.split(b"\n")
        for piece, ends in [(first, bool(others)), *((line, True) for line in others[:-1])]:
            if held <= max_bytes:
                pieces.append(piece)
                held += len(piece)
            if ends:
                yield b"".join(pieces)
                pieces, held = [], 0
        if others:
            pieces, held = [others[-1]], len(others[-1])
    if held:
        yield b"".join(pieces)


def _missing(column: str, present: list[str]) -> str:
    closest = nearest(column, present)
    shown = f"nearest: {closest!r}" if closest else f"present: {', '.join(present[:8])}"
    return f"no {column!r}; {shown}"


def corpus_problems(config: CorpusConfig) -> list[str]:
    """Everything that can be found wrong with a corpus before a worker starts: lists it, reads some first
    records.

    Returns:
        One line with a remedy each: sources that cannot be read, shards of unknown format, a missing text
        column, a prepared corpus that cannot be written.
    """
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
