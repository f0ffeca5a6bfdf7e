"""Laws of the tokenizer: nothing is lost, text yields no special token, equal samples give equal tokenizers."""

import json
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from cluster.sessions.session import PROJECT
from cluster.storage.uris import open_store
from data.tokens.tokenizer import (
    ALPHABET_COVERAGE,
    SPECIAL_TOKENS,
    Encoder,
    FixedTokenizer,
    SpecialIds,
    TokenizerConfig,
    TokenizerError,
    alphabet,
    cut,
    fix_tokenizer,
    load_tokenizer,
    read_tokenizer,
    special_ids,
    tokenizer_path,
    train_tokenizer,
)

SAMPLE = [
    f"the {word} of {other}, 'tis {word}ly {word}ed; 十二 {other}s\n" * 3
    for word in ["love", "hate", "time", "king", "queen", "night", "storm", "crown"]
    for other in ["Denmark", "Scotland", "Venice", "Verona", "Athens"]
]
BPE = TokenizerConfig(vocab_size=340)
WORDPIECE = TokenizerConfig(kind="wordpiece", vocab_size=100, lowercase=True)


@pytest.fixture(scope="module")
def bpe() -> FixedTokenizer:
    return train_tokenizer(SAMPLE, BPE)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(codec="utf-8")))
def test_bpe_loses_no_character_of_any_text(bpe: FixedTokenizer, text: str) -> None:
    [tokens] = Encoder(bpe).encode([text])
    assert tokens[0] == bpe.boundary_id
    assert Tokenizer.from_str(bpe.json).decode(tokens[1:].tolist(), skip_special_tokens=False) == text


@pytest.mark.parametrize("config", [BPE, WORDPIECE], ids=["bpe", "wordpiece"])
def test_text_never_yields_a_special_token(config: TokenizerConfig) -> None:
    fixed = train_tokenizer(SAMPLE, config)
    specials = [config.boundary, *SPECIAL_TOKENS]
    vocabulary = Tokenizer.from_str(fixed.json)
    ids = {vocabulary.token_to_id(special) for special in specials if special != "[UNK]"}
    assert vocabulary.token_to_id(config.boundary) == fixed.boundary_id == 0
    [tokens] = Encoder(fixed).encode([" ".join(specials) + "".join(specials) + "love"])
    assert ids.isdisjoint(tokens[1:].tolist())


@pytest.mark.parametrize("config", [BPE, WORDPIECE], ids=["bpe", "wordpiece"])
def test_training_again_in_another_process_gives_the_same_tokenizer(config: TokenizerConfig) -> None:
    program = (
        "import json, sys; from data.tokens.tokenizer import TokenizerConfig, train_tokenizer\n"
        "given = json.load(sys.stdin)\n"
        "print(train_tokenizer(given['sample'], TokenizerConfig(**given['config'])).fingerprint)"
    )
    given_ = {
        "sample": SAMPLE,
        "config": {"kind": config.kind, "vocab_size": config.vocab_size, "lowercase": config.lowercase},
    }
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps(given_),
            cwd=PROJECT,
            text=True,
            check=True,
            capture_output=True,
        ).stdout.strip()
        for _ in range(2)
    }
    assert found == {train_tokenizer(SAMPLE, config).fingerprint}


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["love", "the", " ", "\n", "\n\n", "'tis", "十二", "é", "!", "\t"]), max_size=80
    ),
    characters=st.integers(20, 60),
)
def test_cutting_a_text_between_words_changes_no_token(
    bpe: FixedTokenizer, words: list[str], characters: int
) -> None:
    text = " ".join(words)
    parts = cut(text, characters)
    assert "".join(parts) == text
    assert all(len(part) <= characters for part in parts)
    if all(
        after.startswith(" ") and not after[1:2].isspace() and not before[-1].isspace()
        for before, after in zip(parts, parts[1:], strict=False)
    ):
        encoder = Encoder(bpe)
        [whole] = encoder.encode([text])
        joined = np.concatenate([tokens[1:] for tokens in encoder.encode(parts)])
        assert np.array_equal(whole[1:], joined)


def test_a_text_without_blanks_is_cut_at_characters() -> None:
    assert [len(part) for part in cut("界" * 100, 30)] == [30, 30, 30, 10]
    assert cut("", 30) == [""]


def test_fixing_a_tokenizer_again_changes_nothing(bpe: FixedTokenizer) -> None:
    assert fix_tokenizer(bpe.json, "here", BPE.boundary) == bpe


def test_a_given_tokenizer_gets_a_boundary_and_loses_truncation() -> None:
    given_ = Tokenizer.from_str(train_tokenizer(SAMPLE, BPE).json)
    given_.enable_truncation(4)
    given_.enable_padding(length=50)
    fixed = fix_tokenizer(given_.to_str(), "here", "<s>")
    assert (fixed.boundary_id, fixed.vocab_size) == (340, 341)
    [tokens] = Encoder(fixed).encode(["the love of Denmark, the love of Verona"])
    assert 4 < len(tokens) < 50
    assert tokens[0] == 340


def test_ids_above_65535_take_32_bits() -> None:
    words = {f"w{number}": number for number in range(2**16)}
    at_most = fix_tokenizer(Tokenizer(models.WordLevel(words, unk_token="w0")).to_str(), "here", "w1")
    assert (at_most.vocab_size, at_most.token_dtype) == (2**16, "uint16")
    above = fix_tokenizer(at_most.json, "here", "<|endoftext|>")
    assert (above.vocab_size, above.token_dtype) == (2**16 + 1, "uint32")
    assert Encoder(above).encode([""])[0].tolist() == [2**16]


def test_what_is_no_tokenizer_is_refused_by_name() -> None:
    with pytest.raises(TokenizerError, match=r"s3://x/tokenizer\.json is not a readable"):
        fix_tokenizer('{"version": 1}', "s3://x/tokenizer.json", BPE.boundary)


def test_a_vocabulary_that_the_sample_cannot_fill_is_refused_with_the_nearest() -> None:
    with pytest.raises(TokenizerError, match=r"corpus\.tokenizer\.vocab_size=5,000.*nearest: \d+"):
        train_tokenizer(["too little text"], TokenizerConfig(vocab_size=5_000))


def test_an_altered_tokenizer_is_refused(tmp_path: Path, bpe: FixedTokenizer) -> None:
    store = open_store(str(tmp_path))
    store.put(tokenizer_path(bpe.fingerprint), bpe.json.encode())
    assert load_tokenizer(store, bpe.fingerprint, BPE.boundary) == bpe
    store.put(
        tokenizer_path(bpe.fingerprint), bpe.json.replace('"love"', '"hate!"').replace("Ġt", "Ġz").encode()
    )
    with pytest.raises(TokenizerError, match=bpe.fingerprint):
        load_tokenizer(store, bpe.fingerprint, BPE.boundary)
    with pytest.raises(TokenizerError, match=f"{bpe.fingerprint}.*altered"):
        read_tokenizer(store, bpe.fingerprint)


def test_no_module_reads_a_tokenizer_past_its_check() -> None:
    sources = [path for top in ("data", "trainers", "tune") for path in (PROJECT / top).rglob("*.py")]
    unchecked = re.compile(r"\.read\(\s*tokenizer_path\(")
    found = [str(path) for path in sources if unchecked.search(path.read_text())]
    assert found == [], f"use data.tokens.tokenizer.read_tokenizer in {found}"


@pytest.mark.parametrize("config", [BPE, WORDPIECE], ids=["bpe", "wordpiece"])
def test_a_trained_tokenizer_has_every_special_token(config: TokenizerConfig) -> None:
    found = special_ids(train_tokenizer(SAMPLE, config).json.encode())
    assert found == SpecialIds(boundary=0, pad=1, cls=3, sep=4, mask=5)


def test_a_special_token_that_a_tokenizer_lacks_is_none() -> None:
    given_ = fix_tokenizer(
        Tokenizer(models.WordLevel({"w": 0, "<mask>": 1}, unk_token="w")).to_str(), "here", "|"
    )
    assert special_ids(given_.json.encode(), "|") == SpecialIds(
        boundary=2, pad=None, cls=None, sep=None, mask=1
    )


HAN = "十二的一是在了人我有他这中大来上为个国。，！？“”"


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from(HAN), max_size=60))
def test_wordpiece_gives_chinese_back_as_it_was(text: str) -> None:
    tokenizer = chinese_wordpiece()
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert encoding.tokens == list(text)
    assert tokenizer.decode(encoding.ids) == text


@cache
def chinese_wordpiece() -> Tokenizer:
    config = TokenizerConfig(kind="wordpiece", vocab_size=60)
    return Tokenizer.from_str(train_tokenizer([HAN + " of kingdoms and kings and gold"] * 5, config).json)


@given(st.dictionaries(st.characters(categories=["L", "P"]), st.integers(1, 10_000)), st.integers(0, 50))
def test_the_alphabet_is_the_commonest_characters_that_cover_the_text(
    counts: dict[str, int], most: int
) -> None:
    kept = alphabet(Counter(counts), most)
    left = counts.keys() - set(kept)
    assert len(kept) <= most
    assert (
        min((counts[each] for each in kept), default=0) >= max((counts[each] for each in left), default=0)
        or not kept
    )
    if len(kept) < most and counts:
        covered = [
            sum(counts[each] for each in kept[:size]) / sum(counts.values())
            for size in (len(kept), len(kept) - 1)
        ]
        assert covered[0] >= ALPHABET_COVERAGE > covered[1]
