"""A piece of work whose record is damaged is done again, that one alone; the corpus is the same."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stored_kinds import corpus_config, put_corpus
from test_prepare import _Counting as Counting

from cluster.configuration.stored_file import DamagedFileError
from cluster.storage.uris import Store, open_store
from data.curation.exact_duplicates import DUPLICATES, duplicates_of
from data.finished_pieces import tables as piece_tables
from data.finished_pieces.records import SEAL, put_record, read_record
from data.preparing.assemble import existing_manifest
from data.preparing.corpus import prepare
from data.reading.raw_shards import CorpusError
from data.shards.manifest import read_manifest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr("data.reading.raw_shards.PIECE_BYTES", 1)
    monkeypatch.setattr("cluster.storage.local._sync", lambda path: None)
    put_corpus(tmp_path)
    return tmp_path


def store_of(folder: Path) -> Store:
    return open_store(str(folder / "prepared"))


def first(store: Store, kind: str) -> str:
    return store.list(f"pieces/{kind}-")[0].path


def flipped(store: Store, path: str) -> bytes:
    """The record with another digit: still JSON, and of the same shape."""
    content = store.read(path)
    at = next(i for i, byte in enumerate(content) if chr(byte) in "12345678")
    return content[:at] + bytes([content[at] + 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage", [flipped, lambda store, path: store.read(path)[:-9], lambda store, path: b"{}"]
)
@pytest.mark.parametrize(
    ("kind", "pass_name"), [("survey", "survey"), ("duplicates", "deduplicate"), ("tokens", "tokenize")]
)
def test_the_piece_of_a_damaged_record_is_done_again_and_told(
    folder, capsys, kind, pass_name, damage
) -> None:
    store, work = store_of(folder), Counting()
    before = read_manifest(store).digest
    path = first(store, kind)
    whole = store.read(path)
    store.put(path, damage(store, path))
    store.delete(first(store, "inputs"))
    assert prepare(corpus_config(folder), fan_out=work).digest == before
    assert [name for name, _ in work.done] == [pass_name]
    assert store.read(path) == whole
    assert capsys.readouterr().out.count(f"{path} is damaged: ") == 1


@pytest.mark.parametrize("key", ["content", "pinned"])
def test_a_survey_with_its_hash_that_pins_no_texts_is_done_again(folder, capsys, key) -> None:
    store, work = store_of(folder), Counting()
    before, path = read_manifest(store).digest, first(store, "survey")
    whole, content = store.read(path), read_record(store, path)
    content.pop(key)
    put_record(store, path, content)
    store.delete(first(store, "inputs"))
    assert prepare(corpus_config(folder), fan_out=work).digest == before
    assert [name for name, _ in work.done] == ["survey"] and store.read(path) == whole
    assert f"{path} is damaged: " in capsys.readouterr().out


@pytest.mark.parametrize("column", ["row_group", "num_tokens", "checksum", "blake2b"])
def test_a_record_with_its_hash_whose_columns_do_not_fit_is_damaged(folder, column: str) -> None:
    store = store_of(folder)
    path = first(store, "tokens")
    content = read_record(store, path)
    fragments = content["shards"][0]["fragments"]
    for wrong in ([], fragments[column] * 2, ["x"] * len(fragments[column])):
        changed = content["shards"][0] | {"fragments": fragments | {column: wrong}}
        put_record(store, path, content | {"shards": [changed]})
        with pytest.raises(DamagedFileError, match="fragments"):
            read_record(store, path)


def test_a_damaged_note_of_the_inputs_costs_a_look_at_the_pieces_and_no_work(folder, capsys) -> None:
    store, work = store_of(folder), Counting()
    path = first(store, "inputs")
    store.put(path, flipped(store, path))
    assert existing_manifest(corpus_config(folder)) is None
    assert (
        prepare(corpus_config(folder), fan_out=work).digest == read_manifest(store).digest and not work.done
    )
    assert existing_manifest(corpus_config(folder)) is not None and "is damaged" in capsys.readouterr().out


def test_the_note_of_a_trained_tokenizer_is_never_guessed(folder) -> None:
    store = store_of(folder)
    path = first(store, "tokenizer")
    store.put(path, flipped(store, path))
    store.delete(first(store, "inputs"))
    with pytest.raises(
        DamagedFileError, match=f"{path} is damaged.*by the name of its folder in tokenizers/"
    ):
        prepare(corpus_config(folder), fan_out=Counting())
    [tokenizer] = store.list("tokenizers/")
    store.put(path, json.dumps({"tokenizer": tokenizer.path.split("/")[1]}).encode())  # as the error says
    assert prepare(corpus_config(folder), fan_out=Counting()).digest == read_manifest(store).digest
    store.delete(first(store, "inputs"))
    store.delete(tokenizer.path)
    with pytest.raises(
        CorpusError, match=f"{tokenizer.path}: no such object, but {path} names it: put it back"
    ):
        prepare(corpus_config(folder), fan_out=Counting())


@pytest.mark.parametrize("kind", ["hashes", "duplicates"])
@pytest.mark.parametrize("how", ["a bit of a page", "cut", "gone", "another table"])
def test_a_damaged_table_of_a_piece_is_named_and_made_anew_by_the_same_command(folder, kind, how) -> None:
    store, work = store_of(folder), Counting()
    before = read_manifest(store).digest
    for info in [*store.list("pieces/tokens-"), *store.list("pieces/inputs-")]:
        store.delete(info.path)
    if kind == "hashes":
        store.delete(next(i.path for i in store.list("pieces/duplicates-") if i.path.endswith(".json")))
    path = next(info.path for info in store.list(f"pieces/{kind}-") if info.path.endswith(".parquet"))
    whole = store.read(path)
    if how == "gone":
        store.delete(path)
    elif how == "another table":
        other = "hashes" if kind == "duplicates" else "duplicates"
        store.put(
            path, store.read(next(i.path for i in store.list(f"pieces/{other}-") if "parquet" in i.path))
        )
    else:
        middle = len(whole) // 4 if kind == "hashes" else 40
        flip = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        store.put(path, flip if how == "a bit of a page" else whole[:-9])
    with pytest.raises(CorpusError, match=f"{path} is damaged: .*; run the same command again") as refused:
        prepare(corpus_config(folder), fan_out=work)
    assert "\n" not in str(refused.value)
    assert prepare(corpus_config(folder), fan_out=work).digest == before and store.read(path) == whole


def test_records_of_before_they_had_hashes_are_read(folder) -> None:
    store, work = store_of(folder), Counting()
    for info in store.list("pieces/"):
        if info.path.endswith(".json") and "inputs-" not in info.path:
            record = json.loads(store.read(info.path))
            assert len(record.pop(SEAL)) == 64
            store.put(info.path, json.dumps(record).encode())
    store.delete(first(store, "inputs"))
    assert (
        prepare(corpus_config(folder), fan_out=work).digest == read_manifest(store).digest and not work.done
    )


def test_a_record_is_read_back_as_it_was_put_and_not_with_another_number(tmp_path) -> None:
    store, path = open_store(str(tmp_path)), "pieces/tokens-0123456789abcdef.json"
    content = {"shards": [], "set_aside": 3, "é": [1.5, None, 2**64 - 1]}
    put_record(store, path, content)
    assert read_record(store, path) == read_record(store, path, is_bounded=True) == content
    store.put(path, store.read(path).replace(b"3", b"4", 1))
    with pytest.raises(DamagedFileError, match="it does not have the hash"):
        read_record(store, path)


@pytest.mark.parametrize("kind", ["survey", "duplicates", "tokens", "inputs", "tokenizer"])
def test_a_record_with_its_hash_but_of_another_shape_is_damaged(tmp_path, kind) -> None:
    store, path = open_store(str(tmp_path)), f"pieces/{kind}-0123456789abcdef.json"
    put_record(store, path, {"shards": 1, "set_aside": "1"})
    with pytest.raises(DamagedFileError, match=f"{path} is damaged"):
        read_record(store, path)


def test_of_a_table_only_the_row_groups_within_are_read_also_of_one_from_before_it_had_bounds(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(piece_tables, "ROW_GROUP", 4)
    store, path = open_store(str(tmp_path)), "pieces/duplicates-x.parquet"
    pieces = [0, 0, 1, 1, 1, 1, 1, 1, 1, 3, 7, 7]
    columns = {"piece": pieces, "ordinal": list(range(12)), "split": [0] * 12}
    table = pa.table({name: pa.array(values, DUPLICATES[name]) for name, values in columns.items()})
    store.put(path, piece_tables.write_table(table, "piece"))
    reads, read = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, n, **how: reads.append(n) or read(self, n, **how)
    )
    for wanted, groups in ((0, [0]), (1, [0, 1, 2]), (2, [2]), (3, [2]), (7, [2]), (9, [])):
        found = [n for n, piece in enumerate(pieces) if piece == wanted]
        assert duplicates_of(store, [path], wanted).tolist() == found and reads == groups, wanted
        reads.clear()
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=4)
    store.put(path, sink.getvalue().to_pybytes())
    assert duplicates_of(store, [path], 1).tolist() == list(range(2, 9)) and reads == [0, 1, 2]
    empty = table.slice(0, 0)
    store.put(path, piece_tables.write_table(empty, "piece"))
    assert duplicates_of(store, [path], 1).tolist() == []
