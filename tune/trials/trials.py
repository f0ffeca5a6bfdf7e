"""Trials on Ray Tune: each a run of its own, stopped early where it falls behind.

A trial whose workers are Ray Train's is a driver without CPUs of its own, whose workers Tune does not see; the number
of concurrent trials is what keeps them from waiting for each other.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.train import ControllerError
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from cluster.console.errors import ConfigError
from cluster.storage.uris import StorageError, Store
from trainers.model.diverged import DivergedModelError
from tune.search.config import SweepRunConfig
from tune.search.experiment import Experiment
from tune.search.space import Point
from tune.trials.records import (
    ERROR,
    FOLDER,
    Status,
    TrialRecord,
    discard_checkpoints,
    discard_scratch,
    record_outcome,
    record_start,
    trial_name,
)

PERCENT = 100
RESTARTS = 2
"""Of a trial whose process was lost."""
ERROR_CHARACTERS = 2_000
"""Of an error that a record keeps."""
PASSING = (StorageError, RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError, ControllerError)
"""Errors that another try may not meet."""
NextTrial = Callable[[], tuple[Point, int] | None]
"""The next point and seed to try; None when there is none left."""
Tell = Callable[[TrialRecord], None]


class Deaths(tune.Callback):
    """Knows why Tune gave a trial up."""

    def __init__(self) -> None:
        self._trials: Sequence[Any] = ()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._trials = trials

    def cause(self, trial_id: str) -> str:
        """What Tune wrote down last."""
        trial = next(trial for trial in self._trials if trial.trial_id == trial_id)
        # On the driver's disk: its own getters read the storage, which the file reaches later.
        file = trial.error_file and Path(trial.error_file)
        if not file or not file.exists():
            return "it ended without a validation"
        text = file.read_text(errors="replace").rpartition("Failure # ")[2].partition("\n")[2].strip()
        return text or "it ended without a validation"

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles what it was given."""
        return {}


class Source(Searcher):
    """Hands Tune the points of a sweep, and records how trials ended."""

    def __init__(
        self, sweep: Store, ask: NextTrial, tell: Tell, first_number: int, cause: Callable[[str], str]
    ) -> None:
        super().__init__(metric="score", mode="max")
        self._sweep, self._ask, self._tell, self._number = sweep, ask, tell, first_number
        self._cause = cause
        self.ended: list[str] = []
        """Names of the trials that have ended since the start."""
        self.changed = ""
        """What is no longer as it was when the search began."""
        self._running: dict[str, tuple[TrialRecord, float]] = {}
        self._last: dict[str, dict[str, Any]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        asked = None if self.changed else self._ask()
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
        """Called once for each trial, however it ended."""
        record, started = self._running.pop(trial_id)
        # The result at which a trial is stopped comes here, and not to on_trial_result.
        last = self._last.pop(trial_id, {})
        last = result if result and "score" in result else last
        self.changed = self.changed or last.get("changed", "")
        if self.changed:
            return  # neither this end nor that of others tells of a point: the trials stay unfinished
        failure = self._failure(trial_id, record.name, error or not last)
        whole = last.get("percent", 0) >= PERCENT
        status: Status = "failed" if failure else "finished" if whole else "stopped"
        ended = replace(
            record,
            status=status,
            score=None if failure else last["best_score"],
            seconds=time.monotonic() - started,
            metrics={k.removeprefix("metrics/"): v for k, v in last.items() if k.startswith("metrics/")},
            error=failure[:ERROR_CHARACTERS],
        )
        record_outcome(self._sweep, ended)
        discard_checkpoints(self._sweep, record.name)
        self.ended.append(record.name)
        self._tell(ended)

    def _failure(self, trial_id: str, name: str, gave_up: bool) -> str:
        """Why a trial failed, by its own words or by Tune's; empty if it did not."""
        path = f"{FOLDER}/{name}/{ERROR}"
        if self._sweep.exists(path):
            return self._sweep.read(path).decode(errors="replace")
        return self._cause(trial_id) if gave_up else ""

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
    if not experiment.resources["gpu"]:
        # cluster/sessions/session.py tells Ray not to; and Tune gives a trial no environment of its own.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    scores: list[float] = []

    def report(share: float, score: float, metrics: Any) -> None:
        if not math.isfinite(score):
            return
        scores.append(score)
        percent = min(PERCENT - 1, int(PERCENT * share))
        tune.report({"score": score, "best_score": max(scores), "percent": percent, "metrics": dict(metrics)})

    folder.delete(ERROR)
    try:
        found = experiment.train(folder, point, seed, report)
        if not math.isfinite(found.score):
            raise DivergedModelError(f"the score is {found.score}")
    except Exception as error:
        if is_passing(error):
            raise  # Tune starts it again, as one whose process was lost
        if changed := experiment.changed():
            tune.report(
                {"score": -math.inf, "best_score": -math.inf, "percent": 0, "metrics": {}, "changed": changed}
            )
            return
        folder.put(ERROR, f"{type(error).__name__}: {error}".encode())
        # Not raised, for Tune would start again what fails again; and told with a score, below any rung, for Tune would
        # end the whole search over a trial that ends without one.
        tune.report({"score": -math.inf, "best_score": -math.inf, "percent": 0, "metrics": {}})
        return
    tune.report(
        {
            "score": found.score,
            "best_score": found.score,
            "percent": PERCENT,
            "metrics": dict(found.metrics),
        }
    )


def is_passing(error: BaseException) -> bool:
    """Whether an error is no fault of the point: one of the storage, of a process or node that was lost, or of workers
    that did not come together. In a trial of several workers Ray Train wraps what happened to each."""
    if isinstance(error, PASSING):
        return True
    wrapped = (
        getattr(error, name, None) for name in ("_base_exc", "health_check_failure", "cause", "__cause__")
    )
    inside = [*getattr(error, "worker_failures", {}).values(), *wrapped]
    return any(is_passing(each) for each in inside if isinstance(each, BaseException) and each is not error)


def nodes() -> list[dict[str, float]]:
    """The resources of each living node of the session."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


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
        ConfigError: what the trials start from was replaced meanwhile.
    """
    # Tune would take Ctrl-C for itself and return as if the search had come to its end.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, experiment=experiment, sweep=sweep), dict(experiment.resources)
    )
    deaths = Deaths()
    source = Source(sweep, ask, tell, first_number, deaths.cause)
    discard_scratch(sweep)  # of starts that were killed, before this one writes any
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=source,
            scheduler=scheduler(config) if early_stopping else FIFOScheduler(),
            num_samples=num_trials,
            max_concurrent_trials=concurrent,
            metric="score",
            mode="max",
        ),
        run_config=tune.RunConfig(
            # Scratch: what counts is in the trials' own folders, so a torn file of Tune's can stop nothing.
            name=f"start-{time.time_ns()}",
            storage_path=sweep.child("ray").storage_path(),
            verbose=0,
            callbacks=[deaths],
            # Of processes that are lost with their node, or killed for memory; the trial goes on from its checkpoints.
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
        ),
    )
    tuner.fit()
    discard_scratch(sweep)
    for name in source.ended:  # a trial that was stopped may have been writing one
        discard_checkpoints(sweep, name)
    if source.changed:
        raise ConfigError([source.changed])


def scheduler(config: SweepRunConfig) -> TrialScheduler:
    """Compares trials at equal shares of their steps, which a batch size may make different in number."""
    grace = max(1, round(PERCENT * config.grace))
    if config.scheduler == "asha":
        return AsyncHyperBandScheduler(
            time_attr="percent", max_t=PERCENT, grace_period=grace, reduction_factor=3
        )
    if config.scheduler == "median":
        # It would pause a trial while fewer than three others have come as far, and ours cannot go on from a pause:
        # no trial has run for longer than this slice.
        return MedianStoppingRule(
            time_attr="percent",
            grace_period=grace,
            min_samples_required=3,
            min_time_slice=math.inf,  # type: ignore[arg-type]
        )
    return FIFOScheduler()
