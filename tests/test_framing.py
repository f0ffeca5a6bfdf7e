"""Pairs of texts: where they come from, what they are labelled, and that they are a row's alone."""

import re
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cluster.storage.uris import open_store
from data.order.epochs import Rows
from data.rows.evaluation_rows import evaluation_batches
from data.rows.framing import GOES_ON, NO_LABEL, OTHER, Framing, FramingConfig, FramingError, framing_of
from data.tokens.tokenizer import Encoder, FixedTokenizer, TokenizerConfig, special_ids, train_tokenizer
from tests.token_corpus import put_text_corpus

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


def test_true_pairs_are_neighbours_and_false_ones_come_from_another_document(whole):
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
        ended = decode(first.tolist())
        assert re.search(r"[.!?:。！？][)\"'”*`]*( \[\d+\])?$", ended), "A ends with a sentence"
        stop = start + SEQ_LEN + 1
        ends = [p + len(first) for p in places(whole, first) if start <= p and p + len(first) < stop]
        if label == GOES_ON:
            begins = [p for p in places(whole, second) if p in ends]
            assert any(document[p] == document[p - 1] for p in begins), "the seam lies in one document"
        else:
            mine = set(document[start:stop].tolist())
            found = [set(document[p : p + len(second)].tolist()) for p in places(whole, second)]
            assert any(not each & mine for each in found)
        assert whole[ends[0]] != tokenizer().boundary_id != second[0]


@pytest.mark.parametrize("kind", ["next_sentence", "sentence_order"])
def test_half_of_the_pairs_are_true_ones(whole, kind):
    labels = np.concatenate([framing(kind).frame(whole, rows_of(whole, epoch))[1] for epoch in range(12)])
    labels = labels[labels != NO_LABEL]
    assert abs((labels == OTHER).mean() - 0.5) < 4 * np.sqrt(0.25 / len(labels))


def documents_of(kind: str, random: np.random.Generator) -> list[str]:
    """Texts of sentences that differ in length and end, one in three without a full stop at its own end."""
    num_sentences = (2, 6) if kind == "short" else (40, 60)
    texts = []
    for number in range(2_400 if kind == "short" else 180):
        sentences = [
            "".join(random.choice(list("天气公园猫太阳鸟人们我你"), random.integers(2, 14)))
            + random.choice(list("。！？"))
            for _ in range(random.integers(*num_sentences))
        ]
        texts.append("".join(sentences)[: None if number % 3 else -1])
    return texts


def tellers(framed: np.ndarray) -> dict[str, tuple[int, ...]]:
    """What a judge that reads no text could go by."""
    first, second = texts_of(framed)
    lengths = len(first) // 8, len(second) // 8
    return {
        "ends": (first[-1], second[-1]),
        "lengths": lengths,
        "whole length": (len(first) + len(second),),
        "all": (first[-1], second[-1], *lengths),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["next_sentence", "sentence_order"])
@pytest.mark.parametrize("documents", ["short", "long"])
def test_ends_and_lengths_of_the_texts_do_not_tell_the_label(kind, documents):
    whole = fragment_of(documents_of(documents, np.random.default_rng(1)))
    seen: dict[str, list[tuple[tuple[int, ...], int]]] = {}
    maker = Framing(
        FramingConfig(kind, 0, short_share=0.1),
        tokenizer().json.encode(),
        boundary_id=tokenizer().boundary_id,
        seq_len=SEQ_LEN,
    )
    for epoch in range(2):
        rows = rows_of(whole, epoch)
        rows = replace(rows, start=rows.start + 17 * epoch)  # epochs are cut elsewhere
        for row, label in zip(*maker.frame(whole, rows), strict=True):
            if label != NO_LABEL:
                for name, teller in tellers(row).items():
                    seen.setdefault(name, []).append((teller, int(label)))
    for name, pairs in seen.items():
        half = len(pairs) // 2
        assert half > 500
        learnt: dict[tuple[int, ...], int] = {}
        for teller, label in pairs[:half]:
            learnt[teller] = learnt.get(teller, 0) + 2 * label - 1
        judged = np.array([(learnt.get(teller, 0) > 0) == label for teller, label in pairs[half:]])
        labels = np.array([label for _, label in pairs[half:]])
        majority = max(labels.mean(), 1 - labels.mean())
        assert judged.mean() < majority + 4 * np.sqrt(0.25 / len(judged)), name


def test_a_share_of_the_pairs_is_short():
    whole = fragment_of(PROSE[:200])
    config = FramingConfig("next_sentence", 0, short_share=0.5)
    ids = tokenizer().json.encode(), tokenizer().boundary_id
    framed, labels = Framing(config, ids[0], boundary_id=ids[1], seq_len=SEQ_LEN).frame(whole, rows_of(whole))
    lengths = np.array([len(np.concatenate(texts_of(row))) for row in framed[labels != NO_LABEL]])
    short = (lengths < SEQ_LEN - 3).mean()
    assert abs(short - 0.5) < 4 * np.sqrt(0.25 / len(lengths)) and lengths.min() < SEQ_LEN // 4


def test_rows_of_pairs_are_full_however_short_the_documents_are():
    whole = fragment_of(documents_of("short", np.random.default_rng(2)))
    pad = special_ids(tokenizer().json.encode()).pad
    framed, labels = framing().frame(whole, rows_of(whole))
    assert (labels != NO_LABEL).mean() > 0.9 and (framed != pad).mean() > 0.99


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
    whole = fragment_of(["Short. Shorter."])  # its only row begins with the document and ends with it
    [row], [label] = framing("sentence_order").frame(whole, Rows(*np.zeros((5, 1), np.int64)))
    assert label != NO_LABEL and len(np.concatenate(texts_of(row))) == len(whole) - 1


def test_no_pair_crosses_a_split(tmp_path):
    """Texts of each split say which it is; every pair comes out of one fragment, and so of one split."""
    texts = {
        split: [f"{word} goes on. {word} stays. {word} ends." for _ in range(60)]
        for split, word in (("train", "今天"), ("validation", "公园"))
    }
    store, ids = open_store(str(tmp_path)), special_ids(tokenizer().json.encode())
    manifest = put_text_corpus(store, texts, tokenizer(), fragment_tokens=400)
    maker = framing_of(FramingConfig("next_sentence", 0), store.uri, manifest, SEQ_LEN)
    decode = Tokenizer.from_str(tokenizer().json).decode
    for split, own, other in (("train", "今天", "公园"), ("validation", "公园", "今天")):
        batches = evaluation_batches(
            manifest, store, split, seq_len=SEQ_LEN, rows_per_batch=4, rank=0, world_size=1, framing=maker
        )
        seen = 0
        for batch in batches:
            for row, label in zip(batch.tokens, batch.labels, strict=True):
                if label == OTHER:
                    read = decode(row[row != ids.pad].tolist())
                    assert own in read and other not in read
                    seen += 1
        assert seen


def test_a_tokenizer_without_the_special_tokens_is_named():
    plain = Tokenizer.from_str(tokenizer().json)
    serialised = plain.to_str().replace("[SEP]", "[XXX]").replace("[PAD]", "[YYY]").encode()
    with pytest.raises(FramingError, match=r"no \[SEP\], \[PAD\]"):
        Framing(FramingConfig("single", 0), serialised, boundary_id=0, seq_len=SEQ_LEN)
