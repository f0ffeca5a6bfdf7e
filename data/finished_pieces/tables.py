"""Tables of pieces of work as Parquet, sorted by a column: parts of them are read, and damage is told.

pyarrow's reading of datasets, with filters and threads, can wait for ever where a table is damaged (26.0.1: one of some
hundred), so row groups are chosen here, by bounds in the schema's metadata, and read in the calling thread.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.storage.uris import StorageError, Store
from data.finished_pieces.records import forget_damaged
from data.reading.parquet_footer import FooterError, read_footer
from data.shards.manifest import SPLITS

# Small enough that a range, or the duplicates of one piece, can be read out of a large file.
ROW_GROUP = 65_536
BOUNDS = b"bounds"
"""Key of the metadata: CRC-32 of what follows, in hex, then the first and last value of each row group as JSON."""
Within = tuple[str, int, int]
"""Column that the table is sorted by, least and greatest value that are wanted."""


def write_table(table: pa.Table, key: str) -> bytes:
    """Parquet of a table that is sorted by `key`, with checksums of its pages."""
    values = table.column(key).to_numpy()
    groups = [values[start : start + ROW_GROUP] for start in range(0, max(1, len(values)), ROW_GROUP)]
    bounds = json.dumps(
        [[int(group[0]), int(group[-1])] if len(group) else [] for group in groups], allow_nan=False
    )
    metadata = {BOUNDS: f"{zlib.crc32(bounds.encode()):08x}{bounds}".encode()}
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata(metadata), sink, compression="zstd", row_group_size=ROW_GROUP,
        write_page_checksum=True,
    )  # fmt: skip
    return sink.getvalue().to_pybytes()


def read_table(
    store: Store, path: str, columns: Mapping[str, pa.DataType], within: Within | None = None
) -> pa.Table:
    """The rows of a table, or those within. Files of before have no bounds, and are read whole.

    Raises:
        CorpusError: it is damaged or gone; its piece is done again by the next command.
    """
    try:
        with store.open(path) as file:
            table = _rows(file, columns, within)
    except StorageError:
        raise
    # What pyarrow raises depends on the damage.
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        UnicodeDecodeError,
        MemoryError,
    ) as error:
        raise forget_damaged(store, path, str(error)) from None
    return table


def _rows(file: Any, columns: Mapping[str, pa.DataType], within: Within | None) -> pa.Table:
    footer = read_footer(file)
    reader = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
    schema = reader.schema_arrow.remove_metadata()
    found = dict(zip(schema.names, schema.types, strict=True))
    if found != columns and found != {**columns, "piece": pa.int32()}:
        raise ValueError(f"it has the columns {', '.join(schema.names)}")
    bounds = _bounds(footer.metadata, len(footer.row_groups))
    parts = [schema.empty_table()]
    for number in range(len(footer.row_groups)):
        if within and bounds and not _overlap(bounds[number], within):
            continue
        part = reader.read_row_group(number, use_threads=False).replace_schema_metadata(None)
        parts.append(_checked(part, bounds[number] if bounds else None, within))
    return pa.concat_tables(parts)


def _bounds(metadata: Mapping[bytes, bytes], num_row_groups: int) -> list[list[int]] | None:
    """The first and last value of each row group; None in files of before."""
    if BOUNDS not in metadata:
        return None
    crc32, text = metadata[BOUNDS][:8], metadata[BOUNDS][8:]
    if b"%08x" % zlib.crc32(text) != crc32:
        raise FooterError("its bounds do not have their checksum")
    bounds: list[list[int]] = json.loads(text)
    if len(bounds) != num_row_groups:
        raise FooterError(f"it has {num_row_groups:,} row groups, and bounds of {len(bounds):,}")
    return bounds


def _overlap(bounds: list[int], within: Within) -> bool:
    return bool(bounds) and bounds[0] <= within[2] and within[1] <= bounds[1]


def _checked(part: pa.Table, bounds: list[int] | None, within: Within | None) -> pa.Table:
    """A row group, or those of its rows that are within."""
    if not len(part):
        return part
    if any(column.null_count for column in part.columns):
        raise ValueError("values are missing")
    if (pc.max(part.column("split")).as_py()) >= len(SPLITS):
        raise ValueError("it has a split that there is not")
    if not within:
        return part
    key, low, high = within
    values = part.column(key).to_numpy()
    if np.any(values[1:] < values[:-1]) or (bounds and bounds != [int(values[0]), int(values[-1])]):
        raise ValueError(f"it is not sorted by {key}")
    # By Python's integers: numpy takes those of 64 bits without sign for floats.
    first = int(np.searchsorted(values, values.dtype.type(low), "left"))
    stop = int(np.searchsorted(values, values.dtype.type(high), "right"))
    return part.slice(first, stop - first)
