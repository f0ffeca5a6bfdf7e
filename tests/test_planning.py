"""What is wrong with an objective on a corpus is said before a worker is started, in one line."""

from dataclasses import replace

import pytest

from cluster.configuration.config import load_config
from cluster.console.errors import ConfigError
from cluster.storage.uris import open_store
from data.tokens.tokenizer import fix_tokenizer
from tests.test_framing import PROSE, tokenizer
from tests.token_corpus import put_text_corpus, put_token_corpus
from trainers.planning.checks import (
    manifest_problems,
    objective_problems,
    place_problems,
    problems_before_start,
)
from trainers.pretraining.config import PretrainConfig, run_store
from trainers.pretraining.run_folder import MANIFEST

ENCODER = ("--model.attention", "bidirectional", "--batch.seq_len", "32")
PAIRS = (*ENCODER, "--model.pair_head", "true", "--model.num_token_types", "2")


def load(folder, kind: str, *arguments: str) -> PretrainConfig:
    given = [
        "--corpus.uri",
        f"{folder}/raw",
        "--corpus.prepared",
        f"{folder}/prepared",
        "--objective.kind",
        kind,
    ]
    return load_config(PretrainConfig, [*given, *arguments], description="").config


def found(folder, texts: list[str], kind: str, *arguments: str, fixed=None) -> list[str]:
    store = open_store(f"{folder}/prepared")
    manifest = put_text_corpus(store, {"train": texts}, fixed or tokenizer(), fragment_tokens=1_000)
    return list(objective_problems(load(folder, kind, *arguments), manifest))


@pytest.mark.parametrize("kind", ["masked_next_sentence", "masked_sentence_order"])
def test_documents_of_one_sentence_are_refused_for_pairs(kind, tmp_path):
    single = [f"Document {number} says only this and nothing else." for number in range(200)]
    [problem] = found(tmp_path, single, kind, *PAIRS)
    assert f"objective.kind={kind} finds no pair" in problem and "objective.kind=masked" in problem
    assert found(tmp_path, PROSE[:60], kind, *PAIRS) == []


def test_a_validation_split_without_pairs_is_refused_by_name(tmp_path):
    texts = {"train": PROSE[:60], "validation": ["This alone is said."] * 40}
    store = open_store(f"{tmp_path}/prepared")
    manifest = put_text_corpus(store, texts, tokenizer(), fragment_tokens=1_000)
    [problem] = objective_problems(load(tmp_path, "masked_next_sentence", *PAIRS), manifest)
    assert "of the validation split" in problem


def test_one_document_alone_is_refused_for_next_sentences_and_has_orders(tmp_path):
    one = ["It rains. We wait. " * 40]
    assert len(found(tmp_path, one, "masked_next_sentence", *PAIRS)) == 1
    assert found(tmp_path, one, "masked_sentence_order", *PAIRS) == []


@pytest.mark.parametrize(("kind", "arguments"), [("masked", ENCODER), ("mixed", ("--batch.seq_len", "32"))])
def test_a_tokenizer_without_mask_is_refused_by_name(kind, arguments, tmp_path):
    bare = fix_tokenizer(tokenizer().json.replace("[MASK]", "[XXXX]"), "given", "<|endoftext|>")
    [problem] = found(tmp_path, PROSE[:60], kind, *arguments, fixed=bare)
    assert f"objective.kind={kind} needs a tokenizer with [MASK]" in problem
    path = tmp_path / "tokenizer.json"
    path.write_text(bare.json)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text('{"text": "Some words."}\n')
    config = load(tmp_path, kind, *arguments, "--corpus.tokenizer.path", str(path))
    config = replace(config, run=replace(config.run, storage=str(tmp_path / "runs")))
    assert [line for line in problems_before_start(config) if "[MASK]" in line] == [problem]


def test_a_causal_run_asks_nothing_of_the_tokenizer(tmp_path):
    bare = fix_tokenizer(tokenizer().json.replace("[MASK]", "[XXXX]"), "given", "<|endoftext|>")
    assert found(tmp_path, PROSE[:60], "causal", fixed=bare) == []


@pytest.mark.parametrize(
    ("kind", "arguments", "named"),
    [
        ("masked", (), ["objective.kind=masked needs model.attention=bidirectional"]),
        ("mixed", ENCODER, ["objective.kind=mixed needs model.attention=causal"]),
        ("causal", ENCODER, ["objective.kind=causal needs model.attention=causal"]),
        ("masked", (*ENCODER, "--model.pair_head", "true"), ["set model.pair_head=false"]),
        ("masked_next_sentence", ENCODER, ["set model.pair_head=true", "model.num_token_types=0 must be 2"]),
        ("masked", (*ENCODER, "--objective.mask_rate", "0"), ["objective.mask_rate=0.0 must be above 0"]),
        (
            "masked",
            (*ENCODER, "--objective.mask_rate", "1"),
            ["objective.mask_rate=1.0 must be above 0 and below 1"],
        ),
        ("masked", (*ENCODER, "--batch.seq_len", "5"), ["batch.seq_len=5 is too short"]),
    ],
)
def test_objective_and_shape_that_do_not_go_together_are_named(kind, arguments, named, tmp_path):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, kind, *arguments)
    assert len(error.value.problems) == len(named)
    assert all(part in str(error.value) for part in named), str(error.value)


def corpus_of(folder, **num_fragments: int):
    sizes = {(split, "web"): number for split, number in num_fragments.items()}
    return put_token_corpus(open_store(f"{folder}/prepared"), sizes, fragment_tokens=400)


DECODER = ("--batch.seq_len", "16", "--batch.rows_per_step", "8", "--order.lanes", "4")


@pytest.mark.parametrize("missing", ["validation", "test"])
def test_an_empty_split_is_named_before_a_worker_needs_it(missing, tmp_path):
    splits = {"train": 8, "validation": 1, "test": 1} | {missing: 0}
    [problem] = manifest_problems(load(tmp_path, "causal", *DECODER), corpus_of(tmp_path, **splits))
    assert f"{missing} split" in problem and f"corpus.splits.{missing}" in problem


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--order.lanes", "4096", "--batch.rows_per_step", "4096"), "for 4096 lanes"),
        (("--model.vocab_size", "3"), "model.vocab_size=3"),
    ],
)
def test_what_does_not_fit_the_prepared_corpus_is_named_before_a_worker_is_started(
    arguments, named, tmp_path
):
    manifest = corpus_of(tmp_path, train=8, validation=1, test=1)
    assert list(manifest_problems(load(tmp_path, "causal", *DECODER), manifest)) == []
    [problem] = manifest_problems(load(tmp_path, "causal", *DECODER, *arguments), manifest)
    assert named in problem


def test_a_relative_path_is_refused_on_a_cluster_and_a_place_of_no_store_anywhere(tmp_path):
    config = load(tmp_path, "causal")
    shared = replace(config, run=replace(config.run, storage=f"{tmp_path}/runs"))
    elsewhere = replace(shared, run=replace(shared.run, storage="runs"))
    on_cluster = replace(elsewhere.cluster, address="10.0.0.1:6379")
    assert list(place_problems(elsewhere)) == []
    assert list(place_problems(replace(shared, cluster=on_cluster))) == []
    [problem] = place_problems(replace(elsewhere, cluster=on_cluster))
    assert "run.storage=runs" in problem
    [problem] = place_problems(replace(shared, run=replace(shared.run, storage="http://host/runs")))
    assert "run.storage" in problem


def test_a_run_that_was_started_needs_no_raw_corpus_any_more(tmp_path):
    config = load(tmp_path, "causal")
    config = replace(config, run=replace(config.run, storage=f"{tmp_path}/runs"))
    assert any(f"{tmp_path}/raw" in problem for problem in problems_before_start(config))
    run_store(config).put(MANIFEST, b'{"digest": "0123456789abcdef"}')
    assert list(problems_before_start(config)) == []
