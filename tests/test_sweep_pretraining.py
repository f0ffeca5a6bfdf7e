"""A sweep over pretraining: one set of token shards, as many tokens in each trial, and no test row read."""

import json
import re
import subprocess
import sys
from pydoc_data.topics import topics

import pytest
import yaml

from cluster.configuration.config import from_dict
from cluster.console.errors import ConfigError
from cluster.sessions.session import PROJECT
from cluster.storage.uris import open_store
from tests.small_run import SETTINGS
from tune.search.space import parse_space
from tune.sweep_pretraining import PretrainSweepConfig, range_problems
from tune.trials.pretraining import PretrainTrials
from tune.trials.records import read_trials


def nested(settings):
    content = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        at = content
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = yaml.safe_load(value) if isinstance(value, str) else value
    return content


def sweep_of(folder, **sweep):
    raw = {name: f"{folder}/raw/{name}" for name in ("old", "new")}
    settings = SETTINGS | {
        "run.steps": 12, "validation.every_steps": 4, "corpus.sources": raw,
        "corpus.prepared": f"{folder}/prepared", "order.weights": {"old": 1.0, "new": 1.0},
        "cluster.address": "local",
    }  # fmt: skip
    return {
        "sweep": {"name": "s", "storage": f"{folder}/sweeps", "trials": 3, "best": 1, "seeds": 1,
            "search": "random", "scheduler": "none"} | sweep,
        "base": nested(settings),
        "space": {
            "optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]},
            "batch.rows_per_step": {"choice": [8, 16]},
            "order.weights.new": {"uniform": [0.5, 2.0]},
        },
    }  # fmt: skip


@pytest.mark.cluster
def test_trials_share_one_corpus_and_read_no_test_row(tmp_path):
    lines = [json.dumps({"id": name, "text": text}) for name, text in sorted(topics.items())]
    for number, name in enumerate(("old", "new")):
        open_store(str(tmp_path / "raw" / name)).put("a.jsonl", "\n".join(lines[number::2]).encode())
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep_of(tmp_path)))
    command = [sys.executable, str(PROJECT / "tune" / "sweep_pretraining.py"), "--config", "sweep.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    sweep = open_store(str(tmp_path / "sweeps" / "s"))
    trials = read_trials(sweep)
    assert [trial.status for trial in trials] == ["finished"] * 3
    assert all(trial.score == -trial.metrics["loss"] for trial in trials)
    names = [info.path for info in sweep.list("trials/")]
    assert not [name for name in names if "test" in name or "export" in name or "/checkpoints/" in name]
    best = max(trials, key=lambda trial: trial.score).point
    found = yaml.safe_load(sweep.read("best.yaml"))
    assert found["optimizer"]["learning_rate"] == best["optimizer.learning_rate"]
    assert found["order"]["weights"] == {"old": 1.0, "new": best["order.weights.new"]}
    assert json.loads(sweep.read("origin.json"))["corpus"]
    assert "loss" in sweep.read("report.html").decode()


def test_every_trial_sees_as_many_tokens(tmp_path):
    base = from_dict(PretrainSweepConfig, sweep_of(tmp_path)).base
    trials = PretrainTrials(base, "m")
    for rows in (8, 16):
        config = trials.config_at({"batch.rows_per_step": rows})
        assert config.run.steps * rows == 12 * 8 and config.run.steps % config.validation.every_steps == 0


@pytest.mark.parametrize(
    ("key", "described", "message"),
    [
        ("model.hidden_size", {"choice": [32]}, "cannot be varied in pretraining; what can: optimizer."),
        ("run.steps", {"int": [1, 2]}, "cannot be varied in pretraining"),
        ("order.weights.new", {"uniform": [-1.0, 1.0]}, "not negative"),
        ("optimizer.learning_rat", {"choice": [1]}, "nearest: optimizer.learning_rate"),
    ],
)
def test_what_would_not_be_comparable_is_refused(tmp_path, key, described, message):
    base = from_dict(PretrainSweepConfig, sweep_of(tmp_path)).base
    with pytest.raises(ConfigError, match=message):
        parse_space({key: described}, base)


@pytest.mark.parametrize(
    ("order", "values", "named"),
    [
        (
            {"lanes": 4},
            [8, 64],
            r"42 of 57 values do not fit, the first: order.lanes=4 does not divide rows per step 9; .*"
            r"\{choice: \[8, 16, 24, 32, 40, 48, 56, 64\]\}",
        ),
        ({"lanes": 0}, [8, 9], None),
        ({"lanes": 1}, [8, 64], None),
    ],
)
def test_a_range_of_batches_fits_at_every_value_or_is_refused(tmp_path, order, values, named):
    content = sweep_of(tmp_path)
    content["base"]["order"] |= order
    content["base"]["cluster"]["num_workers"] = 1
    base = from_dict(PretrainSweepConfig, content).base
    space = parse_space({"batch.rows_per_step": {"int": values}}, base)
    found = list(range_problems(base, space))
    assert (not found) if named is None else re.search(named, found[0])


def test_a_sweep_over_pretraining_judges_nothing(tmp_path):
    with pytest.raises(ConfigError, match="sweep.judge=true is not for pretraining"):
        from_dict(PretrainSweepConfig, sweep_of(tmp_path, judge=True))


def test_the_preset_is_a_sweep(tmp_path):
    content = yaml.safe_load((PROJECT / "tune" / "configs" / "pretrain-rates.yaml").read_text())
    config = from_dict(PretrainSweepConfig, content)
    assert len(parse_space(config.space, config.base).dimensions) == 4
