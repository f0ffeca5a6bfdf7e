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

from cluster.config import ConfigError
from cluster.storage import Store, open_store
from tune.interrupts import interrupt
from tune.search import search
from tune.search_space import Dimension, SearchSpace
from tune.sweep import claim_judgement
from tune.sweep_config import SweepRunConfig
from tune.trial_records import read_trials
from tune.trials import scheduler

pytestmark = pytest.mark.cluster
RATES = (0.1, 0.2, 0.3)
SPACE = SearchSpace((Dimension("rate", "choice", RATES, {}),))


@pytest.fixture
def sweep(ray_session: None, tmp_path) -> Store:
    trial_experiments.registered()
    return open_store(str(tmp_path / "sweep"))


def searched(sweep: Store, training: Training, **changes):
    config = SweepRunConfig(**({"search": "grid", "trials": 3, "best": 1, "seeds": 1} | changes))
    return search(
        config, Doing(training), sweep, SPACE, first_seed=0, concurrent=2, console=Console(quiet=True)
    )


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


def test_a_search_that_returned_before_its_end_chooses_nobody(sweep, monkeypatch):
    from tune import trials

    real = trials.run_trials
    monkeypatch.setattr(trials, "run_trials", lambda *args, **more: real(*args, **(more | {"num_trials": 2})))
    with pytest.raises(SystemExit, match="ended with 1 trials to go"):
        searched(sweep, trial_experiments.scored_by_rate)
    monkeypatch.undo()
    assert searched(sweep, trial_experiments.scored_by_rate)[0].point == {"rate": 0.3}


def test_a_sweep_judges_one_point_also_if_asked_again(tmp_path):
    store = open_store(str(tmp_path))
    claim_judgement(store, {"rate": 0.1})
    claim_judgement(store, {"rate": 0.1})
    with pytest.raises(ConfigError, match="cannot judge {'rate': 0.2} too"):
        claim_judgement(store, {"rate": 0.2})


def test_a_trial_whose_process_is_killed_is_started_again(sweep):
    assert searched(sweep, trial_experiments.killed_once)[0].scores == (0.3,)
    assert [trial.status for trial in read_trials(sweep)] == ["finished"] * 3


def test_a_trial_that_falls_behind_is_stopped_and_leaves_no_checkpoint(sweep):
    falling = SearchSpace((Dimension("rate", "choice", RATES[::-1], {}),))
    config = SweepRunConfig(search="grid", trials=3, best=1, seeds=1, scheduler="asha")
    experiment = Doing(trial_experiments.scored_step_by_step)
    [winner] = search(
        config, experiment, sweep, falling, first_seed=0, concurrent=1, console=Console(quiet=True)
    )
    assert winner.point == {"rate": 0.3}
    assert [trial.status for trial in read_trials(sweep)] == ["finished", "stopped", "stopped"]
    assert not [info.path for info in sweep.list("trials/") if "/checkpoints/" in info.path]


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
        searched(sweep, trial_experiments.failing)
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
