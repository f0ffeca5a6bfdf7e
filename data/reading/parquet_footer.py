"""A Parquet file's footer, and the structs in it and before its pages, read without Arrow.

Of a damaged footer pyarrow ends the process where the numbers of a column are asked for: `RowGroupMetaData.column` lets
an exception of C++ through (26.0.1, "Definition level histogram size mismatch"), which no caller can catch. Arrow's own
reading of tables is not concerned.

All of it is in Thrift's compact protocol: https://github.com/apache/parquet-format, src/main/thrift/parquet.thrift, and
https://github.com/apache/thrift, doc/specs/thrift-compact-protocol.md.
"""

import os
from dataclasses import dataclass
from typing import Any

MAGIC = b"PAR1"
TAIL_BYTES = 8
"""The footer's length and the magic number."""
# Ids of fields.
NUM_ROWS, ROW_GROUPS, KEY_VALUES = 3, 4, 5  # FileMetaData
KEY, VALUE = 1, 2  # KeyValue
COLUMNS, META_DATA = 1, 3  # RowGroup, ColumnChunk
ENCODINGS, PATH, CHUNK_VALUES, UNPACKED, PACKED, DATA_OFFSET, DICTIONARY_OFFSET = (
    2,
    3,
    5,
    6,
    7,
    9,
    11,
)  # ColumnMetaData
# Types of the compact protocol.
TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
INTEGERS = (4, 5, 6)
MOST_DEPTH = 16

Struct = dict[int, Any]


class FooterError(ValueError):
    """What should be a footer or a page's header is none."""


class EndError(FooterError):
    """It goes on behind the bytes at hand."""


@dataclass(frozen=True)
class Chunk:
    """A column of a row group, as the footer has it."""

    path: str
    """Of the column, its parts joined by dots."""
    encodings: tuple[int, ...]
    """By parquet.thrift."""
    num_values: int
    unpacked_bytes: int
    """Of its pages with their headers; also `packed_bytes`."""
    packed_bytes: int
    start: int
    """Of its first page, in the file."""

    @property
    def stop(self) -> int:
        return self.start + self.packed_bytes


@dataclass(frozen=True)
class Footer:
    start: int
    """In the file."""
    num_rows: int
    row_groups: tuple[tuple[Chunk, ...], ...]
    metadata: dict[bytes, bytes]


def read_footer(file: Any) -> Footer:
    """Read the footer of a file that can seek; FooterError where there is none."""
    num_bytes = file.seek(0, os.SEEK_END)
    if num_bytes < TAIL_BYTES + len(MAGIC):
        raise FooterError("it is too short for a Parquet file")
    file.seek(num_bytes - TAIL_BYTES)
    tail = file.read(TAIL_BYTES)
    start = num_bytes - TAIL_BYTES - int.from_bytes(tail[:4], "little")
    if bytes(tail[4:]) != MAGIC or start < len(MAGIC):
        raise FooterError("it does not end as a Parquet file does")
    file.seek(start)
    data = bytes(file.read(num_bytes - TAIL_BYTES - start))
    try:
        fields, _ = read_struct(data, 0, len(data))
        if not isinstance(fields[NUM_ROWS], int):
            raise TypeError("the number of rows is none")
        return Footer(
            start,
            fields[NUM_ROWS],
            tuple(tuple(_chunk(each[META_DATA]) for each in group[COLUMNS]) for group in fields[ROW_GROUPS]),
            {each[KEY]: each.get(VALUE, b"") for each in fields.get(KEY_VALUES, ())},
        )
    except (KeyError, TypeError, AttributeError) as absent:  # a field is missing, or of another type
        raise FooterError(f"its footer lacks a field: {absent!r}") from absent


def _chunk(fields: Struct) -> Chunk:
    numbers = [fields[key] for key in (CHUNK_VALUES, UNPACKED, PACKED, DATA_OFFSET)]
    dictionary = fields.get(DICTIONARY_OFFSET, 0)
    if not all(isinstance(each, int) for each in (*numbers, dictionary, *fields[ENCODINGS])):
        raise TypeError("a number of a column is none")
    num_values, unpacked, packed, start = numbers
    path = b".".join(fields[PATH]).decode("utf-8", "replace")
    # As Arrow takes it.
    return Chunk(
        path, tuple(fields[ENCODINGS]), num_values, unpacked, packed,
        dictionary if 0 < dictionary < start else start,
    )  # fmt: skip


def read_struct(data: bytes, start: int, stop: int) -> tuple[Struct, int]:
    """The fields of a struct by id, and where it ends. EndError where it would go on behind `stop`."""
    reader = _Compact(data, start, stop)
    return reader.struct(0), reader.at


class _Compact:
    """Reads the compact protocol. Each value takes a byte or more, so there are no more of them than bytes."""

    def __init__(self, data: bytes, start: int, stop: int) -> None:
        self._data, self._stop = data, stop
        self.at = start

    def struct(self, depth: int) -> Struct:
        if depth > MOST_DEPTH:
            raise FooterError("it is nested too deeply")
        fields, field = Struct(), 0
        while head := self._byte():
            kind, step = head & 15, head >> 4
            field = field + step if step else self._integer()
            fields[field] = kind == TRUE if kind in (TRUE, FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > MOST_DEPTH:
            raise FooterError("it is nested too deeply")
        if kind in INTEGERS:
            return self._integer()
        if kind in (TRUE, FALSE, BYTE):
            return self._byte()
        if kind == DOUBLE:
            return self._bytes(8)
        if kind == BINARY:
            return self._bytes(self._varint())
        if kind in (LIST, SET):
            head = self._byte()
            size, inner = head >> 4, head & 15
            return [self._value(inner, depth + 1) for _ in range(self._varint() if size == 15 else size)]
        if kind == STRUCT:
            return self.struct(depth + 1)
        raise FooterError(f"it has a field of the type {kind}")

    def _byte(self) -> int:
        if self.at >= self._stop:
            raise EndError("it goes on behind its end")
        self.at += 1
        return self._data[self.at - 1]

    def _bytes(self, length: int) -> bytes:
        start, self.at = self.at, self.at + length
        if self.at > self._stop:
            raise EndError("it goes on behind its end")
        return self._data[start : self.at]

    def _integer(self) -> int:
        zigzag = self._varint()
        return (zigzag >> 1) ^ -(zigzag & 1)

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise FooterError("a number has more than 64 bits")
