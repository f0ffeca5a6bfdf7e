"""The two phases of a sweep: the search, and the best points once more with other seeds."""

import math
import time
from collections.abc import Sequence

from rich.console import Console

from cluster.storage.uris import Store
from tune.search.config import SweepRunConfig
from tune.search.experiment import Experiment
from tune.search.measure import Measured
from tune.search.proposals import Proposals
from tune.search.space import Point, SearchSpace
from tune.sweeps.finalists import Finalist, best_points, rank, record_searched
from tune.trials.records import TrialRecord, read_trials

_STATUS = ("finished", "stopped", "failed")


class ProgressLine:
    """Prints how a sweep stands whenever a trial ends."""

    def __init__(
        self, console: Console, measure: Measured, total: int, earlier: Sequence[TrialRecord] = ()
    ) -> None:
        """`earlier`: trials that had ended before this start; they count, and say nothing of its speed."""
        self._console, self._measure, self._total = console, measure, total
        self._started = time.monotonic()
        self._running: set[str] = set()
        self._ended = {record.name: record for record in earlier}
        self._earlier = len(self._ended)
        if earlier:
            console.print(f"going on: {len(earlier)} of {total} trials had ended", highlight=False)

    def __call__(self, record: TrialRecord) -> None:
        if record.status == "unfinished":
            self._running.add(record.name)
            return
        self._running.discard(record.name)
        self._ended[record.name] = record
        counts = {status: sum(r.status == status for r in self._ended.values()) for status in _STATUS}
        scores = [r.score for r in self._ended.values() if r.score is not None and math.isfinite(r.score)]
        seconds = time.monotonic() - self._started
        left = self.seconds_left(seconds)
        told = ", ".join(f"{number} {status}" for status, number in counts.items())
        best = f"{self._measure.oriented(max(scores)):.4f}" if scores else "none yet"
        self._console.print(
            f"trials: {len(self._running)} running, {told} of {self._total}; "
            f"best {self._measure.judged_by} {best}; "
            f"{seconds / 60:.1f} min, about {left / 60:.1f} min left",
            highlight=False,
        )

    def seconds_left(self, seconds: float) -> float:
        """At the rate of this start, which has lasted so long."""
        ended_now = len(self._ended) - self._earlier
        return seconds / max(1, ended_now) * max(0, self._total - len(self._ended))


def living_nodes() -> list[dict[str, float]]:
    """The resources of each node of the session."""
    from tune.trials.trials import nodes  # here: Ray reads its variables when it is imported

    return nodes()


def search(
    config: SweepRunConfig,
    experiment: Experiment,
    store: Store,
    space: SearchSpace,
    *,
    first_seed: int,
    concurrent: int,
    measure: Measured,
    console: Console,
) -> list[Finalist]:
    """Both phases, from where the sweep is; the winner first.

    Raises:
        SystemExit: trials are left that have not ended, or none came to a score.
    """
    from tune.trials.trials import run_trials  # here: Ray reads its variables when it is imported

    known = read_trials(store)
    searched = [r for r in known if r.seed == first_seed]
    ended = [(r.point, r.score) for r in searched if r.status != "unfinished"]
    proposals = Proposals(space, config.search, config.trials, config.seed, ended)
    unfinished = [r.point for r in searched if r.status == "unfinished"]

    def ask() -> tuple[Point, int] | None:
        if unfinished:
            return proposals.adopt(unfinished.pop(0)), first_seed
        point = proposals.propose()
        return None if point is None else (point, first_seed)

    earlier = [r for r in searched if r.status != "unfinished"]
    progress = ProgressLine(console, measure, config.trials, earlier)

    def tell(record: TrialRecord) -> None:
        if record.status != "unfinished":
            proposals.learn(record.point, record.score)
        progress(record)

    if num_trials := max(proposals.left, len(unfinished)):
        run_trials(
            config, experiment, store, ask, tell,
            first_number=len(known) + 1, num_trials=num_trials, concurrent=concurrent, early_stopping=True,
        )  # fmt: skip
    refuse_half_searched(store, proposals, first_seed)
    best = best_points(read_trials(store), first_seed, config.best)
    if not best:
        raise SystemExit(f"no trial of {store.uri} reached its end with a score; see trials/NAME/error.txt")
    seeds = [first_seed + number for number in range(config.seeds)]
    done = {(repr(r.point), r.seed) for r in read_trials(store) if r.status in ("finished", "failed")}
    wanted = [(point, seed) for point in best for seed in seeds if (repr(point), seed) not in done]
    if wanted:
        remaining = list(wanted)
        run_trials(
            config, experiment, store, lambda: remaining.pop(0) if remaining else None,
            ProgressLine(console, measure, len(wanted)),
            first_number=len(read_trials(store)) + 1, num_trials=len(wanted), concurrent=concurrent,
            early_stopping=False,
        )  # fmt: skip
    record_searched(store, config)
    return rank(best, seeds, read_trials(store))


def refuse_half_searched(store: Store, proposals: Proposals, first_seed: int) -> None:
    """Stop before a winner is chosen, whatever made the search return before its end. Raises SystemExit."""
    begun = sum(r.seed == first_seed and r.status == "unfinished" for r in read_trials(store))
    if left := proposals.left + begun:
        raise SystemExit(
            f"the search of {store.uri} ended with {left} trials to go; the same command goes on"
        )
