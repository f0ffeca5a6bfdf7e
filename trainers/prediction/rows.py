"""The records that a job of prediction reads: files cut into pieces, pieces read as streams of bounded memory.

A row that cannot be read is its error's text, and the rows after it are read: in a file of millions one broken line
is no reason to answer none.
"""

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import IO, Any

import pyarrow as pa

from cluster.configuration.keys import nearest
from cluster.storage.uris import StorageError, Store, open_store
from data.reading.parquet_rows import ParquetRows, RepeatedColumnError
from data.reading.unpacking import Watched
from trainers.tasks.record_files import (
    MAX_RECORD_BYTES,
    BrokenRow,
    column_names,
    compression_of,
    find_files,
    format_of,
    parsed,
    rows_in,
)
from trainers.tasks.records import asked_columns, needed_columns
from trainers.tasks.task import TaskConfig

PIECE_BYTES = 4 << 20
"""Of JSON lines: about 10,000 to 40,000 short records, seconds to minutes of a model's work."""
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
    named_by: str = field(default="", repr=False)
    """Place of the input in the names of answers that were begun when they had it; else none, for it may be moved."""

    @property
    def name(self) -> str:
        """What the files with its answers begin with."""
        described = repr(replace(self, uri=self.named_by))
        digest = hashlib.blake2b(described.encode(), digest_size=6).hexdigest()
        stem = self.path.rpartition("/")[2].partition(".")[0].encode()[:LONGEST_STEM_BYTES]
        return f"{stem.decode(errors='ignore')}-{digest}"


def pieces_of(uri: str) -> list[Piece]:
    """Cut all files at a URI. Raises `ConfigError` where there are none."""
    store, paths = find_files(uri)
    return [piece for path in paths for piece in _cut(store, path)]


def _cut(store: Store, path: str) -> Iterator[Piece]:
    if _is_entered_anywhere(path):
        size = store.size(path)
        for start in range(0, size, PIECE_BYTES):
            yield Piece(store.uri, path, start, min(size, start + PIECE_BYTES))
    elif format_of(path) == ".parquet":
        try:
            with store.open(path) as file:
                groups = ParquetRows(Watched(file), ()).num_row_groups
        except (StorageError, FileNotFoundError):
            raise
        except (OSError, pa.ArrowException):
            yield Piece(store.uri, path)  # no Parquet: a line that says so is its answer
        else:
            yield from (Piece(store.uri, path, row_group=group) for group in range(groups))
    else:
        yield Piece(store.uri, path)


def _is_entered_anywhere(path: str) -> bool:
    return format_of(path) == ".jsonl" and compression_of(path) is None


def rows_of(piece: Piece, columns: Collection[str]) -> Iterator[Row]:
    """The piece's rows, of `columns` those that they have. A JSON line belongs to the piece that it begins in. A file
    that cannot be read on ends with the reason.

    Raises:
        StorageError: the store failed.
    """
    store = open_store(piece.uri)
    if _is_entered_anywhere(piece.path):
        with store.open(piece.path) as file:
            yield from _lines_between(piece, file, columns)
        return
    group = None if piece.row_group < 0 else piece.row_group
    inside = f"{max(0, piece.row_group)}:" if format_of(piece.path) == ".parquet" else ""
    try:
        for number, row in rows_in(store, piece.path, columns, row_group=group):
            yield f"{piece.path}:{inside}{number}", row.reason if isinstance(row, BrokenRow) else row
    except RepeatedColumnError as twice:
        yield f"{piece.path}:{inside}1", str(twice)


def _lines_between(piece: Piece, file: IO[bytes], columns: Collection[str]) -> Iterator[Row]:
    file.seek(max(0, piece.start - 1))
    if piece.start:
        _skip_line(file, piece.stop)  # the line before: one byte of it at least, the line feed
    while (place := file.tell()) < piece.stop and (line := file.readline(MAX_RECORD_BYTES + 2)):
        if not line.endswith(b"\n"):
            _skip_line(file, piece.stop)
        if line.strip():
            row = parsed(line.removesuffix(b"\n"), columns, is_first=place == 0)
            yield f"{piece.path}@{place}", row.reason if isinstance(row, BrokenRow) else row


def _skip_line(file: IO[bytes], stop: int) -> None:
    """Read to the end of a line, or to where the piece ends, for no other line begins in it then."""
    while file.tell() < stop and (rest := file.readline(MAX_RECORD_BYTES)) and not rest.endswith(b"\n"):
        pass


def column_problems(task: TaskConfig, pieces: list[Piece]) -> list[str]:
    """A line for each column that the task reads and a file does not have, or has twice."""
    files = list(dict.fromkeys((piece.uri, piece.path) for piece in pieces))
    problems = []
    for uri, path in files[:LOOKED_INTO]:
        try:
            names = column_names(open_store(uri), path, asked_columns(task, labelled=False))
        except RepeatedColumnError as twice:
            problems.append(f"{uri}/{path} {twice}")
            continue
        problems += [
            f"{uri}/{path}: there is no column {name!r} (columns.{key} of the model's task); nearest: "
            f"{nearest(name, names) or sorted(names)}"
            for key, name in needed_columns(task).items()
            if names is not None and name not in names
        ]
    return problems
