"""Files of records as streams of rows: JSONL, CSV and Parquet, JSONL and CSV also compressed, in bounded memory.

A record that cannot be read is one line of reason, and the records after it come, where the format tells where they
begin.
"""

import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import IO, Any, cast

import pyarrow as pa

from cluster.console.errors import ConfigError
from cluster.console.printable import printable
from cluster.storage.store import name_problem
from cluster.storage.uris import StorageError, Store, open_parent, open_store
from data.reading.json_records import parse_record
from data.reading.parquet_rows import ParquetRows, expanded_bytes
from data.reading.unpacking import (
    FREE_BYTES,
    RATIO,
    RECORD_BYTES,
    Expansion,
    Unpacked,
    UnpackingError,
    Watched,
    lines_of,
    stored_bytes,
)
from trainers.tasks.delimited import LongRecordError, csv_rows

FORMATS = (".jsonl", ".csv", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
MAX_RECORD_BYTES = 16 << 20
"""Of the longest record that is read, as `corpus.max_record_bytes` is by default; a longer one is broken."""
LONGEST_REASON = 300
RECORDS_TRIED = 20
"""For the names of a file's columns."""
NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class BrokenRow:
    """A record that cannot be read."""

    reason: str
    ends_file: bool = False
    """Nothing behind it can be read."""


Row = dict[str, Any] | BrokenRow


def find_files(uri: str) -> tuple[Store, list[str]]:
    """The store and the paths of all files of records at a URI. Raises `ConfigError` where there are none."""
    if format_of(uri.rstrip("/")):
        store, name = open_parent(uri)
        if store.exists(name):
            return store, [name]
    store = open_store(uri)
    paths = [info.path for info in store.list_input() if format_of(info.path)]
    if unusable := [(path, problem) for path in paths if (problem := name_problem(path))]:
        raise ConfigError([f"{uri}/{printable(path)}: {problem}" for path, problem in unusable[:NAMES_SHOWN]])
    if not paths and format_of(uri.rstrip("/")):
        raise ConfigError([f"{uri}: no such file; correct the data.* of the task"])
    if not paths:
        raise ConfigError([f"{uri} holds no {', '.join(FORMATS)} files (also .gz, .zst); correct the URI"])
    return store, paths


def format_of(path: str) -> str | None:
    """Of `FORMATS`, by the file's own name."""
    name = PurePosixPath(path).name
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return next((ending for ending in FORMATS if name.endswith(ending)), None)


def compression_of(path: str) -> str | None:
    return next((codec for ending, codec in COMPRESSIONS.items() if path.endswith(ending)), None)


def rows_in(
    store: Store,
    path: str,
    columns: Collection[str],
    *,
    row_group: int | None = None,
    free_bytes: int = FREE_BYTES,
) -> Iterator[tuple[int, Row]]:
    """Numbers and rows of a file, of `columns` those that it has. The number is a line of JSONL, a record of others,
    from 1. A file that is torn, or unpacks to more than it may, ends with a `BrokenRow` that says so.

    Args:
        row_group: Of Parquet, if not all.
        free_bytes: What the file may unpack to, whatever its ratio.

    Raises:
        RepeatedColumnError: the file, not one record alone, has one of `columns` twice.
        StorageError: the store failed; that is never taken for a broken record.
    """
    readers = {".jsonl": _json_rows, ".csv": _csv_rows}
    number = 0
    try:
        with store.open(path) as opened:
            file, compression = cast(IO[bytes], Watched(opened)), compression_of(path)
            expansion = Expansion(stored_bytes(file), RATIO, free_bytes)
            if format_of(path) == ".parquet":
                found = _parquet_rows(file, columns, row_group, expansion)
            else:
                stream = Unpacked(file, compression, expansion)
                found = readers[format_of(path) or ".jsonl"](stream, columns)
            for number, row in found:
                if compression:
                    expansion.add(RECORD_BYTES)
                yield number, row
    except (StorageError, FileNotFoundError):
        raise
    except (UnpackingError, LongRecordError, OSError, pa.ArrowException) as ended:
        yield number + 1, BrokenRow(str(ended)[:LONGEST_REASON], ends_file=True)


def column_names(store: Store, path: str, columns: Collection[str]) -> list[str] | None:
    """Names of a file's columns, of Parquet by its schema, else by the first record; None where none can be read.

    Raises:
        RepeatedColumnError: one of `columns` is there twice.
    """
    if format_of(path) == ".parquet":
        try:
            with store.open(path) as file:
                return ParquetRows(Watched(file), columns).schema.names
        except (StorageError, FileNotFoundError):
            raise
        except (OSError, pa.ArrowException):
            return None  # told when its rows are read
    if format_of(path) == ".csv":
        next(rows_in(store, path, columns), None)  # a row below has lost what its header repeats
    rows = (row for _, row in islice(rows_in(store, path, ()), RECORDS_TRIED))
    return next((list(row) for row in rows if isinstance(row, dict)), None)


def parsed(line: bytes, columns: Collection[str], is_first: bool) -> Row:
    """A line of JSON as a row."""
    if len(line) > MAX_RECORD_BYTES:
        return BrokenRow(f"longer than {MAX_RECORD_BYTES:,} bytes")
    record = parse_record(line, columns, is_first)
    return BrokenRow(record[:LONGEST_REASON]) if isinstance(record, str) else _asked(record, columns)


def _asked(record: dict[str, Any], columns: Collection[str]) -> dict[str, Any]:
    return {name: record[name] for name in columns if name in record} if columns else record


def _json_rows(stream: Any, columns: Collection[str]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(lines_of(stream, MAX_RECORD_BYTES), 1):
        if line.strip():
            yield number, parsed(line, columns, is_first=number == 1)
        else:
            stream.skip_line()


def _csv_rows(stream: Any, columns: Collection[str]) -> Iterator[tuple[int, Row]]:
    rows = csv_rows(io.BufferedReader(stream), columns, MAX_RECORD_BYTES, stream.skip_line)
    for number, row in enumerate(rows, 1):
        yield number, BrokenRow(row) if isinstance(row, str) else _asked(row, columns)


def _parquet_rows(
    file: IO[bytes], columns: Collection[str], row_group: int | None, expansion: Expansion
) -> Iterator[tuple[int, Row]]:
    rows, number = ParquetRows(file, columns), 0
    if not rows.columns:
        shown = ", ".join(rows.schema.names[:8])
        yield (
            1,
            BrokenRow(f"has none of the columns {', '.join(columns)}; it has {shown}"[:LONGEST_REASON], True),
        )
    for batch in rows.batches(row_group):
        for index in range(batch.num_rows):
            number += 1
            expansion.add(RECORD_BYTES)
            yield number, _parquet_row(batch, index, expansion)


def _parquet_row(batch: pa.RecordBatch, index: int, expansion: Expansion) -> Row:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        value = column.slice(index, 1)
        try:
            size = expanded_bytes(value)
            if size <= MAX_RECORD_BYTES:
                row[name] = value.to_pylist()[0]
        # A date out of Python's range, bytes that are no UTF-8, an index behind its dictionary.
        except (ValueError, OverflowError, IndexError, pa.ArrowException) as error:
            return BrokenRow(f"{name} cannot be read: {error}"[:LONGEST_REASON])
        expansion.add(min(size, MAX_RECORD_BYTES))  # no more of it was expanded
        if size > MAX_RECORD_BYTES:
            return BrokenRow(f"{name} is longer than {MAX_RECORD_BYTES:,} bytes")
    return row
