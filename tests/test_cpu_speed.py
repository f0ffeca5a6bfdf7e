"""The model of a step on CPUs against measured steps, and of whole runs against those that README reports."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cluster.configuration.config import load_config
from cluster.hardware.machine import Peak
from cluster.sessions.session import PROJECT
from trainers.model.shape import ModelConfig
from trainers.optim.muon import orthogonalize
from trainers.optim.optimizer import OptimizerConfig
from trainers.planning.checks import job_of
from trainers.planning.cpu_speed import cpu_step_seconds, muon_flops
from trainers.planning.plan import make_plan
from trainers.planning.run_time import Evaluations
from trainers.pretraining.config import PretrainConfig

SAMPLE = ModelConfig(
    vocab_size=4_096, hidden_size=384, num_layers=6, num_heads=6, intermediate_size=1_024, max_positions=2_048
)
SGD = OptimizerConfig(kind="sgd", momentum=0.0)
# Seconds of CPU of a forward and backward pass on one thread of an AMD EPYC without AMX, and the rate of its matrix
# products in the same seconds: shape, rows, positions, rate in GFLOP/s eager, seconds, rate compiled, seconds.
MEASURED = (
    (SAMPLE, 4, 512, 448, 0.857, 433, 0.691),
    (replace(SAMPLE, hidden_size=128, num_heads=4, intermediate_size=352), 8, 512, 467, 0.520, 444, 0.370),
    (SAMPLE, 8, 128, 455, 0.360, 452, 0.248),
    (
        replace(SAMPLE, hidden_size=768, num_heads=12, intermediate_size=2_048, num_layers=3),
        *(2, 512, 444, 0.622, 440, 0.525),
    ),
    (replace(SAMPLE, vocab_size=32_000, num_layers=2), 2, 512, 429, 0.471, 429, 0.390),
    (replace(SAMPLE, num_layers=2), 1, 2_048, 426, 0.501, 420, 0.421),
)


def seconds(model: ModelConfig, rows: int, seq_len: int, rate: float, **changes) -> float:
    given = {"workers": 1, "zero_stage": 1, "compiled": False, "recomputes": False, "target_share": 1.0}
    given |= {"tokens": rows * seq_len, "seq_len": seq_len, "flops_per_second": rate}
    return cpu_step_seconds(model, SGD, **(given | changes))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_model_stays_within_its_stated_error_of_six_measured_shapes(compiled) -> None:
    for model, rows, seq_len, *found in MEASURED:
        rate, taken = found[2:] if compiled else found[:2]
        planned = seconds(model, rows, seq_len, 1e9 * rate, compiled=compiled)
        planned -= seconds(model, 0, seq_len, 1e9 * rate, compiled=compiled)  # no update was measured
        print(f"{model.hidden_size} x {model.num_layers}, {rows} x {seq_len}: {planned / taken - 1:+.0%}")
        assert planned == pytest.approx(taken, rel=0.1)


def test_faster_matrix_units_leave_the_elementwise_work_as_slow_as_it_was() -> None:
    slow, fast = (seconds(SAMPLE, 4, 512, rate) for rate in (450e9, 1_800e9))
    assert fast > slow / 4 * 1.5


def test_muon_computes_what_torch_counts() -> None:
    model = replace(SAMPLE, num_layers=1, num_kv_heads=2)
    D, K, F = 384, 128, 1_024
    with FlopCounterMode(display=False) as counter:
        for shape in ((D, D), (K, D), (K, D), (D, D), (F, D), (F, D), (D, F)):
            orthogonalize(torch.randn(shape).bfloat16(), 5)
    assert muon_flops(model, OptimizerConfig(kind="muon")) == pytest.approx(counter.get_total_flops())
    assert muon_flops(model, OptimizerConfig(kind="adamw")) == 0


# Of README's table: preset, seconds of training (the first step compiles), tokens of the validation and test split.
RUNS = (
    ("sample", 300, 75_976, 110_575),
    ("sample-mlm", 282, 75_976, 110_575),
    ("sample-zh", 396, 75_976, 110_575),
)


@pytest.mark.parametrize(("preset", "taken", "validation", "test"), RUNS, ids=[run[0] for run in RUNS])
def test_a_plan_says_how_long_runs_of_two_cores_took(preset, taken, validation, test) -> None:
    given = ["--config", str(PROJECT / "trainers" / "configs" / f"{preset}.yaml")]
    run = load_config(PretrainConfig, given, description="").config
    model = replace(run.model, vocab_size=run.corpus.tokenizer.vocab_size)
    job = job_of(run, model, "cpu", "AMD EPYC", Peak(470e9, "README's table", is_measured=True), None)
    found = Evaluations(validations=3, validation_tokens=validation, test_tokens=test)
    plan = make_plan(replace(job, evaluations=found))
    training = plan.seconds + plan.beside.compiling
    print(f"{preset}: {training:.0f} s planned, {taken} s taken: {training / taken - 1:+.0%}")
    assert training == pytest.approx(taken, rel=0.2)
    assert plan.energy.kwh == pytest.approx(24 * 1.58 * (plan.seconds + plan.beside.computing) / 3.6e6)
