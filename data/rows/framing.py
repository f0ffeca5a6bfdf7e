"""Rows as an encoder reads them: one text, or a pair of texts, between special tokens.

    [CLS] text [SEP] [PAD] …            single, and every row in which no pair can be found
    [CLS] A [SEP] B [SEP] [PAD] …       next_sentence (Devlin et al. 2018), sentence_order (Lan et al. 2019)

Of next sentence prediction only the seam lies inside one document, where a sentence begins: A is what goes before it, B
what goes on, boundaries of documents included. Half the B are replaced by as many tokens from where a sentence begins
in documents that the row has no part of, so that they end as the true ones do: anywhere. Of sentence order both texts
are whole sentences of one document, or the end of the row would tell which comes last. The reader of a fragment makes
the pairs, for it has the whole of it in hand: both texts are of one split and source, and what a row becomes is a pure
function of the fragment, the seed and the row in its epoch.

Legend: R rows, T positions (`seq_len`).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cluster.console.errors import UserError
from cluster.storage.uris import open_store
from data.order.epochs import Rows
from data.order.permutation import below, combine, uniform
from data.rows.masking import row_keys
from data.shards.manifest import Manifest
from data.tokens.sentences import Sentences
from data.tokens.tokenizer import read_tokenizer, special_ids

NO_LABEL, GOES_ON, OTHER = -1, 0, 1
"""Of a row without a pair; of the true order; of a B from elsewhere, or of swapped texts: as BERT's labels."""
TRIES = 4
"""Places looked at for a B from elsewhere."""
TAIL = 8
"""Tokens that show how a document ends."""
# What a row's key is combined with, so that no two draws are the same.
_CUT, _COIN, _PLACE, _BEGIN, _SHORT, _LENGTH, _END = 1, 2, 3, 4, 5, 6, 7

FrameKind = Literal["single", "next_sentence", "sentence_order"]
Tokens = NDArray[np.unsignedinteger]


class FramingError(UserError, ValueError):
    """The tokenizer lacks a special token, or no pair of sentences can be made of a corpus."""


@dataclass(frozen=True)
class FramingConfig:
    """What a reader elsewhere is sent."""

    kind: FrameKind
    seed: int
    short_share: float = 0.0
    """Share of the pairs that are shortened to a random length."""


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
        """A, B and the label; None where the row has no place to cut, or the fragment no text from elsewhere."""
        row = whole[start:stop]
        cuts = self._cuts(row)
        if not len(cuts):
            return None
        changed = bool(combine(key, _COIN) & np.uint64(1))
        if self.config.kind == "sentence_order":
            texts = self._neighbours(row, cuts, stop == len(whole), key)
            return texts and ((*texts[::-1], OTHER) if changed else (*texts, GOES_ON))
        cut = int(cuts[below(combine(key, _CUT), len(cuts))])
        first, second = _fitted(row[:cut], row[cut:], self._room(key))
        if stop == len(whole):  # where a true B would end with its document, and no false one
            second = second[: 1 + int(below(combine(key, _END), len(second)))]
        # Looked for in either case: rows of a fragment without another document must not all be of one label.
        other = self._elsewhere(whole, opens, start, stop, len(second), key)
        if other is None:
            return None
        return (first, other, OTHER) if changed else (first, second, GOES_ON)

    def _room(self, key: np.uint64) -> int:
        """Tokens of a pair at most; fewer in a share of the rows, as BERT's short_seq_prob has it."""
        room = self.seq_len - 3
        if uniform(combine(key, _SHORT)) >= self.config.short_share:
            return room
        return 2 + int(below(combine(key, _LENGTH), room - 1))

    def _neighbours(
        self, row: Tokens, cuts: NDArray[np.int64], is_last: bool, key: np.uint64
    ) -> tuple[Tokens, Tokens] | None:
        """Two neighbouring texts of one document, of the sentences that the row holds as a whole.

        `is_last`: the row ends where its fragment does.
        """
        bounds = np.flatnonzero(row == self._boundary_id)
        begins = np.union1d(cuts, bounds + 1)
        # A document that ends without a full stop would give its last sentence away.
        closed = [end for end in (*bounds.tolist(), *([len(row)] * is_last)) if self._closes(row[:end])]
        ends = np.union1d(cuts, np.array(closed, np.int64))
        places = []
        for cut in cuts.tolist():
            before, after = bounds[bounds < cut], bounds[bounds > cut]
            low, high = max(before, default=0), min(after, default=len(row))
            of_first = begins[(low <= begins) & (begins < cut)]
            of_second = ends[(cut < ends) & (ends <= high)]
            if len(of_first) and len(of_second):
                places.append((of_first, cut, of_second))
        if not places:
            return None
        of_first, cut, of_second = places[int(below(combine(key, _CUT), len(places)))]
        first, second = _fitted(row[of_first[0] : cut], row[cut : of_second[-1]], self._room(key))
        begin = min(of_first[of_first >= cut - len(first)], default=cut)
        end = max(of_second[of_second <= cut + len(second)], default=cut)
        return (row[begin:cut], row[cut:end]) if begin < cut < end else None

    def _closes(self, tokens: Tokens) -> bool:
        """Whether they end with a full stop."""
        return len(tokens) > 0 and bool(self._sentences.ends(tokens[-TAIL:])[-1])

    def _elsewhere(
        self,
        whole: Tokens,
        opens: NDArray[np.int64],
        start: int,
        stop: int,
        wanted: int,
        key: np.uint64,
    ) -> Tokens | None:
        """`wanted` tokens from where a sentence begins, out of documents that the row has no part of."""
        before, after = opens[opens <= start], opens[opens >= stop]
        low = int(before[-1]) if len(before) else 0
        high = int(after[0]) if len(after) else len(whole)
        places_before, places_after = max(0, low - wanted), max(0, len(whole) - high - wanted)
        for attempt in range(TRIES if places_before + places_after else 0):
            place = int(below(combine(key, _PLACE, attempt), places_before + places_after))
            begin, end = (place, low) if place < places_before else (place - places_before + high, len(whole))
            cuts = begin + self._cuts(whole[begin : min(begin + self.seq_len, end)])
            cuts = cuts[cuts + wanted <= end]
            if len(cuts):
                cut = int(cuts[below(combine(key, _BEGIN, attempt), len(cuts))])
                return whole[cut : cut + wanted]
        return None

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
