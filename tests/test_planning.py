"""What is wrong with an objective on a corpus is said before a worker is started, in one line."""

from dataclasses import replace

import pytest

from cluster.config import ConfigError, load_config
from cluster.storage import open_store
from data.tokens import fix_tokenizer
from tests.test_framing import PROSE, tokenizer
from tests.token_corpus import put_text_corpus
from trainers.config import PretrainConfig
from trainers.planning import objective_problems, problems_before_start

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


def test_one_document_alone_is_refused_for_next_sentences_and_has_orders(tmp_path):
    one = [" ".join(PROSE[:4])]
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
