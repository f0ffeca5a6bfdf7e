"""How much a Parquet file claims to hold, told without decoding it.

A footer's sizes are no bound: each page has its own in its header, by which Arrow sets memory aside, and a run of one
value takes a few bytes however long it is. So the footer and the pages' headers are read here. Arrow's own reader of
footers is no help, for of a damaged one pyarrow ends the process where a column's numbers are asked for (26.0.1:
`RowGroupMetaData.column` lets an exception of C++ through).

Both are Thrift's compact protocol: https://github.com/apache/parquet-format, src/main/thrift/parquet.thrift, and
https://github.com/apache/thrift, doc/specs/thrift-compact-protocol.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAGIC = b"PAR1"
TAIL_BYTES = 8
"""The footer's length and the magic number."""
# Ids of fields.
NUM_ROWS, ROW_GROUPS, KEY_VALUES = 3, 4, 5  # FileMetaData
KEY, VALUE = 1, 2  # KeyValue
COLUMNS, META_DATA = 1, 3  # RowGroup, ColumnChunk
CHUNK_VALUES, CHUNK_BYTES, DATA_OFFSET, DICTIONARY_OFFSET = 5, 7, 9, 11  # ColumnMetaData
UNPACKED_BYTES, PACKED_BYTES, DATA_PAGE, DATA_PAGE_V2 = 2, 3, 5, 8  # PageHeader
PAGE_VALUES = 1  # DataPageHeader, DataPageHeaderV2
# Types of the compact protocol.
TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
INTEGERS = (4, 5, 6)
MOST_DEPTH = 16

Struct = dict[int, Any]


class ClaimError(ValueError):
    """A Parquet file claims more than it may, or what it claims cannot be told."""


@dataclass(frozen=True)
class Claims:
    """What a file claims."""

    num_bytes: int
    """Of all pages, once unpacked."""
    num_values: int
    """Of the longest column."""
    metadata: dict[bytes, bytes]
    """Of the file, by key."""


def claims(content: bytes) -> Claims:
    """Read what a file claims; ClaimError where that cannot be told."""
    try:
        return _claims(content)
    except (KeyError, TypeError, AttributeError) as absent:  # a field is missing, or of another type
        raise ClaimError(f"its footer or a page's header lacks a field: {absent!r}") from absent


def _claims(content: bytes) -> Claims:
    footer_start = len(content) - TAIL_BYTES - int.from_bytes(content[-TAIL_BYTES:-4], "little")
    if content[-4:] != MAGIC or footer_start < len(MAGIC):
        raise ClaimError("it does not end as a Parquet file does")
    footer, _ = read_struct(content, footer_start, len(content) - TAIL_BYTES)
    num_bytes, longest, room = 0, dict[int, int](), footer_start
    for group in footer[ROW_GROUPS]:
        for index, column in enumerate(group[COLUMNS]):
            chunk = column[META_DATA]
            if chunk[CHUNK_VALUES] <= 0:  # Arrow reads no page of it
                continue
            start = chunk[DATA_OFFSET]
            if 0 < chunk.get(DICTIONARY_OFFSET, 0) < start:
                start = chunk[DICTIONARY_OFFSET]
            stop = start + chunk[CHUNK_BYTES]
            room -= stop - start
            if not 0 < start <= stop <= footer_start or room < 0:
                raise ClaimError(f"it has a column at bytes {start:,} to {stop:,}, of {footer_start:,}")
            for header in _pages(content, start, stop):
                num_bytes += header[UNPACKED_BYTES]
                pages = (header[kind] for kind in (DATA_PAGE, DATA_PAGE_V2) if kind in header)
                longest[index] = longest.get(index, 0) + sum(page[PAGE_VALUES] for page in pages)
    metadata = {each[KEY]: each.get(VALUE, b"") for each in footer.get(KEY_VALUES, ())}
    return Claims(num_bytes, max(footer[NUM_ROWS], *longest.values(), 0), metadata)


def _pages(content: bytes, start: int, stop: int) -> Iterator[Struct]:
    """The headers of the pages between two places."""
    while start < stop:
        header, data_start = read_struct(content, start, stop)
        if header[UNPACKED_BYTES] < 0 or header[PACKED_BYTES] < 0:
            raise ClaimError(f"the page at byte {start:,} has negative sizes")
        yield header
        start = data_start + header[PACKED_BYTES]
    if start != stop:
        raise ClaimError(f"a page ends at byte {start:,}, its column at {stop:,}")


def read_struct(content: bytes, start: int, stop: int) -> tuple[Struct, int]:
    """The fields of a struct by id, and where it ends; nothing behind `stop` is read."""
    reader = _Compact(content, start, stop)
    return reader.struct(0), reader.at


class _Compact:
    """Reads the compact protocol. Each value takes a byte or more, so there are no more of them than bytes."""

    def __init__(self, content: bytes, start: int, stop: int) -> None:
        self._content, self._stop = content, stop
        self.at = start

    def struct(self, depth: int) -> Struct:
        if depth > MOST_DEPTH:
            raise ClaimError(f"what stands before byte {self.at:,} is nested too deeply")
        fields, field = Struct(), 0
        while head := self._byte():
            kind, step = head & 15, head >> 4
            field = field + step if step else self._integer()
            fields[field] = kind == TRUE if kind in (TRUE, FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
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
        raise ClaimError(f"what stands before byte {self.at:,} is of the type {kind}")

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _bytes(self, length: int) -> bytes:
        start, self.at = self.at, self.at + length
        if self.at > self._stop:
            raise ClaimError(f"it goes on behind byte {self._stop:,}")
        return self._content[start : self.at]

    def _integer(self) -> int:
        zigzag = self._varint()
        return (zigzag >> 1) ^ -(zigzag & 1)

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ClaimError(f"the number before byte {self.at:,} has more than 64 bits")
