"""Pairs of texts: where they come from, what they are labelled, and that they are a row's alone."""

import re
from functools import cache
from itertools import pairwise
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data.epochs import Rows
from data.framing import GOES_ON, NO_LABEL, OTHER, Framing, FramingConfig, FramingError
from data.tokens import Encoder, FixedTokenizer, TokenizerConfig, special_ids, train_tokenizer

SEQ_LEN = 64
# English of whole sentences, without the tables and listings of the manual.
PROSE = [
    " ".join(part.split())
    for text in topics.values()
    for part in re.split(r"\n\n+", text)
    if part.strip().endswith(".") and part.count(". ") >= 3 and "::" not in part
]
CHINESE = [
    "今天天气真好。我们一起去公园吧！你想什么时候出发？我在家等你。",
    "猫在沙发上睡觉。它看起来很舒服。主人回来了。猫跑过去迎接他。",
    "太阳从东方升起。鸟儿开始唱歌。人们走出家门。新的一天开始了。",
]


@cache
def tokenizer() -> FixedTokenizer:
    return train_tokenizer(PROSE + CHINESE, TokenizerConfig(kind="bpe", vocab_size=700))


def fragment_of(texts: list[str]) -> np.ndarray:
    return np.concatenate(Encoder(tokenizer()).encode(texts)).astype(np.uint16)


def rows_of(whole: np.ndarray, epoch: int = 0) -> Rows:
    start = np.arange((len(whole) - 1) // SEQ_LEN) * SEQ_LEN
    return Rows(0 * start, 0 * start + epoch, 0 * start + 3, start // SEQ_LEN, start)


def framing(kind: str = "next_sentence", seed: int = 0) -> Framing:
    serialised = tokenizer().json.encode()
    return Framing(
        FramingConfig(kind, seed), serialised, boundary_id=tokenizer().boundary_id, seq_len=SEQ_LEN
    )


def texts_of(framed: np.ndarray) -> list[np.ndarray]:
    """The texts of a framed row, whose frame is checked: [CLS] text [SEP] (text [SEP]) [PAD] …"""
    ids = special_ids(tokenizer().json.encode())
    ends = np.flatnonzero(framed == ids.sep)
    assert framed[0] == ids.cls and len(ends) in (1, 2) and (framed[ends[-1] + 1 :] == ids.pad).all()
    texts = [framed[a + 1 : b] for a, b in pairwise([0, *ends])]
    assert not any(np.isin(text, (ids.cls, ids.sep, ids.pad)).any() for text in texts)
    return texts


def places(whole: np.ndarray, part: np.ndarray) -> list[int]:
    """Where a part begins in the whole."""
    windows = np.lib.stride_tricks.sliding_window_view(whole, len(part))
    return np.flatnonzero((windows == part).all(axis=1)).tolist()


@pytest.fixture(scope="module", params=["english", "chinese"])
def whole(request) -> np.ndarray:
    if request.param == "english":
        return fragment_of(PROSE[:200])
    # Documents that differ, so that where a text is from can be told.
    return fragment_of([f"{number}。{CHINESE[number % 3]}" * 3 for number in range(60)])


def test_true_pairs_are_neighbours_in_one_document_and_false_ones_come_from_another(whole):
    rows, decode = rows_of(whole), Tokenizer.from_str(tokenizer().json).decode
    document = np.cumsum(whole == tokenizer().boundary_id)
    framed, labels = framing().frame(whole, rows)
    assert framed.shape == (len(rows), SEQ_LEN) and (labels != NO_LABEL).mean() > 0.5
    for row, label, start in zip(framed, labels, rows.start.tolist(), strict=True):
        texts = texts_of(row)
        if label == NO_LABEL:
            assert len(texts) == 1 and np.array_equal(texts[0], whole[start : start + SEQ_LEN - 2])
            continue
        first, second = texts
        mine = set(document[start : start + SEQ_LEN + 1].tolist())
        assert re.search(r"[.!?:。！？][)\"'”*`]*( \[\d+\])?$", decode(first.tolist())), (
            "A ends with a sentence"
        )
        pair, mine = np.concatenate(texts), set(document[start : start + SEQ_LEN + 1].tolist())
        in_row = [place for place in places(whole, first) if start <= place < start + SEQ_LEN]
        assert any(document[place] == document[place + len(first) - 1] for place in in_row)
        if label == GOES_ON:
            found = [place for place in places(whole, pair) if place in in_row]
            assert any(document[place] == document[place + len(pair) - 1] for place in found)
        else:
            found = [place for place in places(whole, second) if document[place] not in mine]
            assert any(document[place] == document[place + len(second) - 1] for place in found)


@pytest.mark.parametrize("kind", ["next_sentence", "sentence_order"])
def test_half_of_the_pairs_are_true_ones(whole, kind):
    labels = np.concatenate([framing(kind).frame(whole, rows_of(whole, epoch))[1] for epoch in range(12)])
    labels = labels[labels != NO_LABEL]
    assert abs((labels == OTHER).mean() - 0.5) < 4 * np.sqrt(0.25 / len(labels))


def test_the_length_of_the_second_text_does_not_tell_where_it_is_from():
    whole = fragment_of(PROSE[:200])
    lengths = {GOES_ON: [], OTHER: []}
    for epoch in range(6):
        for row, label in zip(*framing().frame(whole, rows_of(whole, epoch)), strict=True):
            if label != NO_LABEL:
                lengths[int(label)].append(len(texts_of(row)[1]))
    true, false = (np.mean(lengths[label]) for label in (GOES_ON, OTHER))
    assert false == pytest.approx(true, rel=0.1)


def test_sentence_order_swaps_neighbours(whole):
    rows = rows_of(whole)
    framed, labels = framing("sentence_order").frame(whole, rows)
    seen = set()
    for row, label, start in zip(framed, labels, rows.start.tolist(), strict=True):
        texts = texts_of(row)
        if label != NO_LABEL:
            seen.add(int(label))
            joined = np.concatenate(texts if label == GOES_ON else texts[::-1])
            assert any(start <= place <= start + SEQ_LEN for place in places(whole, joined))
    assert seen == {GOES_ON, OTHER}


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 5), st.sampled_from(["next_sentence", "sentence_order"]))
def test_a_row_is_framed_alike_alone_and_among_any_others(order, workers, kind):
    """Law L1: who trains a row, and with which others, changes nothing."""
    whole = fragment_of(PROSE[:60])
    rows = rows_of(whole)[np.arange(12)]
    together = framing(kind).frame(whole, rows)
    for share in np.array_split(np.array(order), workers):
        for ours, theirs in zip(framing(kind).frame(whole, rows[share]), together, strict=True):
            assert np.array_equal(ours, theirs[share])


def test_epoch_and_seed_change_the_pairs(whole):
    base, epoch, seed = (
        framing(seed=seed).frame(whole, rows_of(whole, epoch))[0] for seed, epoch in ((0, 0), (0, 1), (1, 0))
    )
    assert (base != epoch).any(axis=1).mean() > 0.5 and (base != seed).any(axis=1).mean() > 0.5


@pytest.mark.parametrize("kind", ["next_sentence", "sentence_order"])
def test_documents_of_one_sentence_give_no_pairs(kind):
    whole = fragment_of([f"Document {number} says only this and nothing else." for number in range(80)])
    framed, labels = framing(kind).frame(whole, rows_of(whole))
    assert (labels == NO_LABEL).all() and all(len(texts_of(row)) == 1 for row in framed)


def test_a_fragment_of_one_document_gives_no_next_sentences_but_orders():
    whole = fragment_of([" ".join(PROSE[:60])])
    assert (framing().frame(whole, rows_of(whole))[1] == NO_LABEL).all()
    assert (framing("sentence_order").frame(whole, rows_of(whole))[1] != NO_LABEL).any()


def test_a_row_at_the_end_of_a_fragment_is_padded():
    whole = fragment_of(["Short. Shorter."])
    [row], [label] = framing("sentence_order").frame(whole, Rows(*np.zeros((5, 1), np.int64)))
    assert label != NO_LABEL and len(np.concatenate(texts_of(row))) == len(whole) - 1


def test_a_tokenizer_without_the_special_tokens_is_named():
    plain = Tokenizer.from_str(tokenizer().json)
    serialised = plain.to_str().replace("[SEP]", "[XXX]").replace("[PAD]", "[YYY]").encode()
    with pytest.raises(FramingError, match=r"no \[SEP\], \[PAD\]"):
        Framing(FramingConfig("single", 0), serialised, boundary_id=0, seq_len=SEQ_LEN)
