"""The winner of a sweep is judged where its trials ran, and the test split judges one point."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
from rich.console import Console
from task_files import put_backbone, put_lines, put_task, sentences

from cluster.configuration.config import from_dict
from cluster.console.errors import ConfigError
from cluster.storage.uris import open_store
from trainers.finetuning import group as finetune_group
from trainers.finetuning.config import FinetuneConfig
from trainers.tasks.splits import prepare_task
from trainers.tasks.task import load_task
from tune import sweep
from tune.search import proposals
from tune.search.config import SweepConfig, SweepRunConfig
from tune.search.measure import Measure
from tune.search.space import Dimension, SearchSpace, parse_space
from tune.sweeps.finalists import finalists_before
from tune.sweeps.folder import pin
from tune.sweeps.judgement import JUDGED, claim_judgement, judge, refuse_after_judgement
from tune.sweeps.phases import search
from tune.trials.records import TrialRecord, read_trials, record_outcome, record_start, trial_name


@pytest.mark.parametrize(
    "cluster", [{"gpus_per_worker": 1.0}, {"address": "head:6379", "cpus_per_worker": 9.0}]
)
def test_a_winner_of_one_worker_trains_on_the_cluster_of_its_trials(tmp_path, monkeypatch, cluster):
    uri = put_lines(tmp_path / "records.jsonl", sentences(80))
    task = put_task(tmp_path / "task.yaml", name="t", kind="classification", data={"uri": uri})
    best = from_dict(
        FinetuneConfig,
        {
            "run": {"task": task},
            "backbone": {"uri": put_backbone(tmp_path / "model")},
            "batch": {"min_steps": 1, "max_steps": 1},
            "engine": {"precision": "fp32", "zero_stage": 0},
            "cluster": cluster,
        },
    )
    prepared = prepare_task(load_task(task), open_store(str(tmp_path / "prepared")))
    sweep = open_store(str(tmp_path / "sweep"))
    monkeypatch.setattr(finetune_group, "ray_session", lambda cluster: nullcontext([{"CPU": 2.0}]))
    with pytest.raises(ConfigError, match="but the cluster has"):
        judge(best, {"rate": 0.1}, sweep, prepared)
    assert not sweep.list("best/"), "the driver trained"


def test_a_judged_sweep_searches_no_further(tmp_path):
    def config(**sweep):
        base = {"run": {"task": "t.yaml"}, "backbone": {"uri": "model"}}
        return from_dict(SweepConfig, {"sweep": {"trials": 20} | sweep, "base": base})

    store = open_store(str(tmp_path))
    pin(store, config(), {"task": "t1"})
    refuse_after_judgement(store, config(trials=40).sweep)  # not judged yet
    claim_judgement(store, {"rate": 0.1})
    refuse_after_judgement(store, config(max_concurrent=2, judge=False).sweep)  # the same search
    with pytest.raises(
        ConfigError, match="sweep.trials=40, but the test split has judged .*'rate': 0.1"
    ) as refused:
        refuse_after_judgement(store, config(trials=40, seeds=5, judge=False).sweep)
    assert len(refused.value.problems) == 2 and "choose a new sweep.name" in str(refused.value)
    with pytest.raises(ConfigError, match="cannot judge {'rate': 0.2} too"):
        claim_judgement(store, {"rate": 0.2})


def played(store, point, seed, number, score):
    """A trial that has come to its end."""
    record = TrialRecord(trial_name(point, seed), point, seed, number)
    record_start(store, record)
    ended = replace(record, status="finished", score=score)
    record_outcome(store, ended)
    return ended


def played_trials(config, experiment, store, ask, tell, *, first_number, num_trials, **more):
    """As `tune.trials.trials.run_trials`, without Ray and without training."""
    for number in range(first_number, first_number + num_trials):
        if (asked := ask()) is None:
            return
        point, seed = asked
        tell(played(store, point, seed, number, -abs(point["rate"] - 5.0)))


@pytest.mark.slow
def test_a_search_that_gave_up_below_its_trials_has_ended_for_the_same_keys_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("tune.trials.trials.run_trials", played_trials)
    monkeypatch.setattr(proposals, "REPEATS", 1)  # TPE gives up at the first point that it knows
    space = SearchSpace((Dimension("rate", "int", (1, 30), {}),))
    config, store = SweepRunConfig(trials=30, best=2, seeds=2), open_store(str(tmp_path))

    def searched():
        return search(
            config, None, store, space, first_seed=0, concurrent=1, measure=Measure("t", "loss"),
            console=Console(quiet=True),
        )  # fmt: skip

    assert finalists_before(store, config, 0) is None
    found = searched()
    trials = read_trials(store)
    assert sum(trial.seed == 0 for trial in trials) < 30
    assert finalists_before(store, replace(config, judge=False, max_concurrent=2), 0) == found
    assert finalists_before(store, replace(config, trials=40), 0) is None
    searched()
    assert len(read_trials(store)) > len(trials), (
        "a later start finds no other points: this test shows nothing"
    )


def test_the_command_of_a_judged_sweep_returns_its_verdict_and_starts_nothing(tmp_path, monkeypatch):
    uri = put_lines(tmp_path / "records.jsonl", sentences(80))
    task = put_task(tmp_path / "task.yaml", name="t", kind="classification", data={"uri": uri})
    base = {"run": {"task": task}, "backbone": {"uri": put_backbone(tmp_path / "model")}}
    content = {"space": {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}}, "base": base}
    config = from_dict(SweepConfig, content | {"sweep": {"trials": 20, "best": 1, "seeds": 1}})
    prepared = prepare_task(load_task(task), open_store(str(tmp_path / "prepared")))
    store, space = open_store(str(tmp_path / "sweep")), parse_space(config.space, config.base)
    point = {"optimizer.learning_rate": 1e-3}
    played(store, point, 0, 1, 0.9)  # and nothing says that the search has ended: an older version judged
    store.put(JUDGED, json.dumps({"point": point}).encode())
    verdict, judged = {"metrics": {"accuracy": 0.875}, "records": 8, "truncated": 0}, []
    monkeypatch.setattr(sweep, "ray_session", lambda cluster: pytest.fail("started"))
    monkeypatch.setattr(sweep, "judge", lambda best, point, *more: judged.append(point) or verdict)
    with open(tmp_path / "printed", "w") as printed:
        sweep.sweep(config, store, space, prepared, Console(file=printed, width=200))
    assert judged == [point] and "test accuracy: 0.8750" in (tmp_path / "printed").read_text()
    assert [trial.point for trial in read_trials(store)] == [point]
