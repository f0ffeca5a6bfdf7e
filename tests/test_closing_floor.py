"""Laws of the floor: its bits per byte are of what the model predicts, over the bytes that the model's are over."""

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.configuration.config import load_config
from cluster.storage.uris import open_store
from data.tokens.ngram import MAX_ORDER, fit
from data.tokens.tokenizer import FixedTokenizer, TokenizerConfig, train_tokenizer
from tests.token_corpus import put_text_corpus
from trainers.pretraining.closing import UNCHOSEN_ORDER, write_floor
from trainers.pretraining.config import PretrainConfig, run_store

WORDS = (
    "to",
    "be",
    "or",
    "not",
    "that",
    "is",
    "the",
    "question",
    "nobler",
    "mind",
    "slings",
    "arrows",
    "今天",
    "好",
)


def sentences(number: int, seed: int) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(5, 40))) for _ in range(number)]


SPLITS = {"train": sentences(200, 0), "validation": sentences(20, 1), "test": sentences(20, 2)}


def floor_of(
    folder: Path, texts: Mapping[str, Sequence[str]], tokenizer: FixedTokenizer
) -> tuple[dict[str, Any], dict[str, int]]:
    """The floor of a run on these texts, and the bytes of each split."""
    corpus = open_store(str(folder / "prepared"))
    manifest = put_text_corpus(corpus, texts, tokenizer, fragment_tokens=10**6)
    arguments = ["--corpus.uri", "raw", "--corpus.prepared", corpus.uri, "--run.storage", str(folder)]
    config = load_config(PretrainConfig, [*arguments, "--run.name", "floor"], description="").config
    write_floor(run := run_store(config), config, manifest)
    splits = manifest.summary()["splits"]
    return json.loads(run.read("floor.json")), {split: splits[split]["text"]["bytes"] for split in texts}


@pytest.fixture(scope="module")
def bpe() -> FixedTokenizer:
    return train_tokenizer(SPLITS["train"], TokenizerConfig(vocab_size=300))


@pytest.fixture(scope="module")
def wordpiece() -> FixedTokenizer:
    return train_tokenizer(SPLITS["train"], TokenizerConfig(kind="wordpiece", vocab_size=70))


def test_the_floor_of_byte_level_tokens_is_that_of_the_original_text(tmp_path, bpe):
    odd = {**SPLITS, "test": [*SPLITS["test"], "two  blanks ", "☕ [UNK] <|endoftext|>"]}
    floor, _ = floor_of(tmp_path, odd, bpe)
    model = fit(["".join(SPLITS["train"]).encode()], floor["order"])
    assert floor["fitted_bytes"] == model.num_bytes
    for split in ("validation", "test"):
        original = "".join(odd[split]).encode()
        assert floor[split] == pytest.approx(model.bits([original]) / len(original), rel=1e-12)


def text_of_codes(number: int, seed: int) -> list[str]:
    """Texts whose next letter the three before it tell, so that order 4 is the best."""
    letters, chosen = random.Random(0), random.Random(seed)
    told = {"".join(before): letters.choice("abcd") for before in itertools.product("abcd", repeat=3)}
    texts = []
    for _ in range(number):
        text = "".join(chosen.choices("abcd", k=3))
        while len(text) < 300:
            text += told[text[-3:]] if chosen.random() < 0.7 else chosen.choice("abcd")
        texts.append(text)
    return texts


def test_validation_chooses_the_order_and_the_test_split_is_scored_by_it(tmp_path, bpe):
    train, scrambled = text_of_codes(200, seed=5), random.Random(7)
    splits = {
        "train": train,
        "validation": text_of_codes(20, seed=6),
        "test": ["".join(scrambled.choices("abcd", k=300)) for _ in range(20)],
    }
    floor, _ = floor_of(tmp_path, splits, bpe)
    models = [fit(["".join(train).encode()], order) for order in range(1, MAX_ORDER + 1)]
    found = {}
    for split in ("validation", "test"):
        text = "".join(splits[split]).encode()
        found[split] = [model.bits([text]) / len(text) for model in models]
    assert floor["validation_by_order"] == pytest.approx(found["validation"], rel=1e-12)
    assert floor["order"] == 4 == 1 + min(range(MAX_ORDER), key=found["validation"].__getitem__)
    assert floor["order"] != 1 + min(range(MAX_ORDER), key=found["test"].__getitem__)
    assert [floor[split] for split in found] == pytest.approx([scores[3] for scores in found.values()])


def test_without_a_validation_split_the_order_is_fixed(tmp_path, bpe):
    floor, _ = floor_of(tmp_path, {name: SPLITS[name] for name in ("train", "test")}, bpe)
    assert floor["order"] == UNCHOSEN_ORDER and "validation" not in floor and floor["test"] > 0


def test_blanks_that_the_tokens_do_not_tell_cost_no_bits_and_count_as_bytes(tmp_path, wordpiece):
    spread = {**SPLITS, "test": [text.replace(" ", "   ") for text in SPLITS["test"]]}
    floor, num_bytes = floor_of(tmp_path / "close", SPLITS, wordpiece)
    of_spread, more_bytes = floor_of(tmp_path / "spread", spread, wordpiece)
    assert more_bytes["test"] > 1.3 * num_bytes["test"]
    assert of_spread["test"] * more_bytes["test"] == pytest.approx(floor["test"] * num_bytes["test"])
    assert of_spread["validation"] == floor["validation"]


def test_each_unknown_word_costs_bits(tmp_path, wordpiece):
    unknown = {**SPLITS, "test": [text.replace("nobler", "☕☕☕☕") for text in SPLITS["test"]]}
    without = {**SPLITS, "test": [text.replace("nobler", "") for text in SPLITS["test"]]}
    with_unknown, num_bytes = floor_of(tmp_path / "unknown", unknown, wordpiece)
    with_none, fewer_bytes = floor_of(tmp_path / "none", without, wordpiece)
    words = sum(text.count("nobler") for text in SPLITS["test"])
    bits = with_unknown["test"] * num_bytes["test"] - with_none["test"] * fewer_bytes["test"]
    assert bits > 8 * words > 0  # never seen in training: at least its first byte is a surprise


def test_a_part_of_a_large_split_is_scored_over_its_own_bytes(tmp_path, monkeypatch, wordpiece):
    alike = {**SPLITS, "test": [SPLITS["test"][0].replace(" ", "  ")] * 200}
    whole, _ = floor_of(tmp_path / "whole", alike, wordpiece)
    monkeypatch.setattr("trainers.pretraining.closing.FLOOR_SCORED_BYTES", 5_000)
    part, _ = floor_of(tmp_path / "part", alike, wordpiece)
    assert part["test"] == pytest.approx(whole["test"], rel=0.05)
