"""Where words begin in a row of tokens: masked objectives hide whole words, not pieces of them."""

from typing import Literal

import numpy as np

from data.tokens.vocabulary import Vocabulary, character_begins, is_han

WordKind = Literal["token", "word", "chinese"]

# What a token begins or ends with. A word goes on as long as that stays the same, as in GPT-2's splitting.
_INSIDE, _LETTER, _DIGIT, _BLANK, _HAN, _OTHER = range(6)


class Words:
    """Tells the words of a row by one of three rules.

    token: every token is a word; for Chinese in WordPiece that is every character.
    word: words between blanks and punctuation; every Chinese character is a word.
    chinese: words as jieba's dictionary and hidden Markov model segment the text (jieba-rs); of letters of
    other scripts as well. A word that begins inside of a token is joined to the one before.
    """

    def __init__(self, vocabulary: Vocabulary, kind: WordKind) -> None:
        self.kind = kind
        self._vocabulary = vocabulary
        ends = [_ends(text) for text in vocabulary.texts] if kind == "word" else []
        self._first, self._last = np.array(ends, np.uint8).reshape(-1, 2).T

    @classmethod
    def from_tokenizer(cls, tokenizer_json: bytes, kind: WordKind) -> "Words":
        """Make the tables from a tokenizer.json."""
        return cls(Vocabulary.from_tokenizer(tokenizer_json), kind)

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """Return bool [T], True where a word begins; a special token is a word of its own."""
        begins = {"token": self._tokens, "word": self._words, "chinese": self._segments}[self.kind](tokens)
        special = self._vocabulary.special[tokens]
        begins[:1] = True
        begins |= special
        begins[1:] |= special[:-1]
        return begins

    def _tokens(self, tokens: np.ndarray) -> np.ndarray:
        return np.ones(len(tokens), bool)

    def _words(self, tokens: np.ndarray) -> np.ndarray:
        if self._vocabulary.marks_inner:
            return ~self._vocabulary.inner[tokens]
        first = self._first[tokens]
        begins = (first == _BLANK) | (first == _HAN)
        begins[1:] |= (first[1:] != _INSIDE) & (first[1:] != self._last[tokens[:-1]])
        return begins

    def _segments(self, tokens: np.ndarray) -> np.ndarray:
        import rjieba  # here: with it comes its dictionary, of no use to most

        text, token_begins = self._vocabulary.read(tokens)
        characters = character_begins(text)
        lengths = np.array([len(word) for word in rjieba.cut(text)], np.int64)
        word_begins = np.zeros(characters[-1] + 1, bool)
        word_begins[characters[np.cumsum(lengths) - lengths]] = True
        # A token without text, as an id that the vocabulary skips, is not the begin of what follows it.
        return word_begins[token_begins[:-1]] & (token_begins[:-1] < token_begins[1:])


def _ends(text: bytes) -> tuple[int, int]:
    """What a token's text begins and ends with."""
    characters = text.decode("utf-8", "surrogateescape")
    if not characters:
        return _INSIDE, _INSIDE
    return _class(characters[0]), _class(characters[-1])


def _class(character: str) -> int:
    if "\udc80" <= character <= "\udcff":  # a byte of a character that other tokens hold the rest of
        byte = ord(character) - 0xDC00
        return _INSIDE if byte < 0xC0 else _LETTER if byte < 0xE0 else _HAN
    if character.isspace():
        return _BLANK
    if is_han(character):
        return _HAN
    # Marks combine with letters: Devanagari and Thai vowels are none themselves.
    if character.isalpha() or "\u0300" <= character <= "\u036f":
        return _LETTER
    return _DIGIT if character.isnumeric() else _OTHER
