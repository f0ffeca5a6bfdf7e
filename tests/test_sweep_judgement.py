"""The winner of a sweep is judged where its trials ran, and the test split judges one point."""

from contextlib import nullcontext

import pytest
from task_files import put_backbone, put_lines, put_task, sentences

from cluster.config import ConfigError, from_dict
from cluster.storage import open_store
from trainers import finetune_group
from trainers.finetune_config import FinetuneConfig
from trainers.task import load_task
from trainers.task_data import prepare_task
from tune.judgement import claim_judgement, judge, refuse_after_judgement
from tune.sweep_config import SweepConfig
from tune.sweep_folder import pin


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
