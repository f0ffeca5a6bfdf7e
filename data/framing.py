"""Rows as an encoder reads them: one text, or a pair of texts, between special tokens.

    [CLS] text [SEP] [PAD] …            single, and every row in which no pair can be found
    [CLS] A [SEP] B [SEP] [PAD] …       next_sentence (Devlin et al. 2018), sentence_order (Lan et al. 2019)

A and B are cut from one document of the row at the end of a sentence. For next sentence prediction half the B are
replaced by what follows the end of a sentence in another document of the same fragment, so of the same split and
source, and no longer than the B that it replaces. The reader of a fragment does this, for it has the whole of it in
hand: what a row becomes is a pure function of the fragment, the seed and the row in its epoch.

Legend: R rows, T positions (`seq_len`).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cluster.storage import open_store
from data.epochs import Rows
from data.manifest import Manifest
from data.masking import row_keys
from data.permutation import below, combine
from data.sentences import Sentences
from data.tokens import read_tokenizer, special_ids

NO_LABEL, GOES_ON, OTHER = -1, 0, 1
"""Of a row without a pair; of the true order; of a B from elsewhere, or of swapped texts: as BERT's labels."""
TRIES = 4
"""Places looked at for a B from elsewhere; the one with most text is taken, or short ones would tell B's origin."""
# What a row's key is combined with, so that no two draws are the same.
_CUT, _COIN, _PLACE = 1, 2, 3

FrameKind = Literal["single", "next_sentence", "sentence_order"]
Tokens = NDArray[np.unsignedinteger]


class FramingError(ValueError):
    """The tokenizer lacks a special token, or no pair of sentences can be made of a corpus."""


@dataclass(frozen=True)
class FramingConfig:
    """What a reader elsewhere is sent."""

    kind: FrameKind
    seed: int


class Framing:
    """Makes framed rows.

    Args:
        tokenizer_json: The corpus's tokenizer.
        boundary_id: Opens each document.
        seq_len: T.

    Raises:
        FramingError: the tokenizer has no [CLS], [SEP] or [PAD].
    """

    def __init__(
        self, config: FramingConfig, tokenizer_json: bytes, *, boundary_id: int, seq_len: int
    ) -> None:
        ids = special_ids(tokenizer_json)
        missing = [f"[{name.upper()}]" for name in ("cls", "sep", "pad") if getattr(ids, name) is None]
        if ids.cls is None or ids.sep is None or ids.pad is None:
            raise FramingError(f"the tokenizer has no {', '.join(missing)}; {REMEDY}")
        self.config, self.seq_len = config, seq_len
        self._cls, self._sep, self._pad, self._boundary_id = ids.cls, ids.sep, ids.pad, boundary_id
        self._sentences = Sentences.from_tokenizer(tokenizer_json)

    def frame(self, whole: Tokens, rows: Rows) -> tuple[Tokens, NDArray[np.int8]]:
        """Frame rows of one fragment.

        Args:
            whole: All tokens of the fragment.
            rows: [R]. A row that reaches over the fragment's end ends there.

        Returns:
            Tokens [R, T] of the fragment's type, and labels [R].
        """
        framed = np.full((len(rows), self.seq_len), self._pad, whole.dtype)
        labels = np.full(len(rows), NO_LABEL, np.int8)
        opens = np.flatnonzero(whole == self._boundary_id)
        keys = row_keys("framing", self.config.seed, rows)
        for number, (start, key) in enumerate(zip(rows.start.tolist(), keys, strict=True)):
            stop = min(start + self.seq_len + 1, len(whole))
            texts = [whole[start:stop][: self.seq_len - 2]]
            if self.config.kind != "single" and (pair := self._pair(whole, opens, start, stop, key)):
                *texts, labels[number] = pair
            place = 1
            framed[number, 0] = self._cls
            for text in texts:
                framed[number, place : place + len(text)] = text
                place += len(text) + 1
                framed[number, place - 1] = self._sep
        return framed, labels

    def _pair(
        self, whole: Tokens, opens: NDArray[np.int64], start: int, stop: int, key: np.uint64
    ) -> tuple[Tokens, Tokens, int] | None:
        """A, B and the label; None where the row has no place to cut, or the fragment no other document."""
        row = whole[start:stop]
        cuts = self._cuts(row)
        if not len(cuts):
            return None
        cut = int(cuts[below(combine(key, _CUT), len(cuts))])
        bounds = np.flatnonzero(row == self._boundary_id)
        first = row[int(bounds[bounds < cut][-1]) + 1 if (bounds < cut).any() else 0 : cut]
        second = row[cut : int(bounds[bounds > cut][0]) if (bounds > cut).any() else len(row)]
        first, second = _fitted(first, second, self.seq_len - 3)
        changed = bool(combine(key, _COIN) & np.uint64(1))
        if self.config.kind == "sentence_order":
            return (second, first, OTHER) if changed else (first, second, GOES_ON)
        # Looked for in either case: rows of a fragment without another document must not all be of one label.
        other = self._elsewhere(whole, opens, start, stop, len(second), key)
        if other is None:
            return None
        return (first, other, OTHER) if changed else (first, second, GOES_ON)

    def _elsewhere(
        self,
        whole: Tokens,
        opens: NDArray[np.int64],
        start: int,
        stop: int,
        wanted: int,
        key: np.uint64,
    ) -> Tokens | None:
        """Up to `wanted` tokens that follow the end of a sentence in a document that the row has no part of."""
        before, after = opens[opens <= start], opens[opens >= stop]
        low = int(before[-1]) if len(before) else 0
        high = int(after[0]) if len(after) else len(whole)
        outside = len(whole) - (high - low)
        longest = None
        for attempt in range(TRIES if outside else 0):
            place = int(below(combine(key, _PLACE, attempt), outside))
            begin, end = (place, low) if place < low else (place + high - low, len(whole))
            passage = whole[begin : min(begin + 2 * self.seq_len, end)]
            cuts = self._cuts(passage)
            if not len(cuts):
                continue
            bounds = np.append(np.flatnonzero(passage == self._boundary_id), len(passage))
            room = np.minimum(bounds[np.searchsorted(bounds, cuts)] - cuts, wanted)
            best = int(np.argmax(room))
            if longest is None or room[best] > len(longest):
                longest = passage[cuts[best] : cuts[best] + room[best]]
            if len(longest) == wanted:
                break
        return longest

    def _cuts(self, tokens: Tokens) -> NDArray[np.int64]:
        """Where a sentence begins that is not its document's first."""
        begins = np.flatnonzero(self._sentences.ends(tokens)[:-1]) + 1
        return begins[tokens[begins] != self._boundary_id]


REMEDY = "train one (corpus.tokenizer.path empty, corpus.tokenizer.kind bpe or wordpiece), or give one made for masking"


def _fitted(first: Tokens, second: Tokens, room: int) -> tuple[Tokens, Tokens]:
    """Shorten the longer of two texts, or both to halves, at their outer ends."""
    num_second = min(len(second), max(room - len(first), room // 2))
    num_first = min(len(first), room - num_second)
    return first[len(first) - num_first :], second[:num_second]


@lru_cache(maxsize=4)
def stored_framing(
    config: FramingConfig, prepared: str, tokenizer: str, boundary_id: int, seq_len: int
) -> Framing:
    """The framing for a prepared corpus (its URI and tokenizer's fingerprint), kept by each process."""
    serialised = read_tokenizer(open_store(prepared), tokenizer)
    return Framing(config, serialised, boundary_id=boundary_id, seq_len=seq_len)


def framing_of(config: FramingConfig, prepared: str, manifest: Manifest, seq_len: int) -> Framing:
    """The framing for a prepared corpus."""
    return stored_framing(config, prepared, manifest.tokenizer, manifest.boundary_id, seq_len)
