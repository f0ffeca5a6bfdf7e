"""The epochs of one source: its fragments in a keyed order, their rows joined, and cut into lanes of equal
length.

Legend: F fragments, U lanes, T tokens with a loss per row.

A lane takes its rows by number: 0, 1, 2, … through one epoch after another. The only state is an index of F +
1 row counts per epoch, made when an epoch is first asked for; any number is then found by bisection.
"""

from collections import OrderedDict
from dataclasses import dataclass, fields
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from data.order.permutation import below, combine, permute

# Fragments are ordered in pieces that stay in the processor's cache: 10 million take half as long.
CHUNK = 2**15
# The index of 10 million fragments takes 80 MB; two are in use where a window reaches over the end of an
# epoch.
KEPT_INDICES = 2


@dataclass(frozen=True)
class Rows:
    """Rows as equally long columns; what makes a row the same row in every run of this order."""

    source: NDArray[np.int64]
    """Index into `Manifest.sources`."""
    epoch: NDArray[np.int64]
    """Of that source, from 0."""
    fragment: NDArray[np.int64]
    """Index into `Manifest.fragments`."""
    row: NDArray[np.int64]
    """Index of the row in its fragment."""
    start: NDArray[np.int64]
    """Offset in the fragment of the row's first token."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: NDArray | slice) -> "Rows":
        return Rows(*(column[index] for column in self.columns()))

    def columns(self) -> tuple[NDArray[np.int64], ...]:
        return tuple(getattr(self, each.name) for each in fields(self))

    @classmethod
    def join(cls, parts: list["Rows"]) -> "Rows":
        """All parts one after another."""
        return cls(
            *(np.concatenate(columns) for columns in zip(*(part.columns() for part in parts), strict=True))
        )


class Epochs:
    """Rows of one source by (lane, number).

    Args:
        source: Index into `Manifest.sources`.
        fragments: [F] int64, indices into the manifest's fragments.
        num_tokens: Tokens of all fragments of the manifest.
        lanes: U.
        seq_len: T.
        key: 64 bits; another key gives another order.
    """

    def __init__(
        self,
        source: int,
        fragments: NDArray[np.int64],
        num_tokens: NDArray[np.int64],
        *,
        lanes: int,
        seq_len: int,
        key: int,
    ) -> None:
        self._source, self._fragments, self._num_tokens = source, fragments, num_tokens
        self._seq_len, self._key = seq_len, key
        self._rows = rows_of(num_tokens[fragments], seq_len)
        self.rows = int(self._rows.sum(dtype=np.int64))
        """In one epoch, whether a lane takes them or not."""
        self.lane_rows = self.rows // lanes
        """Rows that each lane takes in one epoch."""
        self.left_rows = self.rows - self.lane_rows * lanes
        """Rows that no lane takes in one epoch: fewer than U, other ones in each."""
        self._indices: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._lock = Lock()  # a background thread may plan windows while the loop asks which rows a step had

    def find(self, lanes: NDArray[np.int64], numbers: NDArray[np.int64]) -> Rows:
        """Rows of the given (lane, number), both [N]."""
        epochs, position = np.divmod(numbers, self.lane_rows)
        position += lanes * self.lane_rows
        fragment, row = np.empty_like(position), np.empty_like(position)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            index = self._index(int(epoch))
            slot = np.searchsorted(index, position[here], side="right") - 1
            fragment[here], row[here] = self._fragment_at(int(epoch), slot), position[here] - index[slot]
        return self._rows_at(epochs, fragment, row)

    def runs(
        self, lanes: NDArray[np.int64], first: NDArray[np.int64], end: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], Rows, NDArray[np.int64]]:
        """Spans of numbers, each of a lane from `first` up to `end` (all [N]), as runs of consecutive rows of
        one fragment.

        Returns:
            For all runs, by span and then by number: the index of its span, its first row, its length.
        """
        parts = []
        first_epoch, last_epoch = first // self.lane_rows, (end - 1) // self.lane_rows
        for epoch in range(int(first_epoch.min()), int(last_epoch.max()) + 1):
            span = np.flatnonzero((first < end) & (first_epoch <= epoch) & (epoch <= last_epoch))
            epoch_start = (
                epoch - lanes[span]
            ) * self.lane_rows  # numbers less this are positions in the epoch
            begin = np.maximum(first[span], epoch * self.lane_rows) - epoch_start
            stop = np.minimum(end[span], (epoch + 1) * self.lane_rows) - epoch_start
            index = self._index(epoch)
            low = np.searchsorted(index, begin, side="right") - 1
            num_slots = np.searchsorted(index, stop - 1, side="right") - low
            of_span = np.repeat(np.arange(len(span)), num_slots)
            slot = ranges(num_slots) + low[of_span]
            lower, upper = np.maximum(index[slot], begin[of_span]), np.minimum(index[slot + 1], stop[of_span])
            used = upper > lower  # a fragment shorter than a row may lie between two others
            slot, lower, upper = slot[used], lower[used], upper[used]
            rows = self._rows_at(
                np.full(len(slot), epoch), self._fragment_at(epoch, slot), lower - index[slot]
            )
            parts.append((span[of_span[used]], rows, upper - lower))
        spans = np.concatenate([spans for spans, _, _ in parts])
        lengths = np.concatenate([lengths for _, _, lengths in parts])
        by_span = np.argsort(spans, kind="stable")
        return spans[by_span], Rows.join([rows for _, rows, _ in parts])[by_span], lengths[by_span]

    def remainder(self) -> dict[str, int]:
        """What an epoch leaves out: `rows`, `tokens` (those of the rows included), `fragments` (shorter than
        a row).
        """
        tokens = self._num_tokens[self._fragments]
        targets = int(tokens.sum()) - int((tokens > 0).sum())  # a fragment's first token has none before it
        trained = (self.rows - self.left_rows) * self._seq_len
        return {
            "rows": self.left_rows,
            "tokens": targets - trained,
            "fragments": int((self._rows == 0).sum()),
        }

    def _rows_at(self, epoch: NDArray[np.int64], fragment: NDArray[np.int64], row: NDArray[np.int64]) -> Rows:
        # The cut of a fragment moves by what its rows leave over at most, so their number stays.
        spare = (self._num_tokens[fragment] - 1) % self._seq_len
        cut = below(combine(self._key, epoch, fragment), spare + 1)
        return Rows(np.full(len(row), self._source), epoch, fragment, row, cut + row * self._seq_len)

    def _fragment_at(self, epoch: int, slot: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._fragments[permute(slot, len(self._fragments), combine(self._key, epoch))]

    def _index(self, epoch: int) -> NDArray[np.int64]:
        """[F + 1]: rows before each fragment in the epoch's order."""
        with self._lock:
            if epoch not in self._indices:
                while len(self._indices) >= KEPT_INDICES:
                    self._indices.popitem(last=False)
                self._indices[epoch] = self._make_index(epoch)
            self._indices.move_to_end(epoch)
            return self._indices[epoch]

    def _make_index(self, epoch: int) -> NDArray[np.int64]:
        size, key = len(self._rows), combine(self._key, epoch)
        index = np.zeros(size + 1, np.int64)
        for begin in range(0, size, CHUNK):
            slot = np.arange(begin, min(begin + CHUNK, size))
            index[begin + 1 : begin + 1 + len(slot)] = self._rows[permute(slot, size, key)]
        return np.cumsum(index, out=index)


def rows_of(num_tokens: NDArray[np.int64], seq_len: int) -> NDArray[np.int32]:
    """Rows of fragments: each has `seq_len` tokens with a loss and one before them."""
    return (np.maximum(num_tokens - 1, 0) // seq_len).astype(np.int32)


def ranges(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, … up to each length, one after another."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
