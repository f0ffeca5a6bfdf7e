"""Trials on a real Ray: how each ends is recorded, whatever happens to its process or to the driver."""

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
import trial_experiments
from rich.console import Console
from trial_experiments import Doing, Training

from cluster.config import ConfigError
from cluster.storage import Store, open_store
from tune.search import search
from tune.search_space import Dimension, SearchSpace
from tune.sweep import claim_judgement
from tune.sweep_config import SweepRunConfig
from tune.trial_records import read_trials

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
    with pytest.raises(KeyboardInterrupt):
        searched(sweep, trial_experiments.going_on_for_long)
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
