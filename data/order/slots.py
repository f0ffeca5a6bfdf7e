"""The places of a run: for each (step, lane, place), the source its row comes from and which of the lane's
rows of that source it is.

Legend: k places per lane and step, S sources, L lanes asked for, N steps asked for.

A lane takes the rows of each source in turn: number 0, 1, 2, … over all epochs. Within a window (some steps
of one lane) the numbers of a source are permuted among the places that the mixture gives to that source.
Which fragment a number stands for is the business of data/order/order.py; none is needed here, so that a reader of
one window can do this part on its own.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from data.order.mixture import Mixture
from data.order.permutation import combine, key_of, permute

IntOrArray = TypeVar("IntOrArray", int, NDArray[np.int64])


@dataclass(frozen=True)
class Slots:
    """All places of a run. Small enough to travel with every read task."""

    mixture: Mixture
    window_steps: int
    seed: int

    def bounds(self, window: IntOrArray) -> tuple[IntOrArray, IntOrArray]:
        """First step of a window, and the first one after it."""
        return window * self.window_steps, (window + 1) * self.window_steps

    def window_of(self, step: int) -> int:
        return step // self.window_steps

    def numbers(
        self, start: int, stop: int, lanes: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and number of each place of the steps from `start` up to `stop`, which lie in one window.

        Returns:
            (sources, numbers), both [L, N, k].
        """
        window = self.window_of(start)
        begin, end = self.bounds(window)
        assert start < stop <= end, (start, stop, self.window_steps)
        sources = self.mixture.sources(np.arange(start, stop), lanes[:, None])  # [L, N, k]
        first, before, after = self.mixture.counts_before(np.array([begin, start, end])[:, None], lanes)
        lane, source = np.indices(sources.shape)[0], sources
        # Each place's rank among the lane's places of its source, in the asked steps and then in the window.
        rank = np.empty_like(sources)
        for each in np.unique(sources):
            here = sources == each
            rank[here] = (np.cumsum(here.reshape(len(lanes), -1), axis=1) - 1).reshape(here.shape)[here]
        rank += (before - first)[lane, source]
        size = (after - first)[lane, source]
        keys = combine(key_of("window", self.seed), window, lanes[:, None], np.arange(first.shape[1]))
        return sources, first[lane, source] + permute(rank, size, keys[lane, source])
