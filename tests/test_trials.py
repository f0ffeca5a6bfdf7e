"""Trials on a real Ray: how each ends is recorded, whatever happens to its process or to the driver."""

import os
import signal
import threading
import time
from collections.abc import Callable
from unittest.mock import Mock

import pytest
import trial_experiments
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from rich.console import Console
from trial_experiments import Doing, Training

from cluster.storage.uris import Store, open_store
from tune.search.config import SweepRunConfig
from tune.search.measure import Measure
from tune.search.space import Dimension, SearchSpace
from tune.sweeps.phases import search
from tune.trials.interrupts import interrupt
from tune.trials.records import (
    TrialRecord,
    discard_scratch,
    read_trials,
    record_outcome,
    record_start,
    trial_name,
)
from tune.trials.trials import scheduler

pytestmark = pytest.mark.cluster
RATES = (0.1, 0.2, 0.3)
FALLING = SearchSpace((Dimension("rate", "choice", (0.4, 0.3, 0.2, 0.1), {}),))
SCORE = Measure("made", "score")
SPACE = SearchSpace((Dimension("rate", "choice", RATES, {}),))


@pytest.fixture
def sweep(ray_session: None, tmp_path) -> Store:
    trial_experiments.registered()
    return open_store(str(tmp_path / "sweep"))


def searched(sweep: Store, training: Training, **changes):
    config = SweepRunConfig(**({"search": "grid", "trials": 3, "best": 1, "seeds": 1} | changes))
    return search(
        config, Doing(training), sweep, SPACE, first_seed=0, concurrent=2, measure=SCORE,
        console=Console(quiet=True),
    )  # fmt: skip


def when(condition: Callable[[], bool], then: Callable[[], None]) -> threading.Thread:
    """Do something once a condition holds, in a thread."""

    def look() -> None:
        ends = time.monotonic() + 60
        while not condition() and time.monotonic() < ends:
            time.sleep(0.1)
        then()

    thread = threading.Thread(target=look)
    thread.start()
    return thread


def test_ctrl_c_ends_the_search_before_a_winner_is_chosen(sweep):
    began = when(
        lambda: any(info.path.endswith("began") for info in sweep.list("trials/")),
        lambda: os.kill(os.getpid(), signal.SIGINT),
    )
    # A shell starts what runs in the background with Ctrl-C ignored; the entry takes it all the same.
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            searched(sweep, trial_experiments.going_on_for_long)
    finally:
        signal.signal(signal.SIGINT, before)
    began.join()
    assert {trial.status for trial in read_trials(sweep)} == {"unfinished"}
    left = [info.path for info in sweep.list("ray/start-")]
    discard_scratch(sweep)
    assert left and not sweep.list("ray/start-")


def test_a_search_that_returned_before_its_end_chooses_nobody(sweep, monkeypatch):
    from tune.trials import trials

    real = trials.run_trials
    monkeypatch.setattr(trials, "run_trials", lambda *args, **more: real(*args, **(more | {"num_trials": 2})))
    with pytest.raises(SystemExit, match="ended with 1 trials to go"):
        searched(sweep, trial_experiments.scored_by_rate)
    monkeypatch.undo()
    assert searched(sweep, trial_experiments.scored_by_rate)[0].point == {"rate": 0.3}


def test_a_trial_whose_process_is_killed_is_started_again(sweep):
    assert searched(sweep, trial_experiments.killed_once)[0].scores == (0.3,)
    assert [trial.status for trial in read_trials(sweep)] == ["finished"] * 3


@pytest.mark.parametrize(
    ("rule", "ended"),
    [
        ("asha", ["finished", "stopped", "stopped", "stopped"]),
        ("median", ["finished", "finished", "finished", "stopped"]),  # of three others at least
    ],
)
def test_a_trial_that_falls_behind_is_stopped_and_leaves_no_checkpoint(sweep, rule, ended):
    config = SweepRunConfig(search="grid", trials=4, best=1, seeds=1, scheduler=rule)
    experiment, console = Doing(trial_experiments.scored_step_by_step), Console(quiet=True)
    [winner] = search(
        config, experiment, sweep, FALLING, first_seed=0, concurrent=1, measure=SCORE, console=console
    )
    assert winner.point == {"rate": 0.4}
    assert [trial.status for trial in read_trials(sweep)] == ended
    assert not [info.path for info in sweep.list("trials/") if "/checkpoints/" in info.path]


def test_tpe_learns_from_trials_of_an_earlier_start_and_the_best_points_are_tried_with_other_seeds(sweep):
    space = SearchSpace((Dimension("rate", "loguniform", (1e-6, 1.0), {}),))
    for number in range(20):
        rate = 10 ** (-6 + 0.3 * number)
        score = trial_experiments.score_near_hundredth(rate)
        record = TrialRecord(trial_name({"rate": rate}, 5), {"rate": rate}, 5, number + 1, "finished", score)
        record_start(sweep, record)
        record_outcome(sweep, record)
    config = SweepRunConfig(search="tpe", trials=24, best=2, seeds=2)
    experiment, console = Doing(trial_experiments.scored_near_hundredth), Console(quiet=True)
    winner, second = search(
        config, experiment, sweep, space, first_seed=5, concurrent=2, measure=SCORE, console=console
    )
    trials = read_trials(sweep)
    proposed = [trial.point["rate"] for trial in trials if trial.seed == 5][20:]
    assert len(proposed) == 4 and all(1e-4 < rate < 1 for rate in proposed), "as at random, over six decades"
    assert {(trial.point["rate"], trial.seed) for trial in trials if trial.seed != 5} == {
        (point["rate"], 6) for point in (winner.point, second.point)
    }
    best = sorted((trial.score for trial in trials if trial.seed == 5), reverse=True)[:2]
    assert {finalist.scores[0] for finalist in (winner, second)} == set(best)
    assert all(len(finalist.scores) == 2 for finalist in (winner, second))


def test_a_lost_worker_and_a_store_that_is_away_are_no_fault_of_a_point_of_several_workers(sweep):
    """Rate 0.1 meets a store that is away, 0.2 loses a worker, 0.3 fails by itself."""
    winner, *_ = searched(sweep, trial_experiments.in_two_workers)
    trials = {trial.point["rate"]: trial for trial in read_trials(sweep)}
    assert winner.point == {"rate": 0.2}
    assert {rate: trial.status for rate, trial in trials.items()} == {
        0.1: "finished", 0.2: "finished", 0.3: "failed",
    }  # fmt: skip
    assert "no finite gradient" in trials[0.3].error
    assert len(sweep.list(f"trials/{trials[0.3].name}/try-")) == 1


def test_a_median_of_too_few_trials_pauses_none():
    rule = scheduler(SweepRunConfig(scheduler="median", grace=0.1))
    rule.set_search_properties("score", "max")
    trial, controller = Mock(trial_id="one"), Mock()
    controller.get_live_trials.return_value = [Mock(status=Trial.PENDING)]  # to whom it would make room
    for percent in (5, 50, 99):
        said = rule.on_trial_result(controller, trial, {"percent": percent, "score": 0.5})
        assert said == TrialScheduler.CONTINUE


def test_what_fails_by_itself_is_tried_once_and_recorded_with_its_error(sweep):
    with pytest.raises(SystemExit, match="no trial"):
        searched(sweep, trial_experiments.failing, scheduler="median")
    trials = read_trials(sweep)
    assert [trial.status for trial in trials] == ["failed"] * 3 and {t.score for t in trials} == {None}
    assert trials[0].error == "ValueError: no finite gradient at rate 0.1"
    assert len([info for info in sweep.list("trials/") if "/try-" in info.path]) == 3


def test_a_trial_whose_process_is_killed_each_time_fails_with_what_ray_says_of_it(sweep):
    with pytest.raises(SystemExit, match="no trial"):
        searched(sweep, trial_experiments.killed_always)
    assert "died unexpectedly" in read_trials(sweep)[0].error


def test_a_trial_without_gpus_sees_none(sweep):
    searched(sweep, trial_experiments.telling_its_gpus)
    assert {sweep.read(i.path) for i in sweep.list("trials/") if i.path.endswith("/cuda")} == {b""}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["s3", "folder"])
def test_a_search_works_in_a_store_whose_name_means_something_else_in_a_uri(
    where, ray_session, request, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "tune.trials.trials.discard_scratch", lambda sweep: None
    )  # what Tune keeps is looked at below
    trial_experiments.registered()
    uri = request.getfixturevalue("s3_uri") if where == "s3" else str(tmp_path / "a 50%25?é中#x+y")
    sweep = open_store(f"{uri}/sweep")
    [winner] = searched(sweep, trial_experiments.scored_by_rate)
    assert winner.point == {"rate": max(RATES)}
    assert any(info.path.startswith("ray/") for info in sweep.list()), "Tune's own state went elsewhere"
