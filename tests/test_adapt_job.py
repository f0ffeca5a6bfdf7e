"""Adapting as `ray job submit` runs it: a head without work, nodes beside it, and all that is kept on S3."""

import json

import pytest
from task_files import put_backbone, put_task, sentences

from cluster.configuration.config import load_config
from cluster.storage.uris import open_store
from tests.ray_nodes import RayNodes
from trainers.finetuning.config import FinetuneConfig
from tune.trials.records import read_trials

pytestmark = pytest.mark.cluster
SETTINGS = {
    "batch.rows_per_step": 16,
    "batch.min_steps": 40,
    "batch.epochs": 1.0,
    "engine.precision": "fp32",
    "engine.micro_batch_rows": 8,
    "optimizer.learning_rate": 0.01,
    "validation.times": 4,
    "cluster.num_workers": 2,
    "cluster.cpus_per_worker": 0.5,
}


def as_flags(settings: dict[str, object], prefix: str = "") -> list[str]:
    return [part for key, value in settings.items() for part in (f"--{prefix}{key}", str(value))]


def test_jobs_adapt_search_and_answer_with_all_state_on_s3(tmp_path, s3_uri):
    store = open_store(s3_uri)
    records = sentences(300)
    store.put("records.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())
    texts = [{"id": record["id"], "text": record["text"]} for record in records]
    store.put("texts/new.jsonl", "".join(json.dumps(text) + "\n" for text in texts).encode())
    task = put_task(
        tmp_path / "t.yaml", name="t", kind="classification", data={"uri": f"{s3_uri}/records.jsonl"}
    )
    base = SETTINGS | {
        "run.task": task,
        "run.prepared": f"{s3_uri}/prepared",
        "run.storage": f"{s3_uri}/runs",
        "backbone.uri": put_backbone(f"{s3_uri}/model"),
    }
    sweep = {
        "storage": f"{s3_uri}/sweeps",
        "name": "s",
        "trials": 2,
        "best": 1,
        "seeds": 1,
        "search": "random",
        "scheduler": "none",
        "judge": "false",
    }
    (tmp_path / "sweep.yaml").write_text("space: {adapt.dropout: {uniform: [0.0, 0.3]}}\n")
    with RayNodes(tmp_path / "nodes.txt") as nodes:
        nodes.start_head(num_cpus=0)
        nodes.add(2)
        tuned = ["python", "trainers/finetune.py", *as_flags(base | {"run.name": "tuned"})]
        nodes.submit("finetune", entrypoint=tuned)
        searched = ["python", "tune/sweep.py", "--config", str(tmp_path / "sweep.yaml")]
        nodes.submit("sweep", entrypoint=[*searched, *as_flags(sweep, "sweep."), *as_flags(base, "base.")])
        answered = ["python", "trainers/predict.py", "--model", f"{s3_uri}/runs/tuned/seed-0/export"]
        uris = ["--input", f"{s3_uri}/texts/new.jsonl", "--output", f"{s3_uri}/answers"]
        nodes.submit("predict", entrypoint=[*answered, *uris])

    judged = json.loads(store.read("runs/tuned/seed-0/test.json"))
    assert judged["metrics"]["accuracy"] > 0.8
    trials = read_trials(store.child("sweeps/s"))
    assert [trial.status for trial in trials] == ["finished"] * 2
    best = tmp_path / "best.yaml"
    best.write_bytes(store.read("sweeps/s/best.yaml"))
    chosen = load_config(FinetuneConfig, ["--config", str(best)], description="").config
    assert chosen.adapt.dropout in [trial.point["adapt.dropout"] for trial in trials]
    lines = [
        json.loads(line)
        for info in store.list("answers/")
        if info.path.endswith(".jsonl")
        for line in store.read(info.path).decode().splitlines()
    ]
    labels = {record["id"]: record["label"] for record in records}
    right = sum(line["answer"] == labels.pop(line["id"]) for line in lines)
    assert not labels and right > 0.8 * len(lines)
