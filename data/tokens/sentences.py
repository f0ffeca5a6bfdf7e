"""Where sentences end in a row of tokens: pairs of neighbouring sentences are cut there."""

import unicodedata
from itertools import accumulate

import numpy as np
import sentencex

from data.tokens.vocabulary import Vocabulary, character_begins

# Split off again: whether the row's own last sentence is complete shows in whether a next one may begin.
_NEXT = " A"


class Sentences:
    """Tells the sentences of a row, English and Chinese, by Wikimedia's segmenter (sentencex)."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    @classmethod
    def from_tokenizer(cls, tokenizer_json: bytes) -> "Sentences":
        """Make the tables from a tokenizer.json."""
        return cls(Vocabulary.from_tokenizer(tokenizer_json))

    def ends(self, tokens: np.ndarray) -> np.ndarray:
        """Return bool [T], True at the last token of a sentence; closing quotes belong to it, blanks do not.

        The end of a document ends a sentence, the end of the row only where one could begin after it. Never
        True at the boundary of documents, or another special token but [UNK].
        """
        text, token_begins = self._vocabulary.read(tokens)
        characters = character_begins(text)
        last_bytes = [characters[end] - 1 for end in _sentence_ends(text)]
        ends = np.zeros(len(tokens), bool)
        ends[np.searchsorted(token_begins, last_bytes, side="right") - 1] = True
        return ends


def _sentence_ends(text: str) -> list[int]:
    """Character after the last visible one of each complete sentence, ascending."""
    # "en" is the language whose abbreviations are known; the full stops of all scripts are always known.
    pieces = sentencex.segment("en", text + _NEXT)
    stops = list(accumulate(map(len, pieces)))
    ends = []
    for piece, stop in zip(pieces[:-1], stops, strict=False):
        visible = len(piece.rstrip("\0\n\r\t \u3000"))
        if not visible:
            continue
        end = stop - len(piece) + visible
        while end == stop < len(text) and _closes(text[end]):  # 』 after 」: the segmenter takes one
            end = stop = end + 1
        ends.append(min(end, len(text)))
    return ends


def _closes(character: str) -> bool:
    return unicodedata.category(character) in ("Pe", "Pf")
