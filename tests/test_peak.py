"""MFU of one run counts against one peak, and says whose."""

import json
from pathlib import Path

import pytest

from cluster.configuration.config import load_config
from cluster.configuration.stored_file import DamagedFileError
from cluster.hardware.machine import Peak, cpu_name
from tests.token_corpus import put_token_corpus
from trainers.model.shape import ModelConfig, count_parameters, flops_per_token, matrix_products
from trainers.planning.checks import plan_of
from trainers.pretraining.config import PretrainConfig, model_of, run_store
from trainers.pretraining.peak import ENVIRONMENT, environment_of, keep_peak, peak_of_run
from trainers.pretraining.run_folder import write_start


def configured(folder: Path, *more: str) -> PretrainConfig:
    given = [
        "--corpus.uri",
        "raw",
        "--corpus.prepared",
        str(folder / "prepared"),
        "--run.storage",
        str(folder),
    ]
    given += ["--batch.seq_len", "32", "--engine.micro_batch_rows", "4", "--batch.rows_per_step", "8"]
    return load_config(PretrainConfig, [*given, *more], description="").config


def test_a_run_measures_a_kind_of_machine_once_and_its_restarts_count_against_the_same_peak(
    tmp_path: Path,
) -> None:
    config = configured(tmp_path)
    run, corpus = run_store(config), run_store(config).child("corpus")
    manifest = put_token_corpus(corpus, {("train", "web"): 20}, fragment_tokens=120, vocab_size=60)
    model = model_of(config, manifest)
    first = plan_of(config, manifest).job.peak
    write_start(run, config, manifest, "plan")
    keep_peak(run, config, cpu_name(), first)
    [kept] = environment_of(run)["measured"].values()
    assert kept == {"peak_flops_per_second": first.flops_per_second, "product": first.product}

    # A figure that no machine reaches: whoever gives it back has not measured.
    content = environment_of(run)
    next(iter(content["measured"].values()))["peak_flops_per_second"] = 1e20
    run.put(ENVIRONMENT, json.dumps(content).encode())
    write_start(run, config, manifest, "plan")  # the same command again
    again = peak_of_run(run, config, model, cpu_name())
    assert again.flops_per_second == 1e20 and again.is_measured and first.product in again.source
    keep_peak(run, config, cpu_name(), first)
    assert environment_of(run)["measured"] == content["measured"]

    other = configured(tmp_path, "--cluster.threads_per_worker", "3")
    fresh = peak_of_run(run, other, model, cpu_name())
    assert fresh.flops_per_second < 1e20
    keep_peak(run, other, cpu_name(), fresh)
    assert len(environment_of(run)["measured"]) == 2


def test_the_folder_of_a_trial_that_no_driver_wrote_keeps_a_peak_too(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run = run_store(config)
    keep_peak(run, config, cpu_name(), Peak(1e20, "", is_measured=True, product="[1 x 1] x [1 x 1]"))
    assert peak_of_run(run, config, config.model, cpu_name()).flops_per_second == 1e20


def test_an_environment_that_holds_no_peak_is_named_with_the_remedy(tmp_path: Path) -> None:
    config = configured(tmp_path)
    run_store(config).put(
        ENVIRONMENT, b'{"measured": {"a cpu": {"peak_flops_per_second": -1, "product": ""}}}'
    )
    with pytest.raises(DamagedFileError, match=r"environment\.json.*delete it"):
        peak_of_run(run_store(config), config, config.model, cpu_name())


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_the_products_that_are_measured_are_those_whose_operations_mfu_counts(activation: str) -> None:
    model = ModelConfig(
        hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=80, vocab_size=500,
        activation=activation,
    )  # fmt: skip
    *layer, head = matrix_products(model, tokens=7)
    weights = 3 * sum(k * n for _, k, n in layer) + head[1] * head[2]
    assert {m for m, _, _ in (*layer, head)} == {7}
    assert weights == count_parameters(model).matrices + 48 * 500
    attention = 12 * 3 * 4 * model.head_width * 16
    assert flops_per_token(model, seq_len=16) == 6 * weights + attention
