"""Validation chooses: the best step, and when a run gives up."""

import json
import math

import numpy as np

from cluster.storage.uris import open_store
from trainers.evaluation.loss import evaluation_of
from trainers.evaluation.selection import Selection, ValidationConfig, record_best
from trainers.objectives.causal import CAUSAL


def chosen(losses: list[float], config: ValidationConfig) -> list[Selection]:
    found, selection = [], Selection()
    for number, loss in enumerate(losses, start=1):
        selection = selection.after(
            10 * number, evaluation_of((CAUSAL,), np.array([[loss * 8, 8, np.nan]]), 24, 0.1), config
        )
        found.append(selection)
    return found


def test_the_lowest_validation_loss_is_chosen():
    last = chosen([3.0, 2.0, 2.5, 2.1], ValidationConfig())[-1]
    assert (last.best_step, last.best_loss, last.validated_step) == (20, 2.0, 40)
    assert last.best_bits_per_byte == 2.0 * 8 / 24 / math.log(2)


def test_a_run_stops_after_patience_validations_without_improvement():
    config = ValidationConfig(patience=2)
    given_up = [selection.gives_up(config) for selection in chosen([3.0, 2.0, 2.1, 2.2, 1.0], config)]
    assert given_up == [False, False, False, True, False]
    assert not any(s.gives_up(ValidationConfig()) for s in chosen([1.0] * 50, ValidationConfig()))


def test_an_improvement_below_the_minimum_does_not_count():
    config = ValidationConfig(min_improvement=0.1)
    assert chosen([2.0, 1.95], config)[-1].best_step == 10
    assert chosen([2.0, 1.85], config)[-1].best_step == 20


def test_a_loss_that_is_no_number_is_never_the_best():
    assert chosen([math.nan, 2.0, math.nan], ValidationConfig())[-1].best_step == 20


def test_what_validation_found_survives_a_checkpoint():
    for selection in (Selection(), *chosen([3.0, 2.0, 2.5], ValidationConfig())):
        assert Selection.from_json(json.loads(json.dumps(selection.as_json(), allow_nan=False))) == selection


def test_best_json_names_the_checkpoint_and_the_reason(tmp_path):
    run = open_store(str(tmp_path))
    record_best(run, chosen([3.0], ValidationConfig())[-1], "step-00000010-w1-a1")
    best = json.loads(run.read("best.json"))
    assert (best["step"], best["checkpoint"], best["loss"]) == (10, "step-00000010-w1-a1", 3.0)
    assert "validation" in best["why"]
