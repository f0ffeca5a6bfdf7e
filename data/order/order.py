"""Who trains what when: the rows of every step of a run, by arithmetic alone (laws L1, L2 and L3).

Legend: S sources, U lanes, k = rows per step / U, T tokens with a loss per row (`seq_len`).

A fragment of n tokens has (n - 1) // T rows of T + 1 tokens, each sharing its last token with the next one's
first. data/order/epochs.py puts a source's rows into an order for each epoch and cuts them into U lanes;
data/order/mixture.py says how many rows of which source each lane takes in each step; data/order/slots.py permutes them
within a window.

Nothing here depends on the number of workers, and no step depends on an earlier one: resuming at a step is
asking for it.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from cluster.console.errors import UserError
from data.order.epochs import Epochs, Rows, ranges
from data.order.mixture import LARGEST_BATCH, Mixture
from data.order.permutation import key_of
from data.order.slots import Slots
from data.shards.manifest import Manifest

# More lanes let more workers take part; fewer make longer windows at the same memory. 64 is eight nodes of
# eight GPUs.
AUTOMATIC_LANES = 64
# A window reads fragments (2 MiB each) whole, of each source also the two that reach over its ends: 4 MiB a source read
# 1.5 bytes for each one used (4 MiB for 22 sources: 11.7). A machine's object store holds two windows of each of its
# lanes: 64 take 2 GiB at most, all that a local session has; 22 sources then read 3.7, 50 read 7.2 (bench_order.py).
WINDOW_BYTES, LARGEST_WINDOW_BYTES = 4 * 2**20, 16 * 2**20

ORDER_VERSION = "order-1"


class OrderError(UserError, ValueError):
    """The order cannot be made from this manifest and configuration; one line for each problem."""


@dataclass(frozen=True, kw_only=True)
class WeightChange:
    """New weights of the sources from a step on."""

    step: int
    """First step with these weights."""
    weights: dict[str, float]
    """Share of each source in every step, as parts of their sum; 0 leaves a source out."""


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """Which row is trained at which step. Every field changes the order; the number of workers does not."""

    seed: int = 0
    """Keys all permutations."""
    lanes: int = 0
    """Strands that an epoch is cut into, the most workers that can train; divides the rows per step. 0: its
    largest divisor up to 64.
    """
    window_steps: int = 0
    """Steps within which a lane's rows are permuted, read as one block. 0: as many as fill 4 MiB a lane for each
    source with a weight, 16 MiB at most, and no more than an epoch has. Longer ones read less, in more memory.
    """
    weights: dict[str, float] = field(default_factory=dict)
    """Share of each source in every step, as parts of their sum. Empty: in proportion to the sources' rows,
    so all end their epochs together.
    """
    schedule: tuple[WeightChange, ...] = ()
    """Changes of the weights, by step."""

    def problems(self, at: str) -> Iterator[str]:
        """A line for each value that cannot be right whatever the corpus."""
        for name in ("lanes", "window_steps"):
            if getattr(self, name) < 0:
                yield f"{at}.{name}={getattr(self, name)} is negative; use 0 to have it chosen"
        steps = [change.step for change in self.schedule]
        if steps != sorted(set(steps)) or (steps and steps[0] < 1):
            yield f"{at}.schedule has the steps {steps}; they must be greater than 0 and ascend"
        if self.schedule and not self.weights:
            yield f"{at}.schedule changes weights that {at}.weights does not give for step 0"
        for name, weights in [(f"{at}.weights", self.weights), *_named_changes(at, self.schedule)]:
            bad = [weight for weight in weights.values() if not (math.isfinite(weight) and weight >= 0)]
            if bad or (weights and not any(weights.values())):
                yield f"{name}={weights}: weights are finite, not negative, and not all zero"

    def source_problems(self, at: str, sources: Sequence[str]) -> Iterator[str]:
        """A line for each weight without a source, and each source without a weight."""
        for name, weights in [(f"{at}.weights", self.weights), *_named_changes(at, self.schedule)]:
            if weights:
                yield from _misnamed(name, weights, sources)

    def batch_problems(self, at: str, *, rows_per_step: int, workers: int) -> Iterator[str]:
        """A line for each value that does not go with the batch and the (largest) number of workers."""
        if not 1 <= rows_per_step <= LARGEST_BATCH:
            yield f"rows per step {rows_per_step:,} is outside 1..{LARGEST_BATCH:,}"
            return
        lanes = self.lanes or largest_divisor(rows_per_step, AUTOMATIC_LANES)
        if rows_per_step % lanes:
            nearest = max(lanes, round(rows_per_step / lanes) * lanes)
            yield f"{at}.lanes={lanes} does not divide rows per step {rows_per_step:,}; nearest: {nearest:,}"
        elif workers > lanes:
            remedy = (
                f"set {at}.lanes to a divisor of {rows_per_step:,} from {workers} on, or take {lanes} workers"
            )
            yield f"{workers} workers cannot share {at}.lanes={lanes}: {remedy}"


@dataclass(frozen=True)
class Window:
    """Some steps of one lane with all that listing their rows needs: a few KiB, for a reader elsewhere."""

    slots: Slots
    lane: int
    start: int
    stop: int
    """Steps `start` up to `stop`, in one window."""
    first: NDArray[np.int64]
    """[S]: the least number of each source in the whole window."""
    size: NDArray[np.int64]
    """[S]: how many there are."""
    runs: Rows
    """First rows of the runs of consecutive rows that these numbers stand for, source after source."""
    num_rows: NDArray[np.int64]
    """Length of each run."""
    seq_len: int

    def rows(self) -> Rows:
        """The rows of all steps, k of each step after another."""
        sources, numbers = self.slots.numbers(self.start, self.stop, np.array([self.lane]))
        within = ranges(self.num_rows)
        pool = self.runs[np.repeat(np.arange(len(self.num_rows)), self.num_rows)]
        pool = replace(pool, row=pool.row + within, start=pool.start + within * self.seq_len)
        begin = np.cumsum(self.size) - self.size
        return pool[(begin[sources] + numbers - self.first[sources]).reshape(-1)]


class Order:
    """The order of one run over the training split.

    Args:
        manifest: The prepared corpus.
        config: Seed, lanes, window, weights.
        seq_len: T.
        rows_per_step: Of all workers together.

    Raises:
        OrderError: a source has too few rows, is unknown or missing in the weights, or the sizes do not fit.
    """

    def __init__(self, manifest: Manifest, config: OrderConfig, *, seq_len: int, rows_per_step: int) -> None:
        problems = [
            *config.problems("order"),
            *config.batch_problems("order", rows_per_step=rows_per_step, workers=1),
        ]
        if problems:
            raise OrderError("\n".join(problems))
        self.seq_len, self.rows_per_step = seq_len, rows_per_step
        self.lanes = config.lanes or largest_divisor(rows_per_step, AUTOMATIC_LANES)
        self.rows_per_lane = rows_per_step // self.lanes
        self.source_names = manifest.sources
        self.epochs = [
            Epochs(
                source,
                manifest.select("train", name),
                manifest.fragments.num_tokens,
                lanes=self.lanes,
                seq_len=seq_len,
                key=key_of("epochs", config.seed, name),
            )
            for source, name in enumerate(manifest.sources)
        ]
        """One for each source."""
        schedule = self._checked_schedule(config)
        mixture = Mixture(rows_per_step=rows_per_step, lanes=self.lanes, schedule=schedule, seed=config.seed)
        token_bytes = np.dtype(manifest.token_dtype).itemsize
        window_steps = config.window_steps or self._automatic_window(token_bytes, schedule)
        self.slots = Slots(mixture, window_steps, config.seed)
        self.window_bytes = window_steps * self.rows_per_lane * (seq_len + 1) * token_bytes
        """Tokens of one window of one lane, in bytes."""
        self.digest = _digest(
            manifest.digest, seq_len, rows_per_step, self.lanes, window_steps, schedule, config.seed
        )
        """16 hex digits: equal where all steps' rows are equal."""

    def step_rows(self, step: int, lanes: Sequence[int] | NDArray[np.int64] | None = None) -> Rows:
        """Rows of one step: k of each lane after another, of all lanes unless some are named."""
        chosen = np.arange(self.lanes) if lanes is None else np.asarray(lanes, np.int64)
        sources, numbers = (places.reshape(-1) for places in self.slots.numbers(step, step + 1, chosen))
        lane = np.repeat(chosen, self.rows_per_lane)
        parts, places = [], []
        for source in np.unique(sources):
            here = np.flatnonzero(sources == source)
            parts.append(self.epochs[source].find(lane[here], numbers[here]))
            places.append(here)
        return Rows.join(parts)[np.argsort(np.concatenate(places))]

    def windows(
        self,
        windows: Sequence[int],
        lanes: Sequence[int],
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> list[Window]:
        """Pairs of a window and a lane, cut to the steps from `start` up to `stop` where these lie inside."""
        number, lane = np.asarray(windows, np.int64), np.asarray(lanes, np.int64)
        begin, after = self.slots.bounds(number)
        first, end = self.slots.mixture.counts_before(np.stack([begin, after]), lane)  # [N, S]
        runs = [
            self.epochs[source].runs(lane, first[:, source], end[:, source])
            for source in np.flatnonzero((end > first).any(axis=0))
        ]
        of_window = np.concatenate([span for span, _, _ in runs])
        order = np.argsort(of_window, kind="stable")
        rows = Rows.join([rows for _, rows, _ in runs])[order]
        lengths = np.concatenate([lengths for _, _, lengths in runs])[order]
        cuts = np.searchsorted(of_window[order], np.arange(len(number) + 1))
        return [
            Window(
                slots=self.slots,
                lane=int(lane[i]),
                start=max(start, int(begin[i])),
                stop=int(after[i]) if stop is None else min(stop, int(after[i])),
                first=first[i],
                size=end[i] - first[i],
                runs=rows[cuts[i] : cuts[i + 1]],
                num_rows=lengths[cuts[i] : cuts[i + 1]],
                seq_len=self.seq_len,
            )
            for i in range(len(number))
        ]

    def epochs_before(self, step: int) -> dict[str, float]:
        """How many epochs of each source are trained before `step`."""
        taken = self.slots.mixture.counts_before(step, np.arange(self.lanes)).sum(axis=0).tolist()
        return {
            name: rows / max(1, epochs.lane_rows * self.lanes)
            for name, rows, epochs in zip(self.source_names, taken, self.epochs, strict=True)
        }

    def remainder(self) -> dict[str, dict[str, int]]:
        """What each epoch of each source leaves out (see `Epochs.remainder`), to be printed before a run."""
        return {name: epochs.remainder() for name, epochs in zip(self.source_names, self.epochs, strict=True)}

    def _automatic_window(self, token_bytes: int, schedule: list[tuple[int, list[float]]]) -> int:
        num_sources = int(np.any([weights for _, weights in schedule], axis=0).sum())  # weighted at some step
        window_bytes = min(num_sources * WINDOW_BYTES, LARGEST_WINDOW_BYTES)
        row_bytes = self.rows_per_lane * (self.seq_len + 1) * token_bytes
        # Permuting over more than an epoch would train some rows twice before others once.
        epoch_steps = max(1, sum(epochs.lane_rows for epochs in self.epochs) // self.rows_per_lane)
        windows = math.ceil(epoch_steps * row_bytes / window_bytes)
        return math.ceil(epoch_steps / windows)

    def _checked_schedule(self, config: OrderConfig) -> list[tuple[int, list[float]]]:
        """(step, weight of each source of the manifest) with the weights of step 0 first."""
        first = config.weights or self._weights_by_rows()
        named = [("order.weights", 0, first)]
        named += [
            (name, change.step, change.weights)
            for (name, _), change in zip(
                _named_changes("order", config.schedule), config.schedule, strict=True
            )
        ]
        problems = [line for name, _, weights in named for line in self._weight_problems(name, weights)]
        if problems:
            raise OrderError("\n".join(dict.fromkeys(problems)))
        return [
            (step, [float(weights.get(name, 0)) for name in self.source_names]) for _, step, weights in named
        ]

    def _weights_by_rows(self) -> dict[str, float]:
        return {name: float(epochs.rows) for name, epochs in zip(self.source_names, self.epochs, strict=True)}

    def _weight_problems(self, at: str, weights: Mapping[str, float]) -> Iterator[str]:
        if not any(epochs.rows for epochs in self.epochs):
            yield f"the training split has no row of seq_len={self.seq_len:,} tokens; shorten it or add text"
            return
        yield from _misnamed(at, weights, self.source_names)
        for name, epochs in zip(self.source_names, self.epochs, strict=True):
            if weights.get(name) and not epochs.lane_rows:
                remedy = "lower order.lanes or seq_len, or set its weight to 0"
                rows = f"{epochs.rows} rows of {self.seq_len:,} tokens"
                yield f"source {name} has {rows} for {self.lanes} lanes; {remedy}"


def largest_divisor(number: int, most: int) -> int:
    """Largest divisor of `number` that is not above `most`."""
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)


def _misnamed(at: str, weights: Mapping[str, float], sources: Sequence[str]) -> Iterator[str]:
    for name in weights:
        if name not in sources:
            near = difflib.get_close_matches(name, sources, n=1, cutoff=0.0)
            yield f"{at}.{name}: the corpus has no such source; nearest: {near[0]}"
    for name in sources:
        if name not in weights:
            yield f"{at} has no weight for the source {name}; 0 leaves it out"


def _named_changes(at: str, schedule: Sequence[WeightChange]) -> list[tuple[str, dict[str, float]]]:
    return [(f"{at}.schedule[{i}].weights", change.weights) for i, change in enumerate(schedule)]


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps([ORDER_VERSION, *parts], allow_nan=False).encode()).hexdigest()[:16]
