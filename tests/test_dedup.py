"""Laws of exact duplicates: which one stays, whatever the ranges and groups, and how often a file is opened."""

import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.storage.local import LocalStore
from cluster.storage.uris import open_store
from data.curation.exact_duplicates import (
    HashFile,
    add_up,
    duplicates_of,
    find_duplicates,
    merge_hashes,
    record_duplicates,
    write_hashes,
)
from data.reading.clean import content_hash
from data.shards.manifest import SPLITS

Piece = list[tuple[int, int]]
"""A text's number and the index of its split, by document."""

pieces = st.lists(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), max_size=25), min_size=1, max_size=6
)


def put_pieces(store, of_corpus: list[Piece]) -> list[HashFile]:
    files = [HashFile(f"hashes-{piece}", piece) for piece in range(len(of_corpus))]
    for file, documents in zip(files, of_corpus, strict=True):
        contents = b"".join(content_hash(str(number).encode()) for number, _ in documents)
        store.put(file.path, write_hashes(contents, bytes(split for _, split in documents)))
    return files


def merged(store, files: list[HashFile], cuts: list[int]) -> list[HashFile]:
    """The files in groups that begin at the cuts."""
    groups = [
        files[first:end]
        for first, end in pairwise(sorted({0, len(files), *(cut for cut in cuts if cut < len(files))}))
    ]
    for group in groups:
        store.put(f"merged-{group[0].first_piece}", merge_hashes(store, group))
    return [HashFile(f"merged-{group[0].first_piece}", group[0].first_piece) for group in groups]


def left_out(store, files: list[HashFile], num_ranges: int) -> tuple[set[tuple[int, int]], Counter]:
    """(piece, ordinal) of the documents to leave out, and the records' fingerprints added up."""
    paths, fingerprints = [f"found-{index}" for index in range(num_ranges)], Counter()
    for index, path in enumerate(paths):
        record = record_duplicates(store, path, find_duplicates(store, files, index, num_ranges))
        for piece, fingerprint in zip(record["piece"], record["fingerprint"], strict=True):
            fingerprints[piece] = (fingerprints[piece] + fingerprint) % 2**64
    last = max(file.first_piece for file in files) + 10
    return {
        (piece, int(ordinal)) for piece in range(last) for ordinal in duplicates_of(store, paths, piece)
    }, fingerprints


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(pieces, st.integers(1, 5), st.lists(st.integers(0, 5)))
def test_of_equal_texts_the_first_in_the_split_that_matters_most_stays(
    tmp_path_factory, of_corpus, num_ranges, cuts
):
    store = open_store(str(tmp_path_factory.mktemp("dedup")))
    best: dict[int, tuple[int, int, int]] = {}
    for piece, documents in enumerate(of_corpus):
        for ordinal, (number, split) in enumerate(documents):
            rank = ("test", "validation", "train").index(SPLITS[split])
            best[number] = min(best.get(number, (9, 9, 9)), (rank, piece, ordinal))
    everything = {(piece, ordinal) for piece, each in enumerate(of_corpus) for ordinal in range(len(each))}
    staying = {(piece, ordinal) for _, piece, ordinal in best.values()}
    files = put_pieces(store, of_corpus)
    alone = left_out(store, files, 1)
    assert everything - alone[0] == staying
    assert left_out(store, files, num_ranges) == alone
    assert left_out(store, merged(store, files, cuts), num_ranges) == alone


class _Opened(LocalStore):
    """Counts how often each file is opened."""

    opened: Counter[str] = Counter()

    def open(self, path: str):
        self.opened[path] += 1
        return super().open(path)


def test_each_pieces_file_is_opened_once_and_each_range_opens_one_file_a_group(tmp_path):
    store = _Opened(f"file://{tmp_path}")
    files = put_pieces(store, [[(number, 0)] for number in range(40)])
    groups = merged(store, files, [10, 20, 30])
    for index in range(7):
        find_duplicates(store, groups, index, 7)
    assert {path: store.opened[path] for path in (file.path for file in files)} == {
        file.path: 1 for file in files
    }
    assert {file.path: store.opened[file.path] for file in groups} == {file.path: 7 for file in groups}


@pytest.mark.parametrize("pieces_per_group", [1, 3])
def test_a_merged_file_follows_from_its_pieces_alone_wherever_they_stand(tmp_path, pieces_per_group):
    store = open_store(str(tmp_path))
    files = put_pieces(store, [[(number, number % 3), (7, 0)] for number in range(pieces_per_group)])
    later = [HashFile(file.path, file.first_piece + 100) for file in files]
    assert merge_hashes(store, files) == merge_hashes(store, later)


def record_of(pieces: int, seed: int) -> dict[str, list[int]]:
    """A range's record with documents of each piece and split."""
    places = range(pieces * len(SPLITS))
    return {
        "piece": [place // len(SPLITS) for place in places],
        "split": [place % len(SPLITS) for place in places],
        "count": [(place + seed) % 7 + 1 for place in places],
        "fingerprint": [(place + seed) * 0x9E3779B97F4A7C15 % 2**64 for place in places],
    }


def test_records_of_all_ranges_add_up_to_each_pieces_duplicates():
    records = [record_of(4, seed) for seed in range(5)]
    expected, fingerprints = Counter(), Counter()
    for record in records:
        for piece, split, count, fingerprint in zip(*record.values(), strict=True):
            expected[piece, split] += count
            fingerprints[piece] += fingerprint
    found = add_up(iter(records), 5)
    assert found.count.tolist() == [[expected[piece, split] for split in range(3)] for piece in range(5)]
    assert found.fingerprint.tolist() == [fingerprints[piece] % 2**64 for piece in range(5)]


def test_adding_up_takes_the_memory_of_one_range_however_many_there_are():
    def peak_bytes(num_ranges: int) -> int:
        def ranges() -> Iterator[dict[str, list[int]]]:
            for seed in range(num_ranges):
                yield record_of(1_000, seed)

        tracemalloc.start()
        add_up(ranges(), 1_000)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_bytes(20) < 1.2 * peak_bytes(2)
