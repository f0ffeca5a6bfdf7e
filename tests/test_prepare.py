"""Laws of preparing: the same corpus whatever the order of the work, each piece done once, nothing lost."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from cluster.console.errors import ConfigError
from cluster.sessions.session import PROJECT
from cluster.storage.store import former_version
from cluster.storage.uris import Store, open_store
from data.finished_pieces.records import SEAL, record_path
from data.prepare import main
from data.preparing.assemble import existing_manifest, given_tokenizer, inputs_path
from data.preparing.corpus import prepare
from data.preparing.pieces import Piece, digest_of
from data.preparing.tokenizer_sample import sample_texts
from data.reading.raw_shards import CorpusConfig, CorpusError, group_shards, list_raw_shards
from data.reading.splits import SplitConfig
from data.shards.manifest import SPLITS, Manifest, read_manifest, write_manifest
from data.shards.manifest_table import FRAGMENT_DTYPES, Fragments
from data.shards.shards import read_fragment, read_fragment_documents
from data.tokens.tokenizer import Encoder, TokenizerConfig, load_tokenizer, train_tokenizer

WORDS = ("to", "be", "or", "not", "that", "is", "the", "question", "nobler", "mind", "slings", "arrows")
BOUNDARY = "<|endoftext|>"


def one_by_one(
    function: Callable[[Any, CorpusConfig], None], work: Sequence[Any], config: CorpusConfig
) -> Iterator[int]:
    """A fan-out in this process, in an order that nobody promised."""
    order = list(range(len(work)))
    random.Random(len(work)).shuffle(order)
    for index in order:
        function(work[index], config)
        yield index


def text_of(number: int) -> str:
    chosen = random.Random(number)
    return " ".join(chosen.choices(WORDS, k=chosen.randint(5, 60))) + f" {number}"


def put(store: Store, path: str, numbers: Sequence[int], prefix: str = "doc") -> None:
    lines = [json.dumps({"id": f"{prefix}/{number}", "text": text_of(number)}) for number in numbers]
    store.put(path, ("\n".join(lines) + "\n").encode())


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    fixed = train_tokenizer([text_of(number) for number in range(200)], TokenizerConfig(vocab_size=300))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(fixed.json)
    return str(path)


@pytest.fixture
def raw(tmp_path: Path) -> Store:
    """Four raw shards of 100 documents, each a piece of its own."""
    store = open_store(str(tmp_path / "raw"))
    for index, name in enumerate("abcd"):
        put(store, f"{name}.jsonl", range(100 * index, 100 * index + 100))
    return store


@pytest.fixture
def config(tmp_path: Path, raw: Store, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch) -> CorpusConfig:
    monkeypatch.setattr("data.reading.raw_shards.PIECE_BYTES", 1)
    return CorpusConfig(
        uri=raw.uri,
        prepared=str(tmp_path / "prepared"),
        fragment_tokens=512,
        splits=SplitConfig(validation=0.1, test=0.1),
        tokenizer=TokenizerConfig(path=tokenizer_path),
    )


def documents(config: CorpusConfig, manifest: Manifest, split: str) -> dict[str, tuple[int, ...]]:
    """Tokens by id of all documents of a split, as training reads them."""
    store, found = open_store(config.prepared), {}
    for index in manifest.select(split):
        ids, starts = read_fragment_documents(store, manifest, int(index))
        for name, tokens in zip(
            ids, np.split(read_fragment(store, manifest, int(index)), starts[1:]), strict=True
        ):
            assert name not in found
            found[name] = tuple(tokens.tolist())
    return found


def test_every_document_comes_out_once_in_one_split(config: CorpusConfig) -> None:
    manifest = prepare(config, fan_out=one_by_one)
    encoder = Encoder(load_tokenizer(open_store(config.prepared), manifest.tokenizer, BOUNDARY))
    expected = {f"doc/{n}": tuple(encoder.encode([text_of(n)])[0].tolist()) for n in range(400)}
    by_split = {split: documents(config, manifest, split) for split in SPLITS}
    assert sum(map(len, by_split.values())) == 400
    assert by_split["train"] | by_split["validation"] | by_split["test"] == expected
    assert all(by_split.values())
    summary = manifest.summary()["splits"]
    for split, found in by_split.items():
        assert summary[split]["corpus"]["documents"] == len(found)
        assert summary[split]["corpus"]["tokens"] == sum(map(len, found.values()))
        assert summary[split]["corpus"]["bytes"] == sum(len(text_of(int(name[4:]))) for name in found)


def test_preparing_again_does_nothing_and_names_the_same_manifest(config: CorpusConfig) -> None:
    assert existing_manifest(config) is None
    manifest = prepare(config, fan_out=one_by_one)
    found = existing_manifest(config)
    assert found is not None and found.digest == manifest.digest
    called: list[Any] = []
    again = prepare(config, fan_out=lambda *work: iter(called.append(work) or ()))
    assert again.digest == manifest.digest and not called
    assert read_manifest(open_store(config.prepared)).digest == manifest.digest


class _Counting:
    """Fans out one by one and notes which pieces of which pass were worked on."""

    def __init__(self) -> None:
        self.done: list[tuple[str, Any]] = []

    def __call__(
        self, function: Callable[[Any, CorpusConfig], None], work: Sequence[Any], config: CorpusConfig
    ) -> Iterator[int]:
        self.done += [(function.__name__, each) for each in work]
        return one_by_one(function, work, config)

    def tokenized(self) -> list[str]:
        return sorted(work.piece.shards[0].path for name, work in self.done if name == "tokenize")


def prepared_afresh(config: CorpusConfig, name: str) -> Manifest:
    return prepare(replace(config, prepared=f"{config.prepared}-{name}"), fan_out=one_by_one)


def test_a_shard_that_is_added_is_the_only_one_tokenized_and_the_result_is_a_fresh_one(
    config: CorpusConfig, raw: Store
) -> None:
    before = prepare(config, fan_out=one_by_one)
    put(raw, "e.jsonl", [*range(400, 450), *range(0, 20)])
    work = _Counting()
    after = prepare(config, fan_out=work)
    assert work.tokenized() == ["e.jsonl"]
    assert after.digest != before.digest
    assert after.digest == prepared_afresh(config, "fresh").digest
    assert sum(each["corpus"] for each in after.duplicates.values()) == 20


def test_a_duplicate_added_before_its_copy_takes_its_place_there_and_nowhere_else(
    config: CorpusConfig, raw: Store
) -> None:
    prepare(config, fan_out=one_by_one)
    put(raw, "a0.jsonl", [150, 160], prefix="copy")  # copies of documents in b.jsonl
    work = _Counting()
    after = prepare(config, fan_out=work)
    assert work.tokenized() == ["a0.jsonl", "b.jsonl"]
    found = {name for split in SPLITS for name in documents(config, after, split)}
    assert {"copy/150", "copy/160"} <= found and not {"doc/150", "doc/160"} & found
    assert after.digest == prepared_afresh(config, "fresh").digest
    raw.delete("a0.jsonl")
    assert prepare(config, fan_out=one_by_one).digest == prepared_afresh(config, "fresh-again").digest


def test_a_shard_changed_in_place_is_noticed(config: CorpusConfig, raw: Store) -> None:
    before = prepare(config, fan_out=one_by_one)
    put(raw, "b.jsonl", range(1_000, 1_100))
    assert existing_manifest(config) is None
    work = _Counting()
    after = prepare(config, fan_out=work)
    assert work.tokenized() == ["b.jsonl"] and after.digest != before.digest


def test_a_shard_changed_between_the_passes_stops_the_run(config: CorpusConfig, raw: Store) -> None:
    def meddling(
        function: Callable[[Any, CorpusConfig], None], work: Sequence[Any], config: CorpusConfig
    ) -> Iterator[int]:
        if function.__name__ == "tokenize":
            put(raw, "b.jsonl", range(1_000, 1_100))
        return one_by_one(function, work, config)

    with pytest.raises(CorpusError, match=r"b\.jsonl: changed while it was being prepared"):
        prepare(config, fan_out=meddling)
    assert prepare(config, fan_out=one_by_one).digest == prepared_afresh(config, "fresh").digest


def swap_ids(raw: Store, path: str, first: str, second: str) -> None:
    """Each of two documents gets the other's id; their texts stay where they are."""
    swapped = {first: second, second: first}
    records = [json.loads(line) for line in raw.read(path).splitlines()]
    lines = [json.dumps(record | {"id": swapped.get(record["id"], record["id"])}) for record in records]
    raw.put(path, ("\n".join(lines) + "\n").encode())


@pytest.mark.parametrize("tokenizer", ["given", "trained"])
def test_ids_that_are_swapped_after_the_survey_stop_the_run_and_no_test_text_is_trained_on(
    config: CorpusConfig, raw: Store, tokenizer: str
) -> None:
    config = replace(config, splits=SplitConfig(validation=0.1, test_documents=("doc/7",)))
    if tokenizer == "trained":  # on texts of the train split, before any piece is tokenized
        config = replace(config, tokenizer=TokenizerConfig(vocab_size=300))

    def swapping(
        function: Callable[[Any, CorpusConfig], None], work: Sequence[Any], config: CorpusConfig
    ) -> Iterator[int]:
        yield from one_by_one(function, work, config)
        if function.__name__ == "deduplicate":
            swap_ids(raw, "a.jsonl", "doc/7", "doc/8")

    with pytest.raises(CorpusError, match=r"a\.jsonl: changed while it was being prepared"):
        prepare(config, fan_out=swapping)
    manifest = prepare(config, fan_out=one_by_one)
    assert manifest.digest == prepared_afresh(config, "fresh").digest
    assert set(documents(config, manifest, "test")) == {"doc/7"}


def put_in_place(raw: Store, path: str, content: bytes) -> None:
    """As `cp -p` of a file of equal size and time: into the same inode, with the time that was there."""
    file = Path(raw.uri.removeprefix("file://")) / path
    before = file.stat()
    assert before.st_size == len(content)
    with file.open("r+b") as there:
        there.write(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_shard_replaced_by_one_of_equal_size_and_time_is_noticed(config: CorpusConfig, raw: Store) -> None:
    before = prepare(config, fan_out=one_by_one)
    put_in_place(raw, "b.jsonl", raw.read("b.jsonl").replace(b"doc/1", b"DOC/1"))
    assert existing_manifest(config) is None
    work = _Counting()
    after = prepare(config, fan_out=work)
    assert work.tokenized() == ["b.jsonl"] and after.digest != before.digest
    assert after.digest == prepared_afresh(config, "fresh").digest


def test_a_corpus_that_was_finished_before_files_told_their_last_change_stands_until_one_is_changed(
    config: CorpusConfig, raw: Store
) -> None:
    manifest, store = prepare(config, fan_out=one_by_one), open_store(config.prepared)
    shards, given = list_raw_shards(config), given_tokenizer(config)
    former = [replace(shard, version=former_version(shard.version)) for shard in shards]
    store.put(inputs_path(config, former, given), store.read(inputs_path(config, shards, given)))
    store.delete(inputs_path(config, shards, given))
    found = existing_manifest(config)
    assert found is not None and found.digest == manifest.digest
    put_in_place(raw, "b.jsonl", raw.read("b.jsonl").replace(b"doc/1", b"DOC/1"))
    assert existing_manifest(config) is None


def test_a_copy_of_a_corpus_is_hashed_and_not_tokenized_again(
    config: CorpusConfig, raw: Store, tmp_path: Path
) -> None:
    before = prepare(config, fan_out=one_by_one)
    shutil.copytree(
        tmp_path / "raw", tmp_path / "copy", copy_function=shutil.copy
    )  # other times, as a checkout's
    work = _Counting()
    after = prepare(replace(config, uri=str(tmp_path / "copy")), fan_out=work)
    assert [name for name, _ in work.done] == ["survey"] * 4 and after.digest == before.digest


def leave_as_before_surveys_pinned_ids(config: CorpusConfig) -> Manifest:
    """Prepare, and give the records the names and content that they had then: without pins, and without hashes."""
    work, store = _Counting(), open_store(config.prepared)
    before = prepare(config, fan_out=work)
    tokenizer = load_tokenizer(store, before.tokenizer, BOUNDARY)
    for each in [each for name, each in work.done if name == "tokenize"]:
        former, survey = each.piece.former_survey_digest(config), each.piece.survey_digest(config)
        encoding = (0, tokenizer.fingerprint, tokenizer.boundary_id, each.fragment_tokens)
        for kind, ours, theirs in (
            ("survey", survey, former),
            ("tokens", each.digest, digest_of("tokens", former, *encoding)),
        ):
            record = json.loads(store.read(record_path(kind, ours)))
            record.pop("pinned", None)
            del record[SEAL]
            for written in record["shards"] if kind == "tokens" else ():
                del written["fragments"]["blake2b"]
                del written["shard"]["footer_bytes"], written["shard"]["footer_blake2b"]
            store.put(record_path(kind, theirs), json.dumps(record).encode())
            store.delete(record_path(kind, ours))
    for inputs in store.list("pieces/inputs-"):
        store.delete(inputs.path)
    return before


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All texts that are tokenized."""
    texts, encode = list[str](), Encoder.encode

    def noting(self: Encoder, each: Sequence[str]) -> list[np.ndarray]:
        texts.extend(each)
        return encode(self, each)

    monkeypatch.setattr(Encoder, "encode", noting)
    return texts


def test_what_was_tokenized_before_surveys_pinned_ids_is_hashed_and_not_tokenized_again(
    config: CorpusConfig, raw: Store, encoded: list[str]
) -> None:
    leave_as_before_surveys_pinned_ids(config)
    put_in_place(raw, "b.jsonl", raw.read("b.jsonl").replace(b"nobler", b"NOBLER"))
    encoded.clear()
    work = _Counting()
    after = prepare(config, fan_out=work)
    assert [name for name, _ in work.done if name == "survey"] == ["survey"] * 4
    assert len(encoded) == 100 and all("NOBLER" in text for text in encoded if "obler" in text.lower())
    assert after.hashed and after.digest == prepared_afresh(config, "fresh").digest


@pytest.mark.parametrize("damage", ["altered", "lost"])
def test_a_token_shard_that_is_altered_before_it_has_hashes_is_made_again(
    config: CorpusConfig, encoded: list[str], damage: str
) -> None:
    before, store = leave_as_before_surveys_pinned_ids(config), open_store(config.prepared)
    path = before.shards[0].path
    whole = store.read(path)
    if damage == "lost":
        store.delete(path)
    else:
        store.put(path, whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    encoded.clear()
    after = prepare(config, fan_out=one_by_one)
    assert len(encoded) == 100 and after.digest == before.digest and store.read(path) == whole


def test_a_finished_corpus_without_hashes_stays_as_it_is_until_it_is_prepared_again(
    config: CorpusConfig,
) -> None:
    hashed, store = prepare(config, fan_out=one_by_one), open_store(config.prepared)
    shards = [replace(shard, footer_bytes=0, footer_blake2b="") for shard in hashed.shards]
    columns = {name: getattr(hashed.fragments, name) for name in FRAGMENT_DTYPES}
    old = replace(hashed, shards=tuple(shards), fragments=Fragments.from_columns(columns))
    write_manifest(store, old)
    (inputs,) = (each.path for each in store.list("pieces/inputs-"))
    store.put(inputs, json.dumps({"manifest": old.digest}).encode())
    assert len(old.digest) == 16 and old.digest != hashed.digest
    found = prepare(config, fan_out=one_by_one)
    assert (
        found.digest == old.digest
        and "CRC-32 alone" in found.weakness
        and "data/prepare.py" in found.weakness
    )
    assert np.array_equal(read_fragment(store, found, 0), read_fragment(store, hashed, 0))
    renewed = prepare(config, fan_out=one_by_one, renew=True)
    assert renewed.digest == hashed.digest and renewed.weakness is None
    assert existing_manifest(config).digest == hashed.digest
    assert read_manifest(store, old.digest).digest == old.digest, "a run that is pinned to it goes on"


def test_a_deleted_token_shard_is_made_again(config: CorpusConfig) -> None:
    store = open_store(config.prepared)
    before = prepare(config, fan_out=one_by_one)
    store.delete(before.shards[0].path)
    assert existing_manifest(config) is None
    work = _Counting()
    after = prepare(config, fan_out=work)
    assert after.digest == before.digest and len(work.tokenized()) == 1
    assert store.exists(before.shards[0].path)


KILLED = """
import json, os, signal, sys
from cluster.configuration.config import from_dict
from data.reading.raw_shards import CorpusConfig
import data.reading.raw_shards
from data.preparing.pieces import Piece
from data.prepare import prepare

data.reading.raw_shards.PIECE_BYTES = 1
settings, deaths = json.loads(sys.argv[1]), int(sys.argv[2])

def fan_out(function, work, config):
    global deaths
    for index, each in enumerate(work):
        function(each, config)
        deaths -= 1
        if deaths == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        yield index

print(prepare(from_dict(CorpusConfig, settings), fan_out=fan_out).digest)
"""


@pytest.mark.slow
def test_after_kill_9_at_any_piece_finished_pieces_stand_and_the_result_is_the_same(
    config: CorpusConfig,
) -> None:
    expected = prepared_afresh(config, "unbroken").digest
    store, written = open_store(config.prepared), dict[str, str]()
    settings_ = {
        "uri": config.uri,
        "prepared": config.prepared,
        "fragment_tokens": 512,
        "splits": {"validation": 0.1, "test": 0.1},
        "tokenizer": {"path": config.tokenizer.path},
    }
    # 4 surveys, 1 range of hashes, 4 pieces of tokens: dies twice in each pass, then within the last one.
    for pieces_before_death in (2, 1, 2, 1, 2, 0):
        run = subprocess.run(
            [sys.executable, "-c", KILLED, json.dumps(settings_), str(pieces_before_death)],
            cwd=PROJECT,
            capture_output=True,
            text=True,
        )
        assert run.returncode == (-signal.SIGKILL if pieces_before_death else 0), run.stderr
        now = {each.path: each.version for each in store.list("pieces/")}
        assert written.items() <= now.items()  # nothing was done again
        written = now
    assert run.stdout.strip() == expected
    assert read_manifest(store).digest == expected


def test_merging_the_hashes_of_many_pieces_changes_nothing(
    config: CorpusConfig, raw: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(raw, "e.jsonl", [*range(400, 450), *range(0, 20), *range(390, 400)])
    expected = prepared_afresh(config, "one-by-one")
    monkeypatch.setattr("data.preparing.assemble.FILES_PER_RANGE", 2)
    monkeypatch.setattr("data.preparing.assemble.DOCUMENTS_PER_RANGE", 150)  # in three ranges
    work = _Counting()
    assert prepare(config, fan_out=work).digest == expected.digest
    merged = [each.surveys for name, each in work.done if name == "merge"]
    assert sum(map(len, merged)) == 5 and max(map(len, merged)) <= 2
    assert sum(each["corpus"] for each in expected.duplicates.values()) == 30


def test_named_documents_judge_and_their_copies_are_not_trained(config: CorpusConfig, raw: Store) -> None:
    put(raw, "a0.jsonl", [310, 320], prefix="copy")
    named = SplitConfig(test_documents=("doc/31?", "doc/32?"), validation_shards=("c.*",))
    config = replace(config, splits=named)
    manifest = prepare(config, fan_out=one_by_one)
    assert set(documents(config, manifest, "test")) == {f"doc/{number}" for number in range(310, 330)}
    assert set(documents(config, manifest, "validation")) == {f"doc/{number}" for number in range(200, 300)}
    assert not {"copy/310", "copy/320"} & set(documents(config, manifest, "train"))
    assert manifest.duplicates["train"]["corpus"] == 2


def test_names_that_match_nothing_and_empty_splits_are_all_told(config: CorpusConfig) -> None:
    bad = SplitConfig(test_documents=("doc/1", "hamlet/*"), validation=1e-9)
    with pytest.raises(CorpusError) as raised:
        prepare(replace(config, splits=bad), fan_out=one_by_one)
    named, empty = str(raised.value).splitlines()
    assert "corpus.splits.test_documents" in named and "'hamlet/*'" in named
    assert "corpus.splits.validation=1e-09" in empty and "400 documents" in empty


def test_broken_records_are_set_aside_and_readable(config: CorpusConfig, raw: Store) -> None:
    raw.put("e.jsonl", b'{"text": "good one"}\n{"text": }\n{"txt": "x"}\n')
    manifest = prepare(config, fan_out=one_by_one)
    assert manifest.set_aside == {"corpus": 2}
    store = open_store(config.prepared)
    records = [
        json.loads(line) for each in store.list("set_aside/") for line in store.read(each.path).splitlines()
    ]
    assert [(record["source"], record["shard"], record["line"]) for record in records] == [
        ("corpus", "e.jsonl", 2),
        ("corpus", "e.jsonl", 3),
    ]
    assert "not JSON" in records[0]["reason"] and records[1]["raw"] == '{"txt": "x"}'


def test_more_broken_records_than_the_limit_stop_before_tokenizing(config: CorpusConfig, raw: Store) -> None:
    raw.put("e.jsonl", b'{"body": "x"}\n' * 50)
    work = _Counting()
    with pytest.raises(CorpusError, match=r"50 of 450 records.*set_aside_limit=0\.01.*e\.jsonl.*no 'text'"):
        prepare(config, fan_out=work)
    assert not work.tokenized()
    assert prepare(replace(config, set_aside_limit=0.2), fan_out=one_by_one).set_aside == {"corpus": 50}


def test_more_torn_shards_than_the_limit_stop_however_few_records_are_broken(
    config: CorpusConfig, raw: Store
) -> None:
    lines = "".join(json.dumps({"text": text_of(number)}) + "\n" for number in range(1_000, 1_400))
    whole = gzip.compress(lines.encode())
    raw.put("e.jsonl.gz", whole[: len(whole) // 2])
    work = _Counting()
    with pytest.raises(CorpusError) as raised:
        prepare(config, fan_out=work)
    [problem] = str(raised.value).splitlines()
    for part in (
        "1 of 5 raw shards",
        "corpus.set_aside_limit=0.01",
        "e.jsonl.gz",
        "cannot be read",
        "include",
    ):
        assert part in problem
    assert not work.tokenized()
    assert prepare(replace(config, set_aside_limit=0.2), fan_out=one_by_one).set_aside == {"corpus": 1}
    raw.put("e.jsonl.gz", whole)
    assert prepare(config, fan_out=one_by_one).set_aside == {"corpus": 0}


def test_texts_that_the_tokenizer_itself_empties_are_set_aside_or_one_error(
    config: CorpusConfig, raw: Store, tmp_path: Path
) -> None:
    bert = Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1}, unk_token="[UNK]"))
    bert.normalizer, bert.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    bert.save(path := str(tmp_path / "bert.json"))
    config = replace(config, tokenizer=TokenizerConfig(path=path, boundary="[SEP]"))
    raw.put("e.jsonl", json.dumps({"text": "\ufeff\u200b"}).encode())  # neither is white space
    assert prepare(config, fan_out=one_by_one).set_aside == {"corpus": 1}
    (path,) = (each.path for each in open_store(config.prepared).list("set_aside/"))
    kept = json.loads(open_store(config.prepared).read(path))
    assert (kept["shard"], kept["line"]) == ("e.jsonl", 1)
    assert kept["reason"] == "empty after the tokenizer's own normalisation"
    with pytest.raises(CorpusError, match=r"1 of 401 documents are empty after .* keeps these characters"):
        prepare(replace(config, set_aside_limit=0.001), fan_out=one_by_one)


def test_another_boundary_of_the_same_tokenizer_makes_other_shards(
    config: CorpusConfig, raw: Store, tmp_path: Path
) -> None:
    """Both stand in it as special tokens, so that its fingerprint is the same."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "<s>": 1, "</s>": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(path := str(tmp_path / "both.json"))
    fingerprints = set()
    for boundary, number in (("<s>", 1), ("</s>", 2)):
        given = replace(config, tokenizer=TokenizerConfig(path=path, boundary=boundary))
        manifest = prepare(given, fan_out=one_by_one)
        fingerprints.add(manifest.tokenizer)
        first = read_fragment(open_store(config.prepared), manifest, 0)[0]
        assert (manifest.boundary_id, first) == (number, number)
    assert len(fingerprints) == 1


def test_sources_are_counted_apart_and_deduplicated_together(
    config: CorpusConfig, raw: Store, tmp_path: Path
) -> None:
    other = open_store(str(tmp_path / "other"))
    put(other, "a.jsonl", [*range(50), *range(500, 550)], prefix="other")
    sources = replace(config, uri="", sources={"zeta": raw.uri, "alpha": other.uri})
    manifest = prepare(sources, fan_out=one_by_one)
    counted = {
        source: sum(split[source]["documents"] for split in manifest.summary()["splits"].values())
        for source in manifest.sources
    }
    assert counted == {"alpha": 100, "zeta": 350}
    assert sum(split["zeta"] for split in manifest.duplicates.values()) == 50


def test_a_trained_tokenizer_stays_when_shards_are_added(config: CorpusConfig, raw: Store) -> None:
    config = replace(config, tokenizer=TokenizerConfig(vocab_size=300))
    before = prepare(config, fan_out=one_by_one)
    assert before.digest == prepared_afresh(config, "same").digest
    put(raw, "e.jsonl", range(400, 500))
    work = _Counting()
    after = prepare(config, fan_out=work)
    assert after.tokenizer == before.tokenizer and work.tokenized() == ["e.jsonl"]


@pytest.mark.parametrize("sample_bytes", [2_000, 10_000, 10**9])
def test_the_tokenizer_sees_a_bounded_sample_of_train_texts_only(
    config: CorpusConfig, sample_bytes: int
) -> None:
    config = replace(config, tokenizer=replace(config.tokenizer, sample_bytes=sample_bytes))
    manifest = prepare(config, fan_out=one_by_one)
    train = {text_of(int(name[4:])) for name in documents(config, manifest, "train")}
    pieces = [Piece(group) for group in group_shards(list_raw_shards(config))]
    sizes = [
        sum(len(text) for text in train if 100 * index <= int(text.split()[-1]) < 100 * index + 100)
        for index in range(4)
    ]
    sample = list(sample_texts(pieces, sizes, config))
    total = sum(len(text.encode()) for text in sample)
    assert min(sum(sizes), sample_bytes) * 0.5 <= total <= sample_bytes
    assert all(any(text.startswith(part) for text in train) for part in sample)


def test_a_dry_run_says_that_temporary_files_cannot_be_written(
    config: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--corpus.uri", config.uri, "--corpus.prepared", config.prepared, "--dry-run"]
    main(arguments)
    assert "4 raw shards" in capsys.readouterr().out
    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}/absent")
    with pytest.raises(ConfigError, match="/absent: cannot write temporary files: .*TMPDIR"):
        main(arguments)


def test_progress_ends_at_the_whole_corpus(config: CorpusConfig, raw: Store) -> None:
    seen: dict[str, list[Any]] = {}
    prepare(config, lambda at: seen.setdefault(at.name, []).append(at), fan_out=one_by_one)
    size = sum(each.num_bytes for each in raw.list())
    assert list(seen) == ["survey", "duplicates", "tokens"]
    for name in ("survey", "tokens"):
        assert [at.done for at in seen[name]] == sorted(at.done for at in seen[name])
        assert (seen[name][-1].done, seen[name][-1].total, seen[name][-1].seconds_left) == (size, size, 0.0)


@pytest.mark.cluster
def test_ray_tasks_on_s3_give_the_manifest_of_one_process(
    ray_session: None, config: CorpusConfig, raw: Store, s3_uri: str
) -> None:
    expected = prepare(config, fan_out=one_by_one)
    bucket = open_store(s3_uri)
    for each in raw.list():
        bucket.put(f"raw/{each.path}", raw.read(each.path))
    on_s3 = replace(config, uri=f"{s3_uri}/raw", prepared=f"{s3_uri}/prepared")
    assert prepare(on_s3).digest == expected.digest
    assert existing_manifest(on_s3) is not None


@pytest.mark.cluster
def test_what_a_task_finds_wrong_reaches_the_caller_as_itself(
    ray_session: None, config: CorpusConfig, raw: Store
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"body": ["x"]}), sink)
    raw.put("e.parquet", sink.getvalue().to_pybytes())
    with pytest.raises(CorpusError, match=r"e\.parquet.*no 'text'.*corpus\.text_column"):
        prepare(config)
