"""Trials on Ray Tune: each a run of its own, stopped early where it falls behind.

A trial whose workers are Ray Train's is a driver without CPUs of its own, whose workers Tune does not see; the number
of concurrent trials is what keeps them from waiting for each other.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from cluster.storage import Store
from tune.experiment import Experiment
from tune.search_space import Point
from tune.sweep_config import SweepRunConfig
from tune.trial_records import (
    ERROR,
    FOLDER,
    Status,
    TrialRecord,
    record_outcome,
    record_start,
    trial_name,
)

PERCENT = 100
NextTrial = Callable[[], tuple[Point, int] | None]
"""The next point and seed to try; None when there is none left."""
Tell = Callable[[TrialRecord], None]


class Source(Searcher):
    """Hands Tune the points of a sweep, and records how trials ended."""

    def __init__(self, sweep: Store, ask: NextTrial, tell: Tell, first_number: int) -> None:
        super().__init__(metric="score", mode="max")
        self._sweep, self._ask, self._tell, self._number = sweep, ask, tell, first_number
        self._running: dict[str, tuple[TrialRecord, float]] = {}
        self._last: dict[str, dict[str, Any]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        asked = self._ask()
        if asked is None:
            return Searcher.FINISHED
        point, seed = asked
        record = TrialRecord(trial_name(point, seed), point, seed, self._number)
        self._number += 1
        record_start(self._sweep, record)
        self._running[trial_id] = record, time.monotonic()
        self._tell(record)
        return {"point": point, "seed": seed}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """`result` is flat: its keys have slashes."""
        if "score" in result:
            self._last[trial_id] = result

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Called once for each trial, however it ended; an outcome that its process wrote stays."""
        record, started = self._running.pop(trial_id)
        # The result at which a trial is stopped comes here, and not to on_trial_result.
        last = self._last.pop(trial_id, {})
        last = result if result and "score" in result else last
        percent = last.get("percent", 0)
        status: Status = "failed" if error or not last else "finished" if percent >= PERCENT else "stopped"
        ended = replace(
            record,
            status=status,
            score=None if status == "failed" else last["best_score"],
            seconds=time.monotonic() - started,
            metrics={k.removeprefix("metrics/"): v for k, v in last.items() if k.startswith("metrics/")},
            error="it ended without a validation; see trials/NAME/error.txt" if status == "failed" else "",
        )
        record_outcome(self._sweep, ended)
        self._tell(ended)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles what it was given, which holds a console here, and would never load it."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's own records are what it goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, likewise."""


def run_trial(parameters: dict[str, Any], experiment: Experiment, sweep: Store) -> None:
    """One trial, in a process of its own."""
    point, seed = parameters["point"], parameters["seed"]
    folder = sweep.child(f"{FOLDER}/{trial_name(point, seed)}")
    scores: list[float] = []

    def report(share: float, score: float, metrics: Any) -> None:
        scores.append(score)
        percent = min(PERCENT - 1, int(PERCENT * share))
        tune.report({"score": score, "best_score": max(scores), "percent": percent, "metrics": dict(metrics)})

    try:
        found = experiment.train(folder, point, seed, report)
    except Exception as error:
        folder.put(ERROR, f"{type(error).__name__}: {error}".encode())
        raise
    tune.report(
        {
            "score": found.score,
            "best_score": found.score,
            "percent": PERCENT,
            "metrics": dict(found.metrics),
        }
    )


def run_trials(
    config: SweepRunConfig,
    experiment: Experiment,
    sweep: Store,
    ask: NextTrial,
    tell: Tell,
    *,
    first_number: int,
    num_trials: int,
    concurrent: int,
    early_stopping: bool,
) -> None:
    """Run up to `num_trials` trials. A trial that fails is recorded, and the others go on.

    Raises:
        KeyboardInterrupt: Ctrl-C; what runs is left unfinished.
    """
    # Tune would take Ctrl-C for itself and return as if the search had come to its end.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, experiment=experiment, sweep=sweep), dict(experiment.resources)
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=Source(sweep, ask, tell, first_number),
            scheduler=scheduler(config) if early_stopping else FIFOScheduler(),
            num_samples=num_trials,
            max_concurrent_trials=concurrent,
            metric="score",
            mode="max",
        ),
        run_config=tune.RunConfig(
            # Scratch: what counts is in the trials' own folders, so a torn file of Tune's can stop nothing.
            name=f"start-{time.time_ns()}",
            storage_path=sweep.child("ray").uri.removeprefix("file://"),
            verbose=0,
        ),
    )
    tuner.fit()


def scheduler(config: SweepRunConfig) -> TrialScheduler:
    """Compares trials at equal shares of their steps, which a batch size may make different in number."""
    grace = max(1, round(PERCENT * config.grace))
    if config.scheduler == "asha":
        return AsyncHyperBandScheduler(
            time_attr="percent", max_t=PERCENT, grace_period=grace, reduction_factor=3
        )
    if config.scheduler == "median":
        return MedianStoppingRule(time_attr="percent", grace_period=grace, min_samples_required=3)
    return FIFOScheduler()
