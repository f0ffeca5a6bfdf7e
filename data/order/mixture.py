"""Which source each row of each step comes from: exact shares in every step, and counts in closed form.

Legend: B rows per step, U lanes, k = B / U rows per lane and step, S sources, M points on a circle.

A row of step s is a point on a circle of M points; each source owns an arc as long as its weight. The B
points of a step lie at equal distances M / B, so an arc of w * M holds floor(w * B) or ceil(w * B) of them:
each source's share is exact to within one row in every step, and, since every U-th of them belongs to one
lane, to within one row in every lane's part of the step too.

From step to step the points move by the radical inverse of s in base b (van der Corput 1935), b being the
least prime that does not divide B. Because b and B have no common factor, the points of any aligned run of
b**j steps again lie at equal distances, in one lane as in all: shares over many steps are as even as they can
be, and the rows that a source gave to a lane before step s are a sum over the digits of s, without a loop
over steps.

All integers, all exact. M = B * b**J with b**J about 2**32, so a weight is exact to 1 / M, about 1e-11 at B =
16.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data.order.permutation import key_of, permute

# b**J, the steps after which the points repeat, stays below this: all products then fit 63 bits up to 2**20
# rows per step.
LONGEST_PERIOD = 2**32
LARGEST_BATCH = 2**20
"""Most rows per step."""


class Mixture:
    """The sources of all rows of a run, from step 0 on.

    Args:
        rows_per_step: B, a multiple of `lanes`, at most 2**20.
        lanes: U.
        schedule: (first step, a weight of zero or more per source), ascending, the first at step 0. Weights
            are scaled to add up to 1.
        seed: Decides which lane has which points.
    """

    def __init__(
        self, *, rows_per_step: int, lanes: int, schedule: Sequence[tuple[int, Sequence[float]]], seed: int
    ) -> None:
        assert rows_per_step % lanes == 0 and rows_per_step <= LARGEST_BATCH, (rows_per_step, lanes)
        assert schedule and schedule[0][0] == 0, schedule
        self.rows_per_lane = rows_per_step // lanes
        self._base = least_prime_not_dividing(rows_per_step)
        self._num_digits = int(np.log(LONGEST_PERIOD) / np.log(self._base))
        self._powers = self._base ** np.arange(self._num_digits)  # [J]
        self._mirrored_powers = self._powers[::-1]
        self.period = self._base**self._num_digits
        """Steps after which the points repeat; steps beyond it are refused."""
        self._rows_per_step, self._lanes = rows_per_step, lanes
        self._circle = rows_per_step * self.period
        self._gap = self._circle // self.rows_per_lane  # between the points of one lane in one step
        lattice = permute(np.arange(lanes), lanes, key_of("mixture lanes", seed))
        self._lane_start = lattice * self.period  # [U]
        self._starts = np.array([step for step, _ in schedule], np.int64)
        self._arcs = np.stack([self._arc_bounds(weights) for _, weights in schedule])  # [schedule, S + 1]
        # Rows given to each lane before each change of weights, less what the new weights would have given by
        # then.
        self._carried = np.zeros((len(schedule), lanes, self._arcs.shape[1] - 1), np.int64)
        every_lane = np.arange(lanes)
        for number in range(1, len(schedule)):
            step = np.full(lanes, self._starts[number])
            before = self._carried[number - 1] + self._constant_counts(step, every_lane, number - 1)
            self._carried[number] = before - self._constant_counts(step, every_lane, number)

    def sources(self, step: ArrayLike, lane: ArrayLike) -> NDArray[np.int64]:
        """Source of each of the k rows of (step, lane): the broadcast shape of both, then k."""
        steps, lanes = np.broadcast_arrays(np.asarray(step, np.int64), np.asarray(lane, np.int64))
        self._check(steps)
        point = self._lane_start[lanes] + self._rows_per_step * self._radical_inverse(steps)
        points = (point[..., None] + self._gap * np.arange(self.rows_per_lane)) % self._circle
        segment = np.searchsorted(self._starts, steps, side="right") - 1
        chosen = np.empty(points.shape, np.int64)
        for number in np.unique(segment):
            here = segment == number
            chosen[here] = np.searchsorted(self._arcs[number], points[here], side="right") - 1
        return chosen

    def counts_before(self, step: ArrayLike, lane: ArrayLike) -> NDArray[np.int64]:
        """Rows that each source gave to a lane in all steps before `step`: the broadcast shape of both, then
        S.
        """
        steps, lanes = np.broadcast_arrays(np.asarray(step, np.int64), np.asarray(lane, np.int64))
        self._check(steps)
        segment = np.searchsorted(self._starts, steps, side="right") - 1
        counts = np.empty((*steps.shape, self._arcs.shape[1] - 1), np.int64)
        for number in np.unique(segment):
            here = segment == number
            counts[here] = self._carried[number, lanes[here]] + self._constant_counts(
                steps[here], lanes[here], number
            )
        return counts

    def _arc_bounds(self, weights: Sequence[float]) -> NDArray[np.int64]:
        """Arc of source i: points from bounds[i] up to bounds[i + 1]; every point belongs to one."""
        scaled = np.ldexp(
            weights, -np.frexp(max(weights))[1]
        )  # below 1, exactly: the sum of large ones overflows
        upto = np.cumsum(scaled)
        return np.concatenate([[0], np.round(upto / upto[-1] * self._circle).astype(np.int64)])

    def _constant_counts(
        self, steps: NDArray[np.int64], lanes: NDArray[np.int64], number: int
    ) -> NDArray[np.int64]:
        """Rows [N, S] given before `steps` [N] to `lanes` [N] had the weights `number` held from step 0 on.

        Digit d at position j of a step stands for d runs of b**j steps. The points of a lane in such a run
        lie at distances gap / b**j; the digits above j say where they begin.
        """
        digits = self._digits(steps)  # [N, J]
        mirrored = digits * self._mirrored_powers
        above = mirrored.sum(axis=1, keepdims=True) - np.cumsum(mirrored, axis=1)
        run = np.arange(self._base - 1)
        begin = above[..., None] + run * self._mirrored_powers[:, None]  # [N, J, b - 1]
        distance = (self._gap // self._powers)[:, None, None]  # [J, 1, 1]
        offset = (self._lane_start[lanes, None, None] + self._rows_per_step * begin)[..., None] % distance
        below = (
            self._arcs[number] - offset + distance - 1
        ) // distance  # [N, J, b - 1, S + 1]: points below each bound
        given = np.diff(below, axis=-1) * (run < digits[..., None])[..., None]
        return given.sum(axis=(1, 2))

    def _radical_inverse(self, steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """The digits of `steps` in base b in reverse order, as a number below b**J."""
        return (self._digits(steps) * self._mirrored_powers).sum(axis=-1)

    def _digits(self, steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """Digits in base b, the lowest first: the shape of `steps`, then J."""
        return steps[..., None] // self._powers % self._base

    def _check(self, steps: NDArray[np.int64]) -> None:
        if steps.size and not 0 <= steps.min() <= steps.max() < self.period:
            raise ValueError(
                f"mixture: steps lie in 0..{self.period - 1:,}, not {steps.min()}..{steps.max():,}"
            )


def least_prime_not_dividing(number: int) -> int:
    """2 for odd numbers, 3 for powers of two, 5 for 6, 12 and 24, …"""
    # The product of these primes is beyond the largest number of rows per step.
    return next(prime for prime in (2, 3, 5, 7, 11, 13, 17, 19) if number % prime)
