"""Laws of joining records: in their order, a few in memory at a time, every count in the manifest."""

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from cluster.storage.local import LocalStore
from data.curation.exact_duplicates import Duplicates
from data.finished_pieces.records import put_record, record_path
from data.preparing.assemble import READING_THREADS, assemble, read_records
from data.preparing.pieces import Piece
from data.preparing.survey_check import check_surveys
from data.reading.raw_shards import CorpusConfig, RawShard

NUM_PIECES = 50


class _Counting(LocalStore):
    """Counts what was read."""

    num_read = 0

    def read(self, path: str) -> bytes:
        self.num_read += 1
        return super().read(path)


def test_records_come_in_order_and_few_are_read_before_they_are_taken(tmp_path):
    store = _Counting(f"file://{tmp_path}")
    digests = [f"{number:016x}" for number in range(NUM_PIECES)]
    for number, digest in enumerate(digests):
        put_record(store, record_path("tokens", digest), {"shards": [], "set_aside": number})
    records = read_records(store, "tokens", digests)
    assert next(records) == {"shards": [], "set_aside": 0} and store.num_read <= READING_THREADS
    assert [record["set_aside"] for record in records] == list(range(1, NUM_PIECES))


def test_surveys_of_versions_that_did_not_count_torn_shards_are_read():
    counts = {"documents": 9, "set_aside": 0, "reasons": {}, "named": {}}
    check_surveys(
        CorpusConfig(uri="raw", prepared="prepared"),
        [{"shards": ["a.jsonl"], "bytes": {"train": 1, "validation": 1, "test": 1}, **counts}],
    )


class _Record(dict):
    """A record whose end can be seen."""


def record_of(piece: int) -> _Record:
    """Of the last pass: as many shards as the number's remainder by 3, of two fragments each."""
    columns = ("row_group", "num_tokens", "num_bytes", "num_documents", "checksum")
    shards = [
        {
            "shard": {
                "path": f"{piece}-{n}",
                "split": "train",
                "source": "web",
                "num_bytes": 9,
                "sha256": "",
            },
            "fragments": {**dict.fromkeys(columns, [piece, n]), "blake2b": [f"{piece:032x}", f"{n:032x}"]},
        }
        for n in range(piece % 3)
    ]
    return _Record(shards=shards, set_aside=piece % 2)


def test_the_manifest_has_every_shard_and_count_and_no_record_is_kept_for_it():
    living: list[weakref.ref[_Record]] = []
    most = 0

    def records() -> Iterator[dict[str, Any]]:
        nonlocal most
        for piece in range(NUM_PIECES):
            record = record_of(piece)
            living.append(weakref.ref(record))
            most = max(most, sum(each() is not None for each in living))
            yield record

    manifest = assemble(
        CorpusConfig(sources={"web": "raw/web", "books": "raw/books"}, prepared="p", set_aside_limit=1.0),
        SimpleNamespace(fingerprint="0" * 16, vocab_size=300, boundary_id=0, token_dtype="uint16"),
        [Piece((RawShard(("web", "books")[n % 2], f"{n}", 1, "v"),)) for n in range(NUM_PIECES)],
        [{"documents": 10, "set_aside": 1}] * NUM_PIECES,
        Duplicates(np.tile([3, 2, 1], (NUM_PIECES, 1)), np.zeros(NUM_PIECES, np.uint64)),
        records(),
    )
    assert most <= 2  # the one just made, and the one before
    paths = [f"{piece}-{n}" for piece in range(NUM_PIECES) for n in range(piece % 3)]
    assert [shard.path for shard in manifest.shards] == paths
    assert manifest.fragments.shard.tolist() == [index for index in range(len(paths)) for _ in range(2)]
    numbers = [int(part) for path in paths for part in path.split("-")]
    assert manifest.fragments.checksum.tolist() == manifest.fragments.num_tokens.tolist() == numbers
    assert [int.from_bytes(each.tobytes(), "big") for each in manifest.fragments.blake2b] == numbers
    assert manifest.duplicates["train"] == {"web": 75, "books": 75}
    assert manifest.duplicates["test"] == {"web": 25, "books": 25}
    assert manifest.set_aside == {"web": 25, "books": 50}
