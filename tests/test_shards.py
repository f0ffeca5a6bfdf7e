"""Laws of token shards: what was written is read, and what was altered is refused."""

import hashlib
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.storage.local import LocalStore
from cluster.storage.uris import StorageError, Store, open_store
from data.rows.evaluation_rows import evaluation_batches
from data.shards.manifest import Fragments, Manifest
from data.shards.shard_hashes import forget_footers
from data.shards.shards import (
    PART_TOKENS,
    ShardError,
    ShardWriter,
    WrittenShard,
    read_fragment,
    read_fragment_documents,
)
from tests.token_corpus import put_token_corpus
from trainers.recovery.stopping import FAILURE, telling_final_errors

BOUNDARY = 0


def write(
    store: Store, documents: Sequence[np.ndarray], *, dtype: str = "uint16", fragment: int, shard: int = 10**9
) -> Manifest:
    with ShardWriter(
        store, split="train", source="s", token_dtype=dtype, fragment_tokens=fragment, shard_tokens=shard
    ) as writer:
        for number, tokens in enumerate(documents):
            writer.add(f"doc-{number}", tokens, 3 * len(tokens) + 1)
        written = writer.finish()
    columns: dict[str, list[int]] = {"shard": []}
    for index, each in enumerate(written):
        columns["shard"] += [index] * len(each.fragments["row_group"])
        for name, values in each.fragments.items():
            columns.setdefault(name, []).extend(values)
    shards = tuple(each.shard for each in written)
    fragments = Fragments.from_columns(columns)
    return Manifest("0" * 16, 2**16, BOUNDARY, dtype, ("s",), shards, fragments, {}, {})


def document(length: int, highest: int = 2**16) -> np.ndarray:
    tokens = np.random.default_rng(length).integers(1, highest, length, np.uint32)
    tokens[0] = BOUNDARY
    return tokens


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    fragment=st.integers(1, 600),
    shard=st.integers(1, 3_000),
    dtype=st.sampled_from(["uint16", "uint32"]),
)
def test_fragments_in_order_are_the_documents_in_order(
    lengths: list[int], fragment: int, shard: int, dtype: str
) -> None:
    documents = [document(length) for length in lengths]
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        manifest = write(store, documents, dtype=dtype, fragment=fragment, shard=shard)
        read = [read_fragment(store, manifest, index) for index in range(len(manifest.fragments))]
        ids = [read_fragment_documents(store, manifest, index)[0] for index in range(len(read))]
    assert np.array_equal(np.concatenate(read), np.concatenate(documents))
    assert all(tokens.dtype == np.dtype(dtype) for tokens in read)
    assert [len(tokens) for tokens in read] == manifest.fragments.num_tokens.tolist()
    assert all(len(tokens) <= max(fragment, *lengths) for tokens in read)
    assert sum(ids, []) == [f"doc-{number}" for number in range(len(lengths))]
    assert manifest.fragments.num_bytes.sum() == sum(3 * length + 1 for length in lengths)


def test_documents_of_a_fragment_begin_where_their_boundaries_are(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    manifest = write(store, [document(length) for length in (5, 1, 300, 2)], fragment=1_000)
    ids, starts = read_fragment_documents(store, manifest, 0)
    assert ids == ["doc-0", "doc-1", "doc-2", "doc-3"]
    assert starts.tolist() == np.flatnonzero(read_fragment(store, manifest, 0) == BOUNDARY).tolist()


def test_a_very_long_document_is_cut_into_parts_of_which_only_the_first_begins(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    whole = document(2 * PART_TOKENS + 10)
    manifest = write(store, [document(9), whole], fragment=4_096)
    assert manifest.fragments.num_tokens.tolist() == [9, PART_TOKENS, PART_TOKENS, 10]
    assert manifest.fragments.num_documents.tolist() == [1, 1, 0, 0]
    assert manifest.fragments.num_bytes.sum() == 3 * (len(whole) + 9) + 2
    ids = [read_fragment_documents(store, manifest, index)[0] for index in (1, 2, 3)]
    assert ids == [["doc-1#1"], ["doc-1#2"], ["doc-1#3"]]
    parts = np.concatenate([read_fragment(store, manifest, index) for index in (1, 2, 3)])
    assert np.array_equal(parts, whole)


def test_equal_content_has_equal_names(tmp_path: Path) -> None:
    documents = [document(length) for length in (50, 60, 70)]
    one, two = (write(open_store(str(tmp_path / name)), documents, fragment=100) for name in "ab")
    assert one.shards == two.shards
    assert one.digest == two.digest
    other = write(open_store(str(tmp_path / "c")), documents[:2], fragment=100)
    assert other.shards != one.shards


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_byte_on_the_disk_is_refused_by_shard_and_fragment(tmp_path: Path, place: float) -> None:
    store = open_store(str(tmp_path))
    manifest = write(store, [document(1_000) for _ in range(8)], fragment=1_000)
    path = manifest.shards[0].path
    content = bytearray(store.read(path))
    content[int(len(content) * place * 0.9)] ^= 0x10
    store.put(path, bytes(content))
    refused = 0
    for index in range(len(manifest.fragments)):
        try:
            tokens = read_fragment(store, manifest, index)
        except ShardError as error:
            assert path in str(error) and f"fragment {index}" in str(error)
            refused += 1
        else:
            assert np.array_equal(tokens, document(1_000))
    assert refused == 1


class _FlipsBytes(LocalStore):
    """A store behind a wire that damages answers."""

    flips: list[bool] = []

    def read_range(self, path: str, start: int, length: int) -> bytes:
        content = bytearray(super().read_range(path, start, length))
        if self.flips:
            self.flips.pop()
            content[len(content) // 2] ^= 1
        return bytes(content)


@pytest.mark.parametrize("num_flips", [1, 2])
@pytest.mark.parametrize("footer_is_known", [True, False])
def test_a_byte_flipped_on_the_way_is_read_again(
    tmp_path: Path, num_flips: int, footer_is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    manifest = write(store, [document(5_000)], fragment=10_000)
    if footer_is_known:  # so that the tokens are what is damaged
        read_fragment(store, manifest, 0)
    damaged = _FlipsBytes(store.uri, store.policy)
    monkeypatch.setattr(_FlipsBytes, "flips", [True] * num_flips)
    monkeypatch.setattr("data.shards.shard_hashes.open_store", lambda uri: damaged)
    assert np.array_equal(read_fragment(damaged, manifest, 0), document(5_000))
    assert not damaged.flips


# --- a rewritten shard ---


def with_its_crc32(original: bytes, altered: bytes, place: int) -> bytes:
    """`altered` with other 4 bytes at `place`, so that it has the CRC-32 of `original`: CRC is linear over bits."""
    start = altered[:place] + bytes(4) + altered[place + 4 :]
    nothing = zlib.crc32(bytes(len(altered)))
    rows = []  # (change of the CRC, bits that make it), reduced to one leading bit each
    for bit in range(32):
        single = bytes(place) + (1 << bit).to_bytes(4, "little") + bytes(len(altered) - place - 4)
        change, bits = zlib.crc32(single) ^ nothing, 1 << bit
        for other, its_bits in rows:
            if change ^ other < change:
                change, bits = change ^ other, bits ^ its_bits
        rows.append((change, bits))
        rows.sort(reverse=True)
    wanted, found = zlib.crc32(original) ^ zlib.crc32(start), 0
    for change, bits in rows:
        if wanted ^ change < wanted:
            wanted, found = wanted ^ change, found ^ bits
    assert wanted == 0
    return altered[:place] + found.to_bytes(4, "little") + altered[place + 4 :]


DOCUMENTS = {"doc-0": 300, "doc-1": 200, "doc-2": 400}


def rewritten(what: str) -> list[tuple[str, np.ndarray, int]]:
    """The documents of `DOCUMENTS`, or such as pass for them by CRC-32 of the tokens."""
    tokens = np.concatenate([document(length) for length in DOCUMENTS.values()]).astype("<u2")
    names, lengths, num_bytes = list(DOCUMENTS), list(DOCUMENTS.values()), [3 * n for n in DOCUMENTS.values()]
    if what == "tokens":
        altered = tokens.copy()
        altered[100:150] = 7
        tokens = np.frombuffer(with_its_crc32(tokens.tobytes(), altered.tobytes(), 240), "<u2")
    elif what == "ids":
        names[1] = "doc-x"
    elif what == "bytes":
        num_bytes[1] += 1
    elif what == "bounds":
        lengths[0], lengths[1] = lengths[1], lengths[0]
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    return list(zip(names, parts, num_bytes, strict=True))


def write_rewritten(store: Store, what: str) -> WrittenShard:
    settings = {"source": "s", "token_dtype": "uint16", "fragment_tokens": 1_000}
    with ShardWriter(store, split="validation", **settings) as writer:
        for name, tokens, num_bytes in rewritten(what):
            writer.add(name, tokens, num_bytes)
        (written,) = writer.finish()
    return written


def manifest_of(written: WrittenShard) -> Manifest:
    fragments = Fragments.from_columns({"shard": [0], **written.fragments})
    return Manifest("0" * 16, 2**16, BOUNDARY, "uint16", ("s",), (written.shard,), fragments, {}, {})


@pytest.mark.parametrize("what", ["tokens", "ids", "bytes", "bounds"])
def test_a_fragment_that_was_rewritten_with_its_crc32_made_to_fit_is_refused_at_every_read(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, elsewhere = open_store(f"{tmp_path}/corpus"), open_store(f"{tmp_path}/elsewhere")
    ours, theirs = write_rewritten(store, "nothing"), write_rewritten(elsewhere, what)
    assert theirs.fragments["checksum"] == ours.fragments["checksum"], "CRC-32 does not tell them apart"
    manifest = manifest_of(ours)
    ids, _ = read_fragment_documents(store, manifest, 0)
    assert ids == list(DOCUMENTS) and len(read_fragment(store, manifest, 0)) == 900
    store.put(ours.shard.path, elsewhere.read(theirs.shard.path))
    forget_footers()
    monkeypatch.setattr(pq, "ParquetFile", None)  # what is not what was written is never decoded
    named = f"{ours.shard.path}, fragment 0: its .* BLAKE2b .* Delete it and run data/prepare.py"
    for read in (
        lambda: read_fragment(store, manifest, 0),
        lambda: read_fragment_documents(store, manifest, 0),
        lambda: list(
            evaluation_batches(
                manifest, store, "validation", seq_len=9, rows_per_batch=2, rank=0, world_size=1
            )
        ),
    ):
        with pytest.raises(ShardError, match=named):
            read()


def test_a_footer_is_not_read_with_any_of_its_bytes_changed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    written = write_rewritten(store, "nothing")
    manifest, path = manifest_of(written), written.shard.path
    whole = store.read(path)
    footer = range(len(whole) - written.shard.footer_bytes, len(whole))
    assert whole[footer[-1] - 3 :] == b"PAR1" and len(footer) > 300
    for place in footer[::5]:
        store.put(path, whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        forget_footers()
        with pytest.raises(ShardError, match="its footer"):
            read_fragment(store, manifest, 0)
    store.put(path, whole)
    assert len(read_fragment(store, manifest, 0)) == 900


@pytest.mark.parametrize("cut", [1, 9, 1_000])
def test_a_cut_shard_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    store = open_store(str(tmp_path))
    written = write_rewritten(store, "nothing")
    store.put(written.shard.path, store.read(written.shard.path)[:-cut])
    forget_footers()
    with pytest.raises((ShardError, StorageError), match=written.shard.path):
        read_fragment(store, manifest_of(written), 0)


def test_the_hashes_are_those_of_the_bytes_in_the_file(tmp_path: Path) -> None:
    """Against the whole file: the row groups and the footer are all of it but the magic number at its beginning."""
    store = open_store(str(tmp_path))
    manifest = write(store, [document(1_000) for _ in range(3)], fragment=1_000)
    (shard,), (one, two, three) = manifest.shards, manifest.fragments.blake2b
    content = store.read(shard.path)
    body = content[4 : len(content) - shard.footer_bytes]
    bounds = [
        end
        for end in range(len(body) + 1)
        if hashlib.blake2b(body[:end], digest_size=16).digest() == one.tobytes()
    ]
    assert len(bounds) == 1
    middle = [
        end
        for end in range(bounds[0], len(body) + 1)
        if hashlib.blake2b(body[bounds[0] : end], digest_size=16).digest() == two.tobytes()
    ]
    assert hashlib.blake2b(body[middle[0] :], digest_size=16).digest() == three.tobytes()
    assert hashlib.blake2b(content[4 + len(body) :], digest_size=16).hexdigest() == shard.footer_blake2b


def test_another_checksum_in_the_manifest_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    manifest = write(store, [document(100)], fragment=1_000)
    fragments = replace(manifest.fragments, checksum=manifest.fragments.checksum ^ np.uint32(1))
    with pytest.raises(ShardError, match="checksum"):
        read_fragment(store, replace(manifest, fragments=fragments), 0)


def test_a_damaged_shard_in_validation_is_no_reason_never_to_start_a_run_again(tmp_path: Path) -> None:
    store, run = open_store(f"{tmp_path}/corpus"), open_store(f"{tmp_path}/run")
    manifest = put_token_corpus(store, {("validation", "s"): 1}, fragment_tokens=100)
    fragments = replace(manifest.fragments, checksum=manifest.fragments.checksum ^ np.uint32(1))
    damaged = replace(manifest, fragments=fragments)
    settings = {"seq_len": 9, "rows_per_batch": 2, "rank": 0, "world_size": 1}
    with pytest.raises(ShardError), telling_final_errors(run):
        list(evaluation_batches(damaged, store, "validation", **settings))
    assert not run.exists(FAILURE)


def test_nothing_written_stays_on_the_local_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = tmp_path / "local"
    local.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(local))
    with (
        pytest.raises(RuntimeError),
        ShardWriter(
            open_store(str(tmp_path / "s")),
            split="train",
            source="s",
            token_dtype="uint16",
            fragment_tokens=10,
        ) as writer,
    ):
        for number in range(10):
            writer.add(str(number), document(9), 1)
        assert list(local.iterdir())
        raise RuntimeError
    assert not list(local.iterdir())
