"""Which tokens a masked objective hides: a pure function of the row, whoever trains it and beside which others.

As in BERT (Devlin et al. 2018, section 3.1): a share of the tokens are targets; of these 80 % become [MASK], 10 % a
random token, 10 % stay. Words are hidden whole, as in BERT's later version. Drawing anew in each epoch is RoBERTa's
way (Liu et al. 2019, section 4.1).

Legend: R rows, T positions, P most targets of a row, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.order.epochs import Rows
from data.order.permutation import below, combine, key_of, uniform
from data.tokens.words import Words

# What a row's key is combined with, so that no two draws are the same.
_ORDER, _FATE, _REPLACEMENT = 1, 2, 3


def row_keys(purpose: str, seed: int, rows: Rows) -> NDArray[np.uint64]:
    """A key for each row in its epoch, [R]."""
    return combine(key_of(purpose, seed), rows.source, rows.epoch, rows.fragment, rows.row)


class Masked(NamedTuple):
    """Rows with targets. Places beyond a row's last target have weight 0."""

    tokens: NDArray[np.int64]
    """[R, T]: what the model sees."""
    slots: NDArray[np.int64]
    """[R, P]: positions of the targets, ascending."""
    targets: NDArray[np.int64]
    """[R, P]: the tokens that stood there."""
    weights: NDArray[np.float32]
    """[R, P]: 1 or 0."""


@dataclass(frozen=True)
class Masking:
    """How targets are chosen and hidden."""

    words: Words
    special: NDArray[np.bool_]
    """[V]: tokens that are never a target, nor put in another's place."""
    boundary_id: int
    mask_id: int
    rate: float = 0.15
    """Share of the tokens, special ones not counted, that are targets."""
    random_share: float = 0.1
    """Share of the targets that a random token replaces."""
    keep_share: float = 0.1
    """Share of the targets that stay as they are."""

    def num_slots(self, num_positions: int) -> int:
        """P: as many as a row without special tokens has."""
        return int(_quota(self.rate, np.array(num_positions)))

    def mask(self, tokens: NDArray[np.int64], keys: NDArray[np.uint64]) -> Masked:
        """Choose and hide the targets of rows [R, T].

        A row has as many targets as its share of its tokens comes to, and one at least unless all its tokens are
        special. Words are taken in a random order until one does not fit; single tokens then fill the rest. A word
        that is longer than all of a row's targets together is taken for single tokens.
        """
        eligible = ~self.special[tokens]
        quota = _quota(self.rate, eligible.sum(axis=1))
        chosen = _choose(self._word_starts(tokens), eligible, quota, combine(keys, _ORDER))
        count = chosen.sum(axis=1)
        num_slots = self.num_slots(tokens.shape[1])
        slots = np.argsort(~chosen, axis=1, kind="stable")[:, :num_slots]
        real = np.arange(num_slots) < count[:, None]
        slots = np.where(real, slots, 0)
        targets = np.take_along_axis(tokens, slots, axis=1)
        shown = tokens.copy()
        row, place = np.nonzero(real)
        shown[row, slots[row, place]] = self._shown(targets, slots, keys)[row, place]
        return Masked(shown, slots, targets, real.astype(np.float32))

    def _word_starts(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        # A boundary before each row, or a row's words would depend on the row that happens to come before it.
        parted = np.insert(tokens, 0, self.boundary_id, axis=1)
        starts = self.words.starts(parted.reshape(-1)).reshape(parted.shape)[:, 1:]
        starts[:, 0] = True
        return starts

    def _shown(
        self, targets: NDArray[np.int64], slots: NDArray[np.int64], keys: NDArray[np.uint64]
    ) -> NDArray[np.int64]:
        """What stands in the targets' places."""
        fate = uniform(combine(keys[:, None], _FATE, slots))
        usual = np.flatnonzero(~self.special)
        other = usual[below(combine(keys[:, None], _REPLACEMENT, slots), len(usual))]
        kept = np.where(fate < self.random_share + self.keep_share, targets, self.mask_id)
        return np.where(fate < self.random_share, other, kept)


def _quota(rate: float, num_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.maximum(1, np.floor(rate * num_tokens + 0.5).astype(np.int64))


def _choose(
    starts: NDArray[np.bool_],
    eligible: NDArray[np.bool_],
    quota: NDArray[np.int64],
    keys: NDArray[np.uint64],
) -> NDArray[np.bool_]:
    """[R, T]: whole words in a random order, up to each row's quota [R] of tokens."""
    position = np.arange(starts.shape[1])
    starts = starts | (_word_lengths(starts) > quota[:, None])
    length = _word_lengths(starts)
    first = np.maximum.accumulate(np.where(starts, position, 0), axis=1)
    # Tokens of a word share its number. What cannot be a target comes last.
    drawn = np.where(eligible, combine(keys[:, None], first), np.uint64(2**64 - 1))
    order = np.argsort(drawn, axis=1, kind="stable")
    # Where each word would end, counted in tokens, if all before it were taken.
    begins = np.take_along_axis(starts, order, axis=1)
    end = np.maximum.accumulate(np.where(begins, position, 0), axis=1)
    end = end + np.take_along_axis(length, order, axis=1)
    candidate = np.take_along_axis(eligible, order, axis=1)
    taken = candidate & (end <= quota[:, None])
    rest = quota - taken.sum(axis=1)
    single = candidate & ~taken & (np.take_along_axis(length, order, axis=1) == 1)
    taken |= single & (np.cumsum(single, axis=1) <= rest[:, None])
    chosen = np.zeros_like(starts)
    np.put_along_axis(chosen, order, taken, axis=1)
    return chosen


def _word_lengths(starts: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[R, T]: tokens of the word that each position is in; the first position begins one."""
    word = np.cumsum(starts.reshape(-1)) - 1  # rows begin words, so no word goes over a row's end
    return np.bincount(word)[word].reshape(starts.shape)
