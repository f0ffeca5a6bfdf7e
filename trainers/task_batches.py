"""Which records a step trains: arithmetic from the seed and the step, as in pretraining, over records in memory."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

WINDOW_STEPS = 8
"""Steps whose records are dealt out by length, so that a batch pads little: one 8th of the padding at 30 tokens."""


class RecordOrder:
    """Rows of each step: epochs joined end to end, each a permutation of all records; every record once an
    epoch.

    Within a window of steps, records of like length share a step, and the steps of the window come in random order.
    """

    def __init__(self, lengths: Sequence[int], rows_per_step: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._seed = seed
        self.rows_per_step = min(rows_per_step, len(lengths))
        self._window = lru_cache(2)(self._make_window)

    def rows(self, step: int) -> list[int]:
        """Indices of the records that step `step` (from 0) trains."""
        return self._window(step // WINDOW_STEPS)[step % WINDOW_STEPS].tolist()

    def _make_window(self, window: int) -> np.ndarray:
        """[WINDOW_STEPS, rows_per_step] indices."""
        size, num = self.rows_per_step * WINDOW_STEPS, len(self._lengths)
        places = np.arange(window * size, (window + 1) * size)
        epochs = range(places[0] // num, places[-1] // num + 1)
        joined = np.concatenate(
            [np.random.default_rng([self._seed, epoch]).permutation(num) for epoch in epochs]
        )
        rows = joined[places - epochs[0] * num]
        by_length = rows[np.argsort(self._lengths[rows], kind="stable")].reshape(WINDOW_STEPS, -1)
        return by_length[np.random.default_rng([self._seed, window, 1]).permutation(WINDOW_STEPS)]


def by_length(lengths: Sequence[int], rows_per_batch: int) -> list[list[int]]:
    """Batches for evaluation: all records, the longest first, so that what does not fit fails at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    return [order[i : i + rows_per_batch] for i in range(0, len(order), rows_per_batch)]
