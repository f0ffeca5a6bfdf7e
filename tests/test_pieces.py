"""Laws of a piece of work: its name follows from what changes its result, and from nothing else."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.storage.uris import open_store
from data.preparing.assemble import inputs_path
from data.preparing.pieces import OTHER_REASONS, REASONS_COUNTED, Piece, digest_of, record_path, survey
from data.reading.raw_shards import CorpusConfig, RawShard
from data.reading.splits import SplitConfig
from data.tokens.tokenizer import TokenizerConfig

PIECE = Piece((RawShard("web", "a.jsonl", 10, "v1"), RawShard("web", "b.jsonl", 20, "v1")))
CONFIG = CorpusConfig(uri="raw", prepared="prepared")


@pytest.mark.parametrize(
    "changed",
    [
        replace(CONFIG, text_column="body"),
        replace(CONFIG, id_column="name"),
        replace(CONFIG, normalization="NFKC"),
        replace(CONFIG, max_record_bytes=4_096),
        replace(CONFIG, splits=SplitConfig(test=0.5)),
    ],
)
def test_a_survey_of_texts_that_are_read_otherwise_has_another_name(changed):
    assert PIECE.survey_digest(changed) != PIECE.survey_digest(CONFIG)


@pytest.mark.parametrize(
    "change", [{"version": "v2"}, {"path": "c.jsonl"}, {"num_bytes": 11}, {"source": "books"}]
)
def test_a_survey_of_another_shard_has_another_name(change):
    first, *others = PIECE.shards
    assert Piece((replace(first, **change), *others)).survey_digest(CONFIG) != PIECE.survey_digest(CONFIG)


@pytest.mark.parametrize(
    "changed",
    [
        replace(CONFIG, uri="elsewhere"),
        replace(CONFIG, prepared="elsewhere"),
        replace(CONFIG, cpus_per_piece=0.5),
        replace(CONFIG, tokenizer=TokenizerConfig(vocab_size=300)),
        replace(CONFIG, fragment_tokens=512),
    ],
)
def test_what_a_survey_does_not_read_changes_its_name_in_nothing(changed):
    assert PIECE.survey_digest(changed) == PIECE.survey_digest(CONFIG)


def test_the_names_of_finished_pieces_never_change():
    # A change here prepares every corpus anew that was ever prepared: raise FORMAT if that is meant.
    assert PIECE.survey_digest(CONFIG) == SURVEY
    assert PIECE.former_survey_digest(CONFIG) == FORMER_SURVEY
    assert digest_of("tokens", "a", 1) == TOKENS
    assert inputs_path(CONFIG, PIECE.shards, None) == record_path("inputs", INPUTS)


def test_a_survey_done_twice_writes_the_same_bytes_and_its_record_last(tmp_path):
    raw = open_store(f"{tmp_path}/raw")
    raw.put("a.jsonl", b'{"id": "x", "text": "one"}\n{"id": "y", "text": "two"}\n{"no": "text"}\n')
    piece = Piece((RawShard("corpus", "a.jsonl", 80, "v1"),))
    written = []
    for name in ("first", "second"):
        config = CorpusConfig(uri=raw.uri, prepared=f"{tmp_path}/{name}")
        survey(piece, config)
        store = open_store(config.prepared)
        written.append({info.path: store.read(info.path) for info in store.list()})
        newest = max(store.list(), key=lambda info: int(info.version.split("-")[0]))
        assert newest.path == record_path("survey", piece.survey_digest(config))
    assert written[0] == written[1] and len(written[0]) == 3


def surveyed(folder: Path, lines: list[bytes]) -> dict[str, Any]:
    """The record of a shard of these lines."""
    raw, config = (
        open_store(f"{folder}/raw"),
        CorpusConfig(uri=f"{folder}/raw", prepared=f"{folder}/prepared"),
    )
    raw.put("a.jsonl", b"\n".join(lines))
    piece = Piece((RawShard("corpus", "a.jsonl", 1, "v1"),))
    survey(piece, config)
    return json.loads(open_store(config.prepared).read(record_path("survey", piece.survey_digest(config))))


def test_equal_mistakes_at_other_places_are_one_reason(tmp_path):
    not_json = [b'{"text": ' + b" " * number for number in range(50)]
    not_utf8 = [b'{"text": "' + b"x" * number + b'\xff"}' for number in range(30)]
    assert surveyed(tmp_path, not_json + not_utf8)["reasons"] == {
        "not JSON: Expecting value": 50,
        "invalid UTF-8": 30,
    }


def test_a_record_holds_a_bounded_number_of_reasons_that_count_every_broken_record(tmp_path):
    record = surveyed(tmp_path, [b'{"field %d": "x"}' % (number % 150) for number in range(450)])
    assert record["set_aside"] == sum(record["reasons"].values()) == 450
    assert len(record["reasons"]) == REASONS_COUNTED + 1
    assert record["reasons"][OTHER_REASONS] == 3 * (150 - REASONS_COUNTED)


SURVEY, FORMER_SURVEY, TOKENS = "03f56e5421fd106d", "1f59bafeac1627b7", "642eb5dfb4a2132b"
INPUTS = "692d27f735ce50b0"
