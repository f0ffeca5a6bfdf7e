"""A sweep on real Ray Tune: no test record in a trial, failures recorded, kill -9 of the driver survived."""

import json
import os
import re
import signal
import sys
import time

import pytest
import yaml
from task_files import put_backbone, put_lines, put_task, sentences

from cluster.configuration.config import load_config
from cluster.console.errors import ConfigError
from cluster.sessions.session import PROJECT
from cluster.storage.uris import open_store
from tests.small_run import start_command
from trainers import finetune
from trainers.checkpoints.keeping import committed, latest_attempt
from trainers.finetuning.config import FinetuneConfig
from trainers.reporting.metrics import read_metrics
from tune import sweep
from tune.trials.records import read_trials

pytestmark = pytest.mark.cluster
TRIALS, EVERY_STEPS = 5, 20


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    uri = put_lines(folder / "records.jsonl", sentences(300))
    put_task(folder / "task.yaml", name="t", kind="classification", data={"uri": uri})
    put_backbone(folder / "model")
    content = {
        "sweep": {"name": "s", "storage": str(folder / "sweeps"), "trials": TRIALS, "best": 2,
            "seeds": 2, "search": "random", "scheduler": "none"},
        "base": {
            "run": {"task": str(folder / "task.yaml"), "prepared": str(folder / "prepared")},
            "backbone": {"uri": str(folder / "model")},
            "batch": {"rows_per_step": 16, "min_steps": 120, "epochs": 1.0},
            "engine": {"precision": "fp32", "zero_stage": 0, "micro_batch_rows": 16},
            "validation": {"times": 4},
            "checkpoint": {"every_steps": EVERY_STEPS},
            "cluster": {"address": "local"},
        },
        # A rate of 1e30 gives no finite gradient: that trial fails, and the sweep goes on.
        "space": {"optimizer.learning_rate": {"choice": [0.001, 0.003, 0.01, 0.02, 1.0e30]}},
    }  # fmt: skip
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    return folder


def start(place, *more):
    command = [sys.executable, str(PROJECT / "tune" / "sweep.py"), "--config", str(place / "sweep.yaml")]
    return start_command([*command, *more], place / "log")


def stopped_when(place, condition, stop):
    """Start the sweep and stop it once a condition holds; its exit status."""
    process = start(place)
    ends = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < ends, (place / "log").read_text()[-3000:]
        time.sleep(0.05)
    stop(process.pid)
    return process.wait(60)


def ended_of(store):
    return [trial for trial in read_trials(store) if trial.status != "unfinished"]


def cut_off_of(store):
    """Trials that have not ended and have a checkpoint to go on from."""
    unfinished = [trial.name for trial in read_trials(store) if trial.status == "unfinished"]
    return [name for name in unfinished if committed(store.child(f"trials/{name}/seed-0"))]


def test_an_interrupted_sweep_goes_on_from_what_is_finished_and_judges_its_winner_once(place, capsys):
    store = open_store(str(place / "sweeps" / "s"))
    status = stopped_when(place, lambda: ended_of(store), lambda pid: os.kill(pid, signal.SIGINT))
    assert status == 130 and "the same command goes on" in (place / "log").read_text()
    assert not store.exists("best.yaml") and not store.exists("judged.json")
    stopped_when(place, lambda: cut_off_of(store), lambda pid: os.killpg(pid, signal.SIGKILL))
    assert not store.exists("best.yaml")
    ended = ended_of(store)
    attempts = {name: latest_attempt(store.child(f"trials/{name}/seed-0")) for name in cut_off_of(store)}
    assert start(place).wait(600) == 0, (place / "log").read_text()[-3000:]
    trials = {trial.name: trial for trial in read_trials(store)}
    assert all(trials[t.name] == t for t in ended)
    for name, attempt in attempts.items():
        segments = [info.path for info in store.list(f"trials/{name}/seed-0/metrics/")]
        starts = {
            int(number): int(step) for step, number in (re.findall(r"\d+", path)[-2:] for path in segments)
        }
        assert max(starts) > attempt and starts[max(starts)] >= EVERY_STEPS, "it began anew"
    assert attempts and len([t for t in trials.values() if t.seed == 0]) == TRIALS
    failed = [t for t in trials.values() if t.point["optimizer.learning_rate"] == 1e30]
    assert failed[0].status == "failed" and store.exists(f"trials/{failed[0].name}/error.txt")
    assert not [info.path for info in store.list("trials/") if info.path.endswith("test.json")]
    assert json.loads(store.read("test.json"))["metrics"]["accuracy"] > 0.6
    page = store.read("report.html").decode()
    assert page.count("<svg") >= 4 and all(trial.name in page for trial in trials.values())

    best = str(place / "sweeps" / "s" / "best.yaml")
    finetune.main(["--config", best, "--dry-run"])
    assert "judged by accuracy" in capsys.readouterr().out
    chosen = load_config(FinetuneConfig, ["--config", best], description="").config
    assert chosen.optimizer.learning_rate in (0.001, 0.003, 0.01, 0.02)

    with pytest.raises(ConfigError, match=r"sweep.trials=9, but the test split has judged"):
        sweep.main(["--config", str(place / "sweep.yaml"), "--sweep.trials", "9"])
    assert load_config(FinetuneConfig, ["--config", best], description="").config == chosen


def test_a_trial_that_the_cluster_has_no_room_for_is_one_line_and_no_trial(place):
    before = len((place / "log").read_text()) if (place / "log").exists() else 0
    assert start(place, "--sweep.name", "big", "--base.cluster.cpus_per_worker", "999").wait(300) == 2
    [line] = (place / "log").read_text()[before:].strip().splitlines()
    assert "a trial needs 1 x (999 CPUs)" in line and "lower base.cluster.num_workers" in line
    assert not open_store(str(place / "sweeps" / "big")).list("trials/")


def test_a_trial_of_two_workers_runs_on_ray_train_and_is_stopped_where_it_falls_behind(place):
    settings = {
        "sweep.name": "two", "sweep.search": "grid", "sweep.trials": 2, "sweep.best": 1, "sweep.seeds": 1,
        "sweep.judge": "false", "sweep.scheduler": "asha", "sweep.max_concurrent": 1,
        "base.cluster.num_workers": 2, "base.cluster.cpus_per_worker": 0.5, "base.validation.patience": 0,
        "base.batch.min_steps": 1_500, "base.validation.times": 10,
        "space": "{optimizer.learning_rate: {choice: [0.01, 1.0e-8]}}",
    }  # fmt: skip
    arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    assert start(place, *arguments).wait(300) == 0, (place / "log").read_text()[-3000:]
    store = open_store(str(place / "sweeps" / "two"))
    trials = {trial.point["optimizer.learning_rate"]: trial for trial in read_trials(store)}
    good, bad = trials[0.01], trials[1e-8]
    assert good.status == "finished" and good.metrics["accuracy"] == good.score
    assert bad.status == "stopped"
    trained = [record["step"] for record in read_metrics(store.child(f"trials/{bad.name}/seed-0"))]
    assert max(trained) < 1_500, "its workers went on"
    assert not [info.path for info in store.list() if info.path.endswith("test.json")]
