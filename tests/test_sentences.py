"""Laws of sentences: full stops of both languages with their closing quotes, and never a cut inside a number."""

from functools import cache

import numpy as np
import pytest
import sentencex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data.tokens.sentences import Sentences
from data.tokens.tokenizer import Encoder, FixedTokenizer, TokenizerConfig, train_tokenizer

ENGLISH = ['He said "Go home!"', "Then Mr. Smith left.", "It cost 3.14 dollars.", "Why?"]
CHINESE = ["今天天气真好！", "他说：“你好吗？”", "她说：『走！』", "我们去公园吧。"]


@pytest.fixture(scope="module", params=["bpe", "wordpiece"])
def fixed(request) -> FixedTokenizer:
    size = 320 if request.param == "bpe" else 100
    sample = [" ".join(ENGLISH) + "".join(CHINESE)] * 20
    return train_tokenizer(sample, TokenizerConfig(kind=request.param, vocab_size=size))


@cache
def sentences_by(tokenizer_json: str) -> Sentences:
    return Sentences.from_tokenizer(tokenizer_json.encode())


def sentences_of(fixed: FixedTokenizer, *documents: str) -> list[str]:
    """The sentences, without blanks."""
    tokens = np.concatenate(Encoder(fixed).encode(documents))
    ends = sentences_by(fixed.json).ends(tokens)
    tokenizer = Tokenizer.from_str(fixed.json)
    pieces = np.split(tokens, np.flatnonzero(ends) + 1)
    texts = ["".join(tokenizer.decode(piece.tolist()).split()) for piece in pieces]
    return [text for text in texts if text]


def plain(sentences: list[str]) -> list[str]:
    return [sentence.replace(" ", "") for sentence in sentences]


@pytest.mark.parametrize("sentences, joint", [(ENGLISH, " "), (CHINESE, "")], ids=["english", "chinese"])
def test_sentences_end_with_their_closing_quotes(fixed, sentences, joint):
    assert sentences_of(fixed, joint.join(sentences)) == plain(sentences)


def test_the_end_of_a_document_ends_a_sentence_and_an_open_end_of_the_row_does_not(fixed):
    whole, half = "今天天气", "Then Mr"
    [_, *inner] = Encoder(fixed).encode([whole, half])
    tokens = np.concatenate(Encoder(fixed).encode([whole, half]))
    ends = sentences_by(fixed.json).ends(tokens)
    assert np.flatnonzero(ends).tolist() == [len(tokens) - len(inner[0]) - 1]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from([*ENGLISH, *CHINESE]), min_size=1, max_size=8))
def test_mixed_sentences_are_told_apart(fixed, sentences):
    assert sentences_of(fixed, "\n\n".join(sentences)) == plain(sentences)


@settings(max_examples=80, deadline=None)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(".!?。！？”』\n A")), max_size=80))
def test_no_special_token_ends_a_sentence_whatever_the_text(fixed, text):
    tokens = np.concatenate(Encoder(fixed).encode([text, text]))
    ends = sentences_by(fixed.json).ends(tokens)
    assert ends.shape == tokens.shape
    assert not ends[tokens == fixed.boundary_id].any()


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(".!?。！？”』\n\t A\0")), max_size=80))
def test_the_segmenter_loses_no_character(text):
    """What the positions of sentences rest on."""
    assert "".join(sentencex.segment("en", text)) == text
