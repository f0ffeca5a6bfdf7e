"""Which tokens are hidden: rates, whole words, and that a row's mask is the row's alone."""

from functools import cache
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data.order.epochs import Rows
from data.rows.masking import Masking, row_keys
from data.tokens.tokenizer import TokenizerConfig, special_ids, train_tokenizer
from data.tokens.vocabulary import Vocabulary
from data.tokens.words import Words

ENGLISH = topics["numeric-types"] + topics["assert"] + topics["for"] + topics["class"] + topics["lambda"]
CHINESE = "今天天气真好，我们去公园吧。自然语言处理是人工智能的重要方向。" * 40


@cache
def tokenizer_json(kind: str = "wordpiece", text: str = ENGLISH) -> bytes:
    return train_tokenizer([text], TokenizerConfig(kind=kind, vocab_size=300)).json.encode()


def masking(kind: str = "word", tokenizer: bytes | None = None, **settings) -> Masking:
    serialised = tokenizer or tokenizer_json()
    ids = special_ids(serialised)
    return Masking(
        words=Words.from_tokenizer(serialised, kind),
        special=Vocabulary.from_tokenizer(serialised).special,
        boundary_id=ids.boundary,
        mask_id=ids.mask,
        **settings,
    )


def rows_of(count: int, epoch: int = 0) -> Rows:
    number = np.arange(count)
    return Rows(number * 0, number * 0 + epoch, number // 7, number % 7, number * 0)


def random_tokens(rows: int, positions: int, special_share: float = 0.05, seed: int = 0) -> np.ndarray:
    """Random pieces of words with some special tokens among them."""
    random, special = np.random.default_rng(seed), Vocabulary.from_tokenizer(tokenizer_json()).special
    usual = random.choice(np.flatnonzero(~special), (rows, positions))
    return np.where(random.random(usual.shape) < special_share, random.choice(np.flatnonzero(special)), usual)


def test_fifteen_in_a_hundred_tokens_are_targets_and_eighty_ten_ten_of_them_fare_as_in_bert():
    rule, tokens = masking(), random_tokens(2_000, 128)
    found = rule.mask(tokens, row_keys("mask", 0, rows_of(len(tokens))))
    eligible = ~rule.special[tokens]
    assert found.weights.sum() / eligible.sum() == pytest.approx(0.15, abs=0.002)
    real = found.weights > 0
    shown = np.take_along_axis(found.tokens, found.slots, axis=1)[real]
    num_targets = real.sum()
    # Three standard deviations of a binomial share.
    spread = 3 * np.sqrt(0.1 * 0.9 / num_targets)
    assert (shown == rule.mask_id).mean() == pytest.approx(0.8, abs=2 * spread)
    vocabulary = (~rule.special).sum()
    assert (shown == found.targets[real]).mean() == pytest.approx(0.1 + 0.1 / vocabulary, abs=spread)
    replaced = shown[(shown != rule.mask_id) & (shown != found.targets[real])]
    # Every usual token comes in another's place, and about equally often.
    counts = np.bincount(replaced, minlength=len(rule.special))[~rule.special]
    assert counts.min() > 0 and counts.max() < 3 * counts.mean()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 70), st.floats(0.01, 0.99), st.floats(0, 1), st.integers(0, 2**32),
    st.sampled_from(["token", "word"]),
)  # fmt: skip
def test_no_special_token_is_a_target_every_row_has_one_and_all_else_stays(
    rows, positions, rate, special_share, seed, kind
):
    rule, tokens = masking(kind, rate=rate), random_tokens(rows, positions, special_share, seed)
    found = rule.mask(tokens, row_keys("mask", seed, rows_of(rows)))
    real = found.weights > 0
    assert found.slots.shape == (rows, rule.num_slots(positions)), (
        "the shape follows from rate and length alone"
    )
    eligible = ~rule.special[tokens]
    assert not rule.special[found.targets[real]].any()
    assert np.array_equal(real.any(axis=1), eligible.any(axis=1))
    assert (real.sum(axis=1) <= np.maximum(1, np.floor(rate * eligible.sum(axis=1) + 0.5))).all()
    hidden = np.zeros_like(eligible)
    row, place = np.nonzero(real)
    hidden[row, found.slots[row, place]] = True
    assert hidden.sum() == real.sum(), "no position is a target twice"
    assert np.array_equal(found.tokens[~hidden], tokens[~hidden])
    assert np.array_equal(np.take_along_axis(tokens, found.slots, axis=1)[real], found.targets[real])
    put_in = found.tokens[hidden]
    assert not rule.special[put_in[put_in != rule.mask_id]].any()


@pytest.mark.parametrize("kind", ["token", "word", "chinese"])
def test_a_row_is_masked_alike_alone_and_among_any_others(kind):
    """Law L1: who trains a row, and with which others, changes nothing."""
    serialised = tokenizer_json("bpe", CHINESE)
    rule = masking(kind, serialised)
    random = np.random.default_rng(1)
    tokens = random.choice(np.flatnonzero(~rule.special), (24, 40))
    rows = rows_of(24)
    together = rule.mask(tokens, row_keys("mask", 3, rows))
    for workers in (1, 2, 3, 5):
        order = random.permutation(24)
        for share in np.array_split(order, workers):
            found = rule.mask(tokens[share], row_keys("mask", 3, rows[share]))
            for ours, theirs in zip(found, together, strict=True):
                assert np.array_equal(ours, theirs[share])


def test_masks_change_with_epoch_and_seed():
    rule, tokens = masking(), random_tokens(50, 64)
    first, next_epoch, other_seed = (
        rule.mask(tokens, row_keys("mask", seed, rows_of(50, epoch))).slots
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    )
    assert (first != next_epoch).any(axis=1).all() and (first != other_seed).any(axis=1).all()


def test_over_many_epochs_every_position_is_hidden_equally_often():
    rule, tokens = masking("token"), random_tokens(1, 20, special_share=0)
    times = np.zeros(20)
    for epoch in range(2_000):
        found = rule.mask(tokens, row_keys("mask", 0, rows_of(1, epoch)))
        times[found.slots[0][found.weights[0] > 0]] += 1
    share = 3 / 20  # 15 % of 20
    assert np.abs(times / 2_000 - share).max() < 4 * np.sqrt(share * (1 - share) / 2_000)


@pytest.mark.parametrize(
    ("kind", "tokenizer", "text"),
    [("word", "wordpiece", ENGLISH), ("word", "bpe", ENGLISH), ("chinese", "bpe", CHINESE)],
)
def test_a_word_is_hidden_whole_or_not_at_all(kind, tokenizer, text):
    serialised = tokenizer_json(tokenizer, text)
    ids = Tokenizer.from_buffer(serialised).encode(text, add_special_tokens=False).ids
    rule = masking(kind, serialised, random_share=0.0, keep_share=0.0)
    positions = 96
    tokens = np.array(ids[: len(ids) // positions * positions]).reshape(-1, positions)
    found = rule.mask(tokens, row_keys("mask", 0, rows_of(len(tokens))))
    broken = 0
    for before, after in zip(tokens, found.tokens, strict=True):
        starts = np.flatnonzero(Words.from_tokenizer(serialised, kind).starts(before))
        for word, hidden in zip(
            np.split(before, starts[1:]), np.split(after == rule.mask_id, starts[1:]), strict=True
        ):
            broken += 0 < hidden.sum() < len(word)
    assert not broken


def test_a_word_longer_than_all_targets_still_gives_one():
    rule = masking("word")
    inner = np.flatnonzero(Vocabulary.from_tokenizer(tokenizer_json()).inner)
    tokens = np.resize(inner, (3, 20))  # one word of 20 pieces; three targets
    found = rule.mask(tokens, row_keys("mask", 0, rows_of(3)))
    assert found.weights.sum(axis=1).tolist() == [3, 3, 3]
