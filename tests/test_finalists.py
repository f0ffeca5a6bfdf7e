"""Finalists win by their mean over all seeds; what is left of a sweep is told by the trials of this start."""

import io
import json
import math
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from cluster.storage.uris import open_store
from tune.search.measure import Measure
from tune.sweeps.finalists import best_points, rank
from tune.sweeps.phases import ProgressLine
from tune.trials.records import TrialRecord, discard_checkpoints, read_trials, record_outcome, trial_name

LUCKY, STEADY = {"rate": 1.0}, {"rate": 0.1}


def trial(point, seed, score):
    status = "finished" if score is not None else "failed"
    return TrialRecord(f"{point}-{seed}", point, seed, 1, status, score)


def test_a_point_that_failed_with_other_seeds_does_not_win_on_one_score():
    trials = [
        trial(LUCKY, 0, 0.9), trial(LUCKY, 1, None), trial(LUCKY, 2, None),
        trial(STEADY, 0, 0.8), trial(STEADY, 1, 0.7), trial(STEADY, 2, 0.75),
    ]  # fmt: skip
    ranked = rank([LUCKY, STEADY], [0, 1, 2], trials)
    assert [finalist.point for finalist in ranked] == [STEADY, LUCKY]
    assert [len(finalist.scores) for finalist in ranked] == [3, 1]


def test_a_diverged_trial_of_an_older_version_does_not_win_by_its_accuracy(tmp_path):
    sweep = open_store(str(tmp_path))
    for point, loss in ((LUCKY, math.nan), (STEADY, 0.5)):
        name, score = trial_name(point, 0), 0.9 if point == LUCKY else 0.8
        metrics = {"accuracy": score, "loss": loss}
        record = TrialRecord(name, point, 0, 1, "finished", score, metrics=metrics)
        sweep.put(f"trials/{name}/outcome.json", json.dumps(asdict(record)).encode())
    trials = read_trials(sweep)
    assert {trial.point["rate"]: trial.status for trial in trials} == {1.0: "failed", 0.1: "finished"}
    assert best_points(trials, 0, 2) == [STEADY]


def test_an_outcome_is_json_whatever_was_measured(tmp_path):
    sweep, name = open_store(str(tmp_path)), trial_name(LUCKY, 0)
    record_outcome(sweep, TrialRecord(name, LUCKY, 0, 1, "failed", -math.inf, metrics={"loss": math.nan}))
    stored = json.loads(sweep.read(f"trials/{name}/outcome.json"), parse_constant=pytest.fail)
    assert stored["score"] is None and stored["metrics"] == {"loss": None}
    assert read_trials(sweep)[0].score is None


def test_time_left_is_told_by_the_trials_of_this_start():
    earlier = [trial({"rate": float(n)}, 0, 0.5) for n in range(8)]
    progress = ProgressLine(Console(quiet=True), Measure("t", "mse"), 12, earlier)
    progress(trial(STEADY, 0, 0.5))
    assert progress.seconds_left(60.0) == 3 * 60.0


def test_the_progress_line_counts_each_ending_and_shows_the_best_metric_as_it_is_known():
    console = Console(file=io.StringIO(), width=200)
    progress = ProgressLine(console, Measure("t", "mse"), 5, [trial({"rate": 9.0}, 0, -0.9)])
    points = [{"rate": float(n)} for n in range(4)]
    for point in points:
        progress(replace(trial(point, 0, None), status="unfinished"))
    progress(trial(points[0], 0, None))
    progress(replace(trial(points[1], 0, -0.75), status="stopped"))
    progress(trial(points[2], 0, -0.52))
    going_on, failed, stopped, finished = console.file.getvalue().splitlines()
    assert going_on == "going on: 1 of 5 trials had ended"
    assert failed.startswith("trials: 3 running, 1 finished, 0 stopped, 1 failed of 5; best mse 0.9000; ")
    assert "2 running, 1 finished, 1 stopped, 1 failed of 5; best mse 0.7500" in stopped
    assert "1 running, 2 finished, 1 stopped, 1 failed of 5; best mse 0.5200" in finished


def test_an_ended_trial_loses_its_checkpoints_and_nothing_that_it_did_not_write(tmp_path):
    sweep, checkpoint = open_store(str(tmp_path)), "checkpoints/step-00000001-w1-a1"
    kept = [
        "trials/a/trial.json",
        "trials/a/seed-0/metrics/1.jsonl",
        "trials/a/seed-0/best/why.md",
        "trials/a/seed-0/checkpoints/keep/COMMIT.json",
        f"trials/a/seed-0/{checkpoint}/notes.md",
        f"trials/a/seed-0/export/{checkpoint}/COMMIT.json",
        "trials/a/ray/notes.md",
        f"trials/b/seed-0/{checkpoint}/COMMIT.json",
    ]
    gone = [
        f"trials/a/seed-0/{checkpoint}/COMMIT.json",
        f"trials/a/{checkpoint}/worker-00000-000.safetensors",
        f"trials/a/{checkpoint}/part-00000.json",
        "trials/a/seed-0/best/step-00000001.safetensors",
        "trials/a/seed-0/ray/0123456789ab/.validate_storage_marker",
    ]
    for path in [*kept, *gone]:
        sweep.put(path, b"")
    discard_checkpoints(sweep, "a")
    assert [info.path for info in sweep.list()] == sorted(kept)
