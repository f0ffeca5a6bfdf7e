"""Exact duplicates, decided by content hashes alone, with memory for one range of the hashes at a time.

Every piece has a file of its hashes. Each range of the hashes reads a part of every file, so a corpus of very many
pieces merges their files in groups first: 100,000 pieces with a billion documents are some 240 groups and as many
ranges, 57,000 small reads in place of 24 million.

Of equal texts one stays: the one whose split matters most (test, validation, train), then the first by
source, path and line. That is a property of the set of texts: neither timing nor the order in which shards
were added has a say.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.storage.uris import Store
from data.finished_pieces.tables import Within, read_table, write_table
from data.reading.raw_shards import CorpusError
from data.reading.splits import KEEPING_ORDER, scrambled
from data.shards.manifest import SPLITS

T = TypeVar("T")
U = TypeVar("U")

# About 100 bytes each while a range, or a group of pieces, is sorted: 400 MB.
DOCUMENTS_PER_RANGE = 4_194_304
# At 3 requests of 20 ms each, 1,000 files take a range 4 s.
READING_THREADS = 16

HASHES = {"high": pa.uint64(), "low": pa.uint64(), "ordinal": pa.int64(), "split": pa.uint8()}
DUPLICATES = {"piece": pa.int32(), "ordinal": pa.int64(), "split": pa.uint8()}
_RANK = np.array([KEEPING_ORDER.index(split) for split in SPLITS], np.uint8)


def write_hashes(contents: bytes, splits: bytes) -> bytes:
    """Parquet of a piece's documents, sorted by hash.

    Args:
        contents: 16-byte content hashes of all documents, joined, in the order of reading.
        splits: One byte each: index into `SPLITS`.
    """
    words = np.frombuffer(contents, ">u8").reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0]))  # stable: equal hashes keep the order of reading
    table = pa.table(
        {
            "high": words[order, 0].astype(np.uint64),
            "low": words[order, 1].astype(np.uint64),
            "ordinal": order.astype(np.int64),
            "split": np.frombuffer(splits, np.uint8)[order],
        }
    )
    return write_table(table, "high")


def read_hashes(store: Store, path: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """What `write_hashes` was given, in the order of reading: contents [documents, 16] and splits [documents]."""
    table = read_table(store, path, HASHES)
    order = np.argsort(table.column("ordinal").to_numpy())
    words = np.stack([table.column(name).to_numpy()[order] for name in ("high", "low")], axis=1)
    return words.astype(">u8").view(np.uint8), table.column("split").to_numpy()[order]


@dataclass(frozen=True)
class HashFile:
    """A file of `write_hashes`, or one of consecutive pieces by `merge_hashes`."""

    path: str
    first_piece: int
    """Its place in the corpus's order of pieces."""


def merge_hashes(store: Store, files: Sequence[HashFile]) -> bytes:
    """Parquet of the documents of consecutive pieces, as `write_hashes`, with the piece of each, counted from 0."""
    joined = pa.concat_tables(_in_threads(lambda file: _read_hashes(store, file), files))
    high, low = (joined.column(name).to_numpy() for name in ("high", "low"))
    merged = joined.take(np.lexsort((low, high)))
    first = pa.scalar(files[0].first_piece, pa.int32())
    place = merged.schema.get_field_index("piece")
    merged = merged.set_column(place, "piece", pc.subtract(merged.column("piece"), first))
    return write_table(merged, "high")


def find_duplicates(store: Store, files: Sequence[HashFile], index: int, num_ranges: int) -> pa.Table:
    """All documents to leave out whose hash lies in one of `num_ranges` equal ranges.

    Args:
        files: Of all pieces, in the corpus's order.
        index: Which range.

    Returns:
        Columns piece (int32: in the corpus's order), ordinal (int64: of the document in its piece), split
        (uint8), sorted.
    """
    lowest, highest = ((2**64 * bound) // num_ranges for bound in (index, index + 1))
    within = ("high", lowest, highest - 1)
    tables = _in_threads(lambda file: _read_hashes(store, file, within), files)
    joined = pa.concat_tables(tables)
    high, low, ordinal, split, piece = (
        joined.column(name).to_numpy() for name in ("high", "low", "ordinal", "split", "piece")
    )
    order = np.lexsort((ordinal, piece, _RANK[split], low, high))
    high, low = high[order], low[order]
    repeats = order[1:][(high[1:] == high[:-1]) & (low[1:] == low[:-1])]
    repeats = repeats[np.lexsort((ordinal[repeats], piece[repeats]))]
    return pa.table({"piece": piece[repeats], "ordinal": ordinal[repeats], "split": split[repeats]})


def record_duplicates(store: Store, path: str, duplicates: pa.Table) -> dict[str, list[int]]:
    """Put what `find_duplicates` found, for `duplicates_of`, and count it.

    Returns:
        Columns piece, split, count, and fingerprint: a sum modulo 2**64 that tells which ordinals they are,
        to be added up over ranges. One row for each piece and split that has any.
    """
    store.put(path, write_table(duplicates, "piece"))
    piece, ordinal, split = (duplicates.column(name).to_numpy() for name in ("piece", "ordinal", "split"))
    keys, group = np.unique(piece.astype(np.int64) * len(SPLITS) + split, return_inverse=True)
    fingerprint = np.zeros(len(keys), np.uint64)
    np.add.at(fingerprint, group, scrambled(ordinal.astype(np.uint64), 0))
    return {
        "piece": (keys // len(SPLITS)).tolist(),
        "split": (keys % len(SPLITS)).tolist(),
        "count": np.bincount(group, minlength=len(keys)).tolist(),
        "fingerprint": fingerprint.tolist(),
    }


@dataclass(frozen=True)
class Duplicates:
    """What is left out of each piece, added up over all ranges."""

    count: NDArray[np.int64]
    """[pieces, splits]: documents."""
    fingerprint: NDArray[np.uint64]
    """[pieces]: tells which documents they are."""


def add_up(records: Iterable[Mapping[str, Any]], num_pieces: int) -> Duplicates:
    """Add up what `record_duplicates` returned for each range, one record at a time."""
    total = Duplicates(np.zeros((num_pieces, len(SPLITS)), np.int64), np.zeros(num_pieces, np.uint64))
    for record in records:
        piece = np.array(record["piece"], np.int64)
        if piece.max(initial=0) >= num_pieces:
            raise CorpusError(
                f"a record of duplicates is of another corpus: it has the piece {piece.max():,}"
            )
        np.add.at(total.count, (piece, np.array(record["split"], np.int64)), record["count"])
        np.add.at(total.fingerprint, piece, np.array(record["fingerprint"], np.uint64))
    return total


def duplicates_of(store: Store, paths: list[str], piece: int) -> np.ndarray:
    """Ordinals (int64, ascending) of one piece's documents to leave out, from the files of all ranges."""

    def read(path: str) -> np.ndarray:
        return read_table(store, path, DUPLICATES, ("piece", piece, piece)).column("ordinal").to_numpy()

    found = _in_threads(read, paths)
    return np.sort(np.concatenate(found)) if found else np.empty(0, np.int64)


def _read_hashes(store: Store, hashes: HashFile, within: Within | None = None) -> pa.Table:
    """Columns high, low, ordinal, split, and piece in the corpus's order, of the documents within a range."""
    table = read_table(store, hashes.path, HASHES, within)
    first = pa.scalar(hashes.first_piece, pa.int32())
    if "piece" not in table.column_names:
        return table.append_column("piece", pa.repeat(first, len(table)))
    place = table.schema.get_field_index("piece")
    return table.set_column(place, "piece", pc.add(table.column("piece"), first))


def _in_threads(function: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """For reading, which waits."""
    with ThreadPoolExecutor(READING_THREADS) as pool:
        return list(pool.map(function, items))
