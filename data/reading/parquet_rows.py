"""Rows of a Parquet file in bounded memory, whatever its pages and encodings make of few bytes.

A value is no longer than the largest page of its column, whatever the encoding; so a row that is read alone takes a
page or two, and some rows at a time do while pages are small. Lists are read as indices into their dictionaries, and
measured before they are expanded.
"""

import sys
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.reading.parquet_footer import Chunk, FooterError, read_footer
from data.reading.parquet_pages import DELTA_BYTE_ARRAY, PAGE_BYTES, LargePageError, PageWatch
from data.reading.unpacking import RATIO

BATCH_ROWS = 64
"""Where a dictionary comes with each batch: a smaller number copies it too often."""
SMALL_PAGE_BYTES, ROWS_OF_SMALL_PAGES = 8 << 20, 16
"""Each row may take a page: 128 MiB together. One row at a time reads documents of 2 KB at half the rate. Arrow looks
at a page's size each 1,024 values, so up to 8 KB a document its pages are small."""
DELTAS = {5, 6, 7}
"""Encodings by parquet.thrift: DELTA_BINARY_PACKED, DELTA_LENGTH_BYTE_ARRAY, DELTA_BYTE_ARRAY."""
VALUE_BYTES = 16
"""What a value of a list counts for besides its text."""


class RepeatedColumnError(ValueError):
    """A column that is asked for is there twice."""


class ParquetRows:
    """Some top-level columns of a Parquet file.

    Raises:
        pa.ArrowException, OSError: the file is no Parquet, or torn.
        RepeatedColumnError, UnpackingError
    """

    def __init__(self, file: Any, columns: Collection[str], ratio: int = RATIO) -> None:
        try:
            self._open(file, columns, ratio)
        except UnicodeDecodeError as error:
            raise pa.ArrowInvalid(f"the footer names a column in bytes that are no UTF-8: {error}") from error

    def _open(self, file: Any, columns: Collection[str], ratio: int) -> None:
        self._pages = PageWatch(file, ratio)
        self._row_groups = _row_groups(self._pages)
        self._metadata = pq.read_metadata(self._pages)
        self.schema: pa.Schema = self._metadata.schema.to_arrow_schema()
        self.columns = [name for name in dict.fromkeys(self.schema.names) if name in columns]
        for name in self.columns:
            if self.schema.names.count(name) > 1:
                raise RepeatedColumnError(f"has the column {name!r} twice; give each a name of its own")
        schema = self._metadata.schema
        leaves = [(index, schema.column(index)) for index in range(len(schema))]
        asked = [(i, leaf) for i, leaf in leaves if _is_within(leaf.path, self.columns)]
        self._leaves = [index for index, _ in asked]
        kinds = [self.schema.field(name).type for name in self.columns]
        # A categorical column of pandas is read as a dictionary whether one asks for it or not.
        self._has_dictionaries = any(leaf.max_repetition_level > 0 for _, leaf in asked) or any(
            map(pa.types.is_dictionary, kinds)
        )
        wide = any(leaf.length > VALUE_BYTES for _, leaf in asked)
        if any(len(group) != len(schema) for group in self._row_groups):
            raise pa.ArrowInvalid("a row group has another number of columns than the schema")
        # Arrow reads texts of these encodings only as they are, not as indices into a dictionary.
        deltas = {
            index
            for index in (self._leaves if self._has_dictionaries else ())
            if any(not DELTAS.isdisjoint(group[index].encodings) for group in self._row_groups)
        }
        texts = {leaf.path for index, leaf in asked if _is_text(leaf) and index not in deltas}
        self._dictionaries = texts if self._has_dictionaries else set[str]()
        self._batch_rows = BATCH_ROWS if self._has_dictionaries and not deltas and not wide else 1
        # Pages are read as they are needed (buffer_size), so a row group of any size is never in memory as a whole.
        self._file = pq.ParquetFile(
            self._pages,
            metadata=self._metadata,
            read_dictionary=sorted(self._dictionaries),
            buffer_size=2**20,
            pre_buffer=False,
        )

    @property
    def num_row_groups(self) -> int:
        return len(self._row_groups)

    def batches(self, row_group: int | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of a row group, or of all, a few at a time; of `columns`, in the file's order."""
        if not self.columns:
            return
        for number in range(self.num_row_groups) if row_group is None else [row_group]:
            yield from self._rows_of(number)

    def _rows_of(self, row_group: int) -> Iterator[pa.RecordBatch]:
        chunks, given = self._row_groups[row_group], 0
        if self._batch_rows == 1 and not any(DELTA_BYTE_ARRAY in chunks[i].encodings for i in self._leaves):
            try:
                for batch in self._read(row_group, ROWS_OF_SMALL_PAGES, SMALL_PAGE_BYTES):
                    yield batch
                    given += len(batch)
                return
            except LargePageError:
                pass  # again from the group's start, a row at a time
        claimed = sum(chunks[index].unpacked_bytes for index in self._leaves)
        rows = self._batch_rows if claimed <= PAGE_BYTES else 1
        yield from islice(self._read(row_group, rows, sys.maxsize), given, None)

    def _read(self, row_group: int, rows: int, small_bytes: int) -> Iterator[pa.RecordBatch]:
        schema = self._metadata.schema
        self._pages.follow(self._row_groups[row_group], schema, self._dictionaries, small_bytes)
        return self._file.iter_batches(
            batch_size=rows, row_groups=[row_group], columns=self.columns, use_threads=False
        )


def _row_groups(file: Any) -> tuple[tuple[Chunk, ...], ...]:
    """The columns of each row group, by the footer; not by Arrow, which a damaged one makes end the process."""
    try:
        return read_footer(file).row_groups
    except FooterError as torn:
        raise pa.ArrowInvalid(str(torn)) from torn


def _is_within(path: str, columns: Collection[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in columns)


def _is_text(leaf: pq.ColumnSchema) -> bool:
    return leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "DECIMAL"


def stored_value(column: pa.Array, index: int) -> pa.Buffer | None:
    """The bytes of a text or binary value, not copied; strings in Parquet need not be valid UTF-8."""
    if isinstance(column, pa.DictionaryArray):
        place = column.indices[index].as_py()
        return None if place is None else stored_value(column.dictionary, place)
    value = column[index]
    return value.as_buffer() if value.is_valid else None


def expanded_bytes(values: pa.Array) -> int:
    """What values take once dictionaries are expanded; each counts for `VALUE_BYTES` besides."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        counts = pc.value_counts(values.indices.drop_null())
        lengths = pc.binary_length(values.dictionary.take(counts.field("values")))
        return VALUE_BYTES * len(values) + (pc.sum(pc.multiply(lengths, counts.field("counts"))).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(map(expanded_bytes, values.flatten()), VALUE_BYTES * len(values))
    if isinstance(values, pa.MapArray):
        raise ValueError("a map is not read; write it as a list of records")
    if isinstance(values, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        return VALUE_BYTES * len(values) + expanded_bytes(values.flatten())
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return expanded_bytes(values.cast(pa.large_binary()))
    if _has_length(kind):
        return VALUE_BYTES * len(values) + (pc.sum(pc.binary_length(values)).as_py() or 0)
    return VALUE_BYTES * len(values)


def _has_length(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )
