"""Which records a step trains: arithmetic from the seed and the step, as in pretraining, over records in memory."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

WINDOW_STEPS = 8
"""Steps whose records are dealt out by length, so that a batch pads little: one 8th of the padding at 30 tokens.
Fewer where they would take more than an epoch: copies of one record, as long as each other, would share a step."""


class RecordOrder:
    """Rows of each step: epochs joined end to end, each a permutation of all records; every record once an
    epoch.

    Within a window of steps, records of like length share a step, and the steps of the window come in random order.
    """

    def __init__(self, lengths: Sequence[int], rows_per_step: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._seed = seed
        self.rows_per_step = min(rows_per_step, len(lengths))
        self.window_steps = min(WINDOW_STEPS, len(lengths) // self.rows_per_step)
        self._window = lru_cache(2)(self._make_window)

    def rows(self, step: int) -> list[int]:
        """Indices of the records that step `step` (from 0) trains."""
        return self._window(step // self.window_steps)[step % self.window_steps].tolist()

    def _make_window(self, window: int) -> np.ndarray:
        """[window_steps, rows_per_step] indices."""
        size, num = self.rows_per_step * self.window_steps, len(self._lengths)
        places = np.arange(window * size, (window + 1) * size)
        epochs = range(places[0] // num, places[-1] // num + 1)
        joined = np.concatenate(
            [np.random.default_rng([self._seed, epoch]).permutation(num) for epoch in epochs]
        )
        rows = joined[places - epochs[0] * num]
        by_length = rows[np.argsort(self._lengths[rows], kind="stable")].reshape(self.window_steps, -1)
        return by_length[np.random.default_rng([self._seed, window, 1]).permutation(self.window_steps)]
