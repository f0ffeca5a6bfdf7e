"""Sizes that the pages of a Parquet file claim, checked before they are unpacked.

A column chunk is a row of pages, each with a header (`data/reading/parquet_footer.py`). Arrow allocates what a
header asks for.
Its reads pass through `PageWatch`, which sees each header before Arrow does.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.reading.parquet_footer import Chunk, EndError, FooterError, read_struct
from data.reading.unpacking import UnpackingError

PAGE_BYTES = 64 << 20
"""What any page may unpack to, whatever its ratio. Writers aim at 1 MiB, but Arrow's looks at the size each 1,024
values only: of documents of 64 KiB it makes such pages. Reading one took 5 times as much."""
FREE_VALUES, VALUES_PER_BYTE = 1 << 24, 64
"""Values of a column of lists: each takes some 8 bytes of memory, and as good as none of a file where all are alike."""
CLAIM_SLACK = 1 << 20
MAX_HEADER_BYTES = 16 << 20
"""Arrow's own limit."""
DATA_PAGES = {0: 5, 3: 8}
"""Type of a page with values: field of its own header."""
ENCODING_FIELD = {0: 2, 3: 4}
DICTIONARIES, DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY = (2, 8), 6, 7


@dataclass
class _Chunk:
    """A column chunk that is being read."""

    name: str
    start: int
    stop: int
    values_left: int
    """Arrow reads no page after the last value."""
    claimed_bytes: int
    is_repeated: bool
    refused: Collection[int]
    """Encodings by which few bytes become many values, or long ones."""
    ratio: int
    small_bytes: int
    """Of a page: beyond it `LargePageError`."""
    head: bytes = b""
    body_left: int = 0
    num_values: int = 0
    num_bytes: int = 0

    def feed(self, data: bytes) -> None:
        """Follow the chunk's next bytes from page to page."""
        at = 0
        while at < len(data) and self.values_left > 0:
            step = min(self.body_left, len(data) - at)
            self.body_left, at = self.body_left - step, at + step
            if at == len(data):
                return
            before, look = len(self.head), 512
            while (header := _page_header(self.head + data[at : at + look])) is None and at + look < len(
                data
            ):
                look *= 8
            if header is None:
                self.head += data[at:]
                if len(self.head) > MAX_HEADER_BYTES:
                    raise pa.ArrowInvalid(f"column {self.name!r}: a page header without end")
                return
            fields, length = header
            self.head, at = b"", at + length - before
            self._check(fields)

    def _check(self, fields: dict[int, Any]) -> None:
        kind, unpacked, packed = (fields.get(key) for key in (1, 2, 3))
        if (
            kind is None
            or not isinstance(unpacked, int)
            or not isinstance(packed, int)
            or min(unpacked, packed) < 0
        ):
            raise pa.ArrowInvalid(f"column {self.name!r}: no page header where one should be")
        limit = max(PAGE_BYTES, self.ratio * packed)
        if unpacked > limit:
            raise UnpackingError(
                f"column {self.name!r}: a page of {packed:,} bytes claims to unpack to {unpacked:,}, "
                f"more than {limit:,}"
            )
        if unpacked > self.small_bytes:
            raise LargePageError
        self.body_left = packed
        self.num_bytes += unpacked
        if self.num_bytes > 2 * self.claimed_bytes + CLAIM_SLACK:
            raise UnpackingError(
                f"column {self.name!r} unpacks to more than the {self.claimed_bytes:,} bytes that its footer names"
            )
        if kind in DATA_PAGES:
            page = fields.get(DATA_PAGES[kind])
            if not isinstance(page, dict) or not _is_size(page.get(1)):
                raise pa.ArrowInvalid(f"column {self.name!r}: a page header without its number of values")
            self._check_values(page[1], page.get(ENCODING_FIELD[kind]))

    def _check_values(self, values: int, encoding: Any) -> None:
        self.values_left -= values
        self.num_values += values
        if encoding in self.refused:
            raise UnpackingError(
                f"column {self.name!r}: encoding {encoding} of parquet.thrift has no bound in lists, or where the "
                "footer does not name it; write the column with another one"
            )
        if not (self.is_repeated or encoding in (DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY)):
            return  # read value by value, however many there are
        limit = max(FREE_VALUES, VALUES_PER_BYTE * self.num_bytes)
        if self.num_values > limit:
            raise UnpackingError(
                f"column {self.name!r}: {self.num_bytes:,} bytes claim {self.num_values:,} values, more than {limit:,}"
            )


class LargePageError(Exception):
    """A page unpacks to more than the caller wants at a time; it may still be one that is allowed."""


class PageWatch:
    """A Parquet file, as Arrow reads it, that refuses pages which claim too much."""

    def __init__(self, file: Any, ratio: int) -> None:
        self._file, self._ratio = file, ratio
        self._next: dict[int, _Chunk] | None = None

    def follow(
        self,
        chunks: Sequence[Chunk],
        schema: pq.ParquetSchema,
        dictionaries: Collection[str],
        small_bytes: int,
    ) -> None:
        """Expect reads of a row group's columns, each from its start to its end, and no others.

        Args:
            dictionaries: Paths of the columns that Arrow leaves as indices into their dictionaries.
            small_bytes: What a page may unpack to before `LargePageError` is raised in the midst of Arrow's reading.
        """
        self._next = {}
        for index, chunk in enumerate(chunks):
            leaf = schema.column(index)
            self._next[chunk.start] = _Chunk(
                name=chunk.path,
                start=chunk.start,
                stop=chunk.stop,
                values_left=chunk.num_values,
                claimed_bytes=chunk.unpacked_bytes,
                is_repeated=leaf.max_repetition_level > 0,
                refused=_refused(chunk, leaf, leaf.path in dictionaries),
                ratio=self._ratio,
                small_bytes=small_bytes,
            )

    def read(self, num_bytes: int = -1) -> bytes:
        at = self._file.tell()
        data = self._file.read(num_bytes)
        if self._next is not None and data:
            chunk = self._next.pop(at, None)
            if chunk is None:
                raise pa.ArrowInvalid("columns overlap, or lie where the footer does not say")
            chunk.feed(data)
            if at + len(data) < chunk.stop:
                self._next[at + len(data)] = chunk
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _refused(chunk: Chunk, leaf: pq.ColumnSchema, as_dictionary: bool) -> Collection[int]:
    """Encodings whose values may be longer than their share of a page, where Arrow would expand many at once."""
    if leaf.max_repetition_level == 0:  # read row by row where the footer names such an encoding
        return () if DELTA_BYTE_ARRAY in chunk.encodings else (DELTA_BYTE_ARRAY,)
    if as_dictionary or leaf.physical_type not in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY"):
        return (DELTA_BYTE_ARRAY,)
    return (DELTA_BYTE_ARRAY, *DICTIONARIES)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _page_header(data: bytes) -> tuple[dict[int, Any], int] | None:
    """Fields of the header that the data begins with, by number, and its length; None where it goes on behind them."""
    try:
        return read_struct(data, 0, len(data))
    except EndError:
        return None
    except FooterError as other:
        raise pa.ArrowInvalid(f"no page header where one should be: {other}") from other
