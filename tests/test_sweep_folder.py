"""A sweep's folder counts the trials of one experiment: anything else is refused by the name of what differs."""

import pytest
import yaml

from cluster.configuration.config import from_dict
from cluster.console.errors import ConfigError
from cluster.storage.uris import open_store
from tune.search.config import SweepConfig
from tune.sweeps.folder import pin
from tune.trials.records import discard_scratch

ORIGIN = {"task": "t1", "metric": "accuracy", "backbone": "b1"}


def config(**changes):
    content = {
        "sweep": {"trials": 4, "storage": "sweeps"},
        "base": {
            "run": {"task": "t.yaml"},
            "backbone": {"uri": "model"},
            "batch": {"label_budget": 100},
        },
        "space": {"optimizer.learning_rate": {"loguniform": [1e-5, 1e-3]}},
    }
    for key, value in changes.items():
        section, _, rest = key.partition("__")
        *path, name = rest.split("__")
        at = content[section]
        for part in path:
            at = at.setdefault(part, {})
        at[name.replace("_of_", ".")] = value
    return from_dict(SweepConfig, content)


@pytest.fixture
def sweep(tmp_path):
    store = open_store(str(tmp_path / "s"))
    pin(store, config(), ORIGIN)
    return store


@pytest.mark.parametrize(
    ("changes", "origin", "named"),
    [
        (
            {"base__batch__label_budget": 200},
            {},
            "base.batch.label_budget=200, its trials were made with 100",
        ),
        ({"base__optimizer__weight_decay": 0.5}, {}, "base.optimizer.weight_decay=0.5"),
        ({"base__run__seeds": [1]}, {}, "base.run.seeds"),
        ({"space__adapt_of_dropout": {"uniform": [0.0, 0.1]}}, {}, "space={"),
        ({}, {"task": "t2"}, "task is t2 now, its trials were made with t1"),
        ({}, {"backbone": "b2"}, "backbone is b2 now"),
        ({}, {"metric": "macro_f1"}, "metric is macro_f1 now"),
    ],
)
def test_trials_of_another_experiment_are_not_counted(sweep, changes, origin, named):
    with pytest.raises(ConfigError, match="choose a new sweep.name") as refused:
        pin(sweep, config(**changes), ORIGIN | origin)
    assert len(refused.value.problems) == 1 and named in str(refused.value)
    pin(sweep, config(), ORIGIN)  # the folder still holds what it held


def test_the_trials_of_an_older_sweep_are_of_balanced_draws(sweep):
    old = yaml.safe_load(sweep.read("config.yaml"))
    del old["base"]["batch"]["draw"]
    sweep.put("config.yaml", yaml.safe_dump(old).encode())
    with pytest.raises(
        ConfigError, match="batch.draw='random', its trials were made with 'balanced'; give it back"
    ):
        pin(sweep, config(), ORIGIN)
    pin(sweep, config(base__batch__draw="balanced"), ORIGIN)


def test_a_sweep_may_grow_and_move(sweep):
    changed = config(
        sweep__trials=8, sweep__search="random", base__cluster__num_workers=2, base__backbone__uri="elsewhere"
    )
    pin(sweep, changed, ORIGIN)
    assert b"trials: 8" in sweep.read("config.yaml")


def test_a_key_that_is_younger_than_a_sweep_had_its_default_there(sweep):
    stored = yaml.safe_load(sweep.read("config.yaml"))
    del stored["base"]["engine"]["compile"], stored["base"]["guard"]
    sweep.put("config.yaml", yaml.safe_dump(stored).encode())
    with pytest.raises(ConfigError, match="base.guard.max_skipped=7, its trials were made with 100"):
        pin(sweep, config(base__guard__max_skipped=7), ORIGIN)
    pin(sweep, config(), ORIGIN)


def test_a_mapping_that_had_nothing_in_it_is_named_once_with_both_wholes(sweep):
    other = {"zero_optimization": {"overlap_comm": False}}
    with pytest.raises(ConfigError) as refused:
        pin(sweep, config(base__engine__deepspeed=other), ORIGIN)
    [line] = refused.value.problems
    assert f"base.engine.deepspeed={other!r}, its trials were made with {{}}" in line


def test_what_tune_keeps_of_a_start_is_removed_by_its_exact_name_and_nothing_else(tmp_path):
    sweep, start = open_store(str(tmp_path)), "start-1796074526378584086"
    kept = {"ray/0123456789ab/x.json", "ray/start-1/x", f"ray/{start}.old/x", f"{start}/x"}
    for path in {*kept, f"ray/{start}/tuner.pkl", f"ray/{start}/run_trial_1/result.json"}:
        sweep.put(path, b"")
    discard_scratch(sweep)
    assert {info.path for info in sweep.list()} == kept
