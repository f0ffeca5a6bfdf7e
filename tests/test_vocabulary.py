"""Laws of the vocabulary: a row reads as the text that it came from, and every byte belongs to one token."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data.tokens.tokenizer import Encoder, FixedTokenizer, TokenizerConfig, train_tokenizer
from data.tokens.vocabulary import Vocabulary, character_begins

SAMPLE = ["今天天气真好，我们去公园吧。the love of Denmark, naïve 十二 kings and kingdoms 😀"] * 20


@pytest.fixture(scope="module")
def bpe() -> FixedTokenizer:
    return train_tokenizer(SAMPLE, TokenizerConfig(vocab_size=300))


@pytest.fixture(scope="module")
def vocabulary(bpe) -> Vocabulary:
    return Vocabulary.from_tokenizer(bpe.json.encode())


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_a_row_of_byte_level_tokens_reads_as_its_text(bpe, vocabulary, text):
    [tokens] = Encoder(bpe).encode([text])
    read, begins = vocabulary.read(tokens[1:])
    assert read == text
    assert begins.tolist() == [0, *np.cumsum([len(vocabulary.texts[token]) for token in tokens[1:]])]
    assert begins[-1] == len(text.encode())


@settings(max_examples=50, deadline=None)
@given(start=st.integers(0, 40), stop=st.integers(0, 40))
def test_bytes_of_cut_characters_are_read_as_one_character_each(bpe, vocabulary, start, stop):
    [tokens] = Encoder(bpe).encode(["天気😀ñ" * 4])
    read, begins = vocabulary.read(tokens[1:][start:stop])
    assert len(read.encode()) == begins[-1]
    assert set(read) <= set("天気😀ñ\0")


def test_word_piece_reads_with_blanks_between_words_and_none_between_chinese_characters():
    fixed = train_tokenizer(SAMPLE, TokenizerConfig(kind="wordpiece", vocab_size=75))
    [tokens] = Encoder(fixed).encode(["今天天气真好，the love of kings, 12 kingdoms"])
    vocabulary = Vocabulary.from_tokenizer(fixed.json.encode())
    assert vocabulary.read(tokens[1:])[0] == "今天天气真好， the love of kings,□ kingdoms"
    assert vocabulary.special[:6].all() and not vocabulary.special[6:].any()


def test_sentencepiece_blanks_and_bytes_are_read():
    words = {"<unk>": 0, "▁the": 1, "▁": 2, "re": 3, "<0xE5>": 4, "<0xA4>": 5, "<0xA9>": 6}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])
    vocabulary = Vocabulary.from_tokenizer(tokenizer.to_str().encode())
    assert vocabulary.read(np.array([1, 3, 2, 4, 5, 6]))[0] == " there 天"


def test_an_id_that_the_tokenizer_skips_stands_for_no_text(bpe):
    fields = json.loads(bpe.json)
    fields["added_tokens"].append(
        fields["added_tokens"][0] | {"id": 305, "content": "<far>", "special": False}
    )
    vocabulary = Vocabulary.from_tokenizer(json.dumps(fields).encode())
    far = Tokenizer.from_str(json.dumps(fields)).token_to_id("<far>")
    assert vocabulary.texts[far] == b"<far>" and not vocabulary.special[far]
    assert len(vocabulary.texts) == far + 1


def test_tokens_that_frame_texts_are_special_also_where_only_the_vocabulary_lists_them(bpe):
    fields = json.loads(bpe.json)
    fields["added_tokens"] = []
    vocabulary = Vocabulary.from_tokenizer(json.dumps(fields).encode())
    framing = [fields["model"]["vocab"][name] for name in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")]
    assert vocabulary.special[framing].all()


@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_characters_begin_where_their_utf8_begins(text):
    assert character_begins(text).tolist() == [len(text[:i].encode()) for i in range(len(text) + 1)]
