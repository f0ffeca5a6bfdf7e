"""The records that a job of prediction reads: files cut into pieces, pieces read as streams of bounded memory.

A row that cannot be read is its error's text, and the rows after it are read: in a file of millions one broken line
is no reason to answer none.
"""

import gzip
import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import ConfigError
from cluster.keys import nearest
from cluster.storage import Store, open_store
from trainers.delimited import csv_rows
from trainers.task import TaskConfig
from trainers.task_records import find_files, needed_columns

PIECE_BYTES = 4 << 20
"""Of JSON lines: about 10,000 to 40,000 short records, seconds to minutes of a model's work."""
READ_ROWS = 1_024
"""Of Parquet, at a time."""
LONGEST_STEM_BYTES = 230
"""Of an input file's name in those of its answers, which add 25 and have 255 at most."""
LOOKED_INTO = 100
"""Files whose columns are checked before a job starts; a fault in a later one is told in its answers."""

Row = tuple[str, dict[str, Any] | str]
"""Its place, and the record, or why it is none."""


@dataclass(frozen=True)
class Piece:
    """A part of one input file: bytes [start, stop) of JSON lines, one row group of Parquet, or all of another file."""

    uri: str
    path: str
    start: int = 0
    stop: int = -1
    row_group: int = -1

    @property
    def name(self) -> str:
        """What the files with its answers begin with."""
        digest = hashlib.blake2b(repr(self).encode(), digest_size=6).hexdigest()
        stem = self.path.rpartition("/")[2].partition(".")[0].encode()[:LONGEST_STEM_BYTES]
        return f"{stem.decode(errors='ignore')}-{digest}"


def pieces_of(uri: str) -> list[Piece]:
    """Cut all files at a URI. Raises `ConfigError` where there are none."""
    store, paths = find_files(uri)
    return [piece for path in paths for piece in _cut(store, path)]


def _cut(store: Store, path: str) -> Iterator[Piece]:
    if path.endswith(".jsonl"):
        size = store.size(path)
        for start in range(0, size, PIECE_BYTES):
            yield Piece(store.uri, path, start, min(size, start + PIECE_BYTES))
    elif path.endswith(".parquet"):
        with store.open(path) as file:
            groups = pq.ParquetFile(file).num_row_groups
        yield from (Piece(store.uri, path, row_group=group) for group in range(groups))
    else:
        yield Piece(store.uri, path)


def rows_of(piece: Piece) -> Iterator[Row]:
    """The piece's rows. A JSON line belongs to the piece that it begins in.

    Raises:
        ConfigError: the file cannot be read on: it is cut off, or not what its name says.
    """
    with open_store(piece.uri).open(piece.path) as file:
        if piece.path.endswith(".jsonl"):
            yield from _lines_between(piece, file)
            return
        try:
            if ".parquet" in piece.path:
                yield from _parquet(piece, file)
            elif ".csv" in piece.path:
                rows = csv_rows(_decompressed(piece, file))
                yield from ((f"{piece.path}:{n}", row) for n, row in enumerate(rows, 1))
            else:
                lines = _decompressed(piece, file)
                yield from (
                    (f"{piece.path}:{n}", _parsed(line)) for n, line in enumerate(lines, 1) if line.strip()
                )
        except (pa.ArrowException, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ConfigError([f"{piece.uri}/{piece.path} cannot be read: {error}"]) from None


def _decompressed(piece: Piece, file: IO[bytes]) -> IO[bytes]:
    if piece.path.endswith(".gz"):
        return gzip.open(file)  # type: ignore[return-value]
    if piece.path.endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(file, "zstd"))  # type: ignore[arg-type]
    return file


def _lines_between(piece: Piece, file: IO[bytes]) -> Iterator[Row]:
    file.seek(max(0, piece.start - 1))
    if piece.start:
        file.readline()  # the line before: one byte of it at least, the line feed
    while (place := file.tell()) < piece.stop and (line := file.readline()):
        if line.strip():
            yield f"{piece.path}@{place}", _parsed(line)


def _parsed(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except ValueError as error:  # also of bytes that are no UTF-8
        return f"not JSON: {error}"
    return row if isinstance(row, dict) else f"a {type(row).__name__}, not a record with columns"


def _parquet(piece: Piece, file: IO[bytes]) -> Iterator[Row]:
    groups = None if piece.row_group < 0 else [piece.row_group]
    numbers = itertools.count(1)
    for batch in pq.ParquetFile(file).iter_batches(READ_ROWS, row_groups=groups):
        for row in batch.to_pylist():
            yield f"{piece.path}:{max(0, piece.row_group)}:{next(numbers)}", row


def column_problems(task: TaskConfig, pieces: list[Piece]) -> list[str]:
    """A line for each column that the task reads and a file does not have, by the file's first record."""
    first = {(piece.uri, piece.path): piece for piece in reversed(pieces)}
    problems = []
    for piece in list(first.values())[::-1][:LOOKED_INTO]:
        row = next((row for _, row in rows_of(piece) if isinstance(row, dict)), None)
        problems += [
            f"{piece.uri}/{piece.path}: there is no column {name!r} (columns.{key} of the model's task); nearest: "
            f"{nearest(name, list(row)) or sorted(row)}"
            for key, name in needed_columns(task).items()
            if row is not None and name not in row
        ]
    return problems
