"""All seeds of a run are fit to be judged before the test split judges the first (law L6)."""

import json
import math
from dataclasses import replace

import pytest
from small_finetune import SHORT, config, put_place, run_of

from cluster.configuration.stored_file import DamagedFileError
from cluster.console.errors import ConfigError
from trainers.evaluation.verdict import CLAIM, VERDICT, TestSplitError
from trainers.exported.model_files import ModelFolderError
from trainers.finetuning import worker as finetune_worker
from trainers.finetuning.end import CHOSEN
from trainers.finetuning.run import finetune
from trainers.model.diverged import DivergedModelError
from trainers.recovery.stopping import STOP, RunStopped
from trainers.reporting.metrics import read_metrics, steps_of


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return put_place(tmp_path_factory.mktemp("seeds"))


def of_seeds(place, name, *seeds):
    return config(place, name, batch=SHORT, run={"seeds": seeds})


@pytest.fixture
def trained(place, request, monkeypatch):
    """Name of a run whose second seed alone was trained, and cut off at its end."""

    def cut_off(*_):
        raise KeyboardInterrupt

    name = request.node.name.replace("[", "-").rstrip("]").replace(" ", "-")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune_worker, "conclude", cut_off)
        finetune(of_seeds(place, name, 1))
    return name


def diverge(run):
    chosen = json.loads(run.read(CHOSEN))
    chosen["choice"]["metrics"]["loss"] = math.nan
    run.put(CHOSEN, json.dumps(chosen).encode())


def cut_weights(run):
    (info,) = run.list("best/")
    run.put(info.path, run.read(info.path)[:-100])


def lose_a_weight(run):
    (info,) = run.list("best/")
    import safetensors.torch

    weights = safetensors.torch.load(run.read(info.path))
    weights.pop("head.out.weight")
    run.put(info.path, safetensors.torch.save(weights))


def flip_a_bit(run):
    (info,) = run.list("best/")
    content = bytearray(run.read(info.path))
    content[-5] ^= 1
    run.put(info.path, bytes(content))


FAULTS = {
    "a bit of the weights flipped": (flip_a_bit, DamagedFileError),
    "verdict torn": (lambda run: run.put(VERDICT, b'{"metrics"'), DamagedFileError),
    "configuration gone": (lambda run: run.delete("config.yaml"), ConfigError),
    "diverged": (diverge, DivergedModelError),
    "weights cut": (cut_weights, ModelFolderError),
    "a weight lost": (lose_a_weight, ModelFolderError),
    "chosen torn": (lambda run: run.put(CHOSEN, b'{"choice'), DamagedFileError),
    "judged for another": (lambda run: run.put(CLAIM, b'{"checkpoint": "step-00000099"}'), TestSplitError),
    "result torn": (lambda run: run.put("result.json", b"{"), DamagedFileError),
    "another's export": (lambda run: run.put("export/config.json", b'{"model_type": "bert"}'), ConfigError),
    "asked to stop": (lambda run: (run.delete(CHOSEN), run.put(STOP, b"")), RunStopped),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_seed_is_judged_while_a_later_one_is_not_fit_to_be(place, trained, fault):
    spoil, error = FAULTS[fault]
    spoil(run_of(place, trained, 1))
    with pytest.raises(error):
        finetune(of_seeds(place, trained, 0, 1))
    assert not run_of(place, trained, 0).exists(CLAIM)


def test_another_configuration_of_a_later_seed_is_told_before_the_first_is_trained(place, trained):
    changed = of_seeds(place, trained, 0, 1)
    with pytest.raises(ConfigError, match="seed-1: optimizer.learning_rate=0.02"):
        finetune(replace(changed, optimizer=replace(changed.optimizer, learning_rate=0.02)))
    assert not run_of(place, trained, 0).list()


def test_seeds_that_are_cut_off_between_training_and_judgement_go_on_to_the_same_verdicts(place):
    whole = finetune(of_seeds(place, "whole", 0, 1))
    told = []

    def fail_in_the_second(step, score):
        told.append(step)
        if told.count(step) > 1:
            raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="gone"):
        finetune(of_seeds(place, "cut", 0, 1), on_validation=fail_in_the_second)
    first = run_of(place, "cut", 0)
    assert first.exists(CHOSEN) and not first.exists(CLAIM)
    found = finetune(of_seeds(place, "cut", 0, 1))
    assert [seed | {"seconds": 0} for seed in found.seeds] == [seed | {"seconds": 0} for seed in whole.seeds]
    assert len(steps_of(read_metrics(first))) == SHORT["max_steps"]
    for seed in (0, 1):
        run = run_of(place, "cut", seed)
        assert run.exists(VERDICT) and not run.list("best/") and not run.exists(CHOSEN)
