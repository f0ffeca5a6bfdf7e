"""The root configuration: what does not fit between sections, what may change under way, the presets."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.config import ConfigError, load_config, to_dict, to_yaml
from cluster.session import PROJECT, ClusterConfig, cpu_problem
from cluster.storage import open_store
from trainers.config import BatchConfig, PretrainConfig, absolute, changed_keys, run_store
from trainers.model import Backbone
from trainers.run_folder import CONFIG, check_unchanged
from trainers.shape import count_parameters

GIVEN = ["--corpus.uri", "raw", "--corpus.prepared", "prepared"]
PRESETS = sorted((PROJECT / "trainers" / "configs").glob("*.yaml"))


def load(*arguments: str) -> PretrainConfig:
    return load_config(PretrainConfig, [*GIVEN, *arguments], description="").config


def test_three_mistakes_of_three_kinds_are_one_message_of_three_lines():
    with pytest.raises(ConfigError) as error:
        load("--batch.rows_per_stp", "7", "--engine.zero_stage", "9", "--model.num_heads", "7")
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "batch.rows_per_step" in lines[0], "the nearest right key is named"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--batch.rows_per_step", "12", "--order.lanes", "8"], ["order.lanes=8"]),
        (["--batch.rows_per_step", "8", "--cluster.num_workers", "9"], ["order.lanes=8"]),
        (["--batch.seq_len", "4096", "--model.max_positions", "2048"], ["batch.seq_len=4,096", "4,096"]),
        (["--validation.every_steps", "0"], ["validation.every_steps=0"]),
        (["--batch.seq_len", "0"], ["batch.seq_len=0"]),
        (["--run.steps", "0"], ["run.steps=0"]),
        (["--run.name", "../other"], ["run.name='../other'"]),
    ],
)
def test_sizes_that_do_not_fit_name_key_value_and_remedy(arguments, named):
    with pytest.raises(ConfigError) as error:
        load(*arguments)
    assert all(word in str(error.value) for word in named)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid_and_their_models_have_the_counted_parameters_on_meta_tensors(preset):
    config = load("--config", str(preset))
    shape = replace(config.model, vocab_size=config.corpus.tokenizer.vocab_size)
    with torch.device("meta"):
        model = Backbone(shape)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(shape).total


def test_large_presets_have_the_published_numbers_of_parameters():
    def millions(name: str) -> int:
        config = load("--config", str(PROJECT / "trainers" / "configs" / f"{name}.yaml"))
        shape = replace(config.model, vocab_size=config.corpus.tokenizer.vocab_size)
        return round(count_parameters(shape).total / 1e6)

    assert millions("llama-7b") == 6_738  # Touvron et al. 2023: 6,738,415,616
    assert millions("llama-1b") == 1_100  # TinyLlama: 1,100,048,384
    assert millions("gpt2-124m") == 124


def test_a_printed_configuration_reads_back_as_the_same(tmp_path):
    config = load("--run.prompts", '["a", "b"]', "--optimizer.kind", "muon")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load_config(PretrainConfig, ["--config", str(file)], description="").config == config


def test_a_run_goes_on_with_other_workers_stage_and_steps_but_not_with_another_model_or_order():
    before, other = (
        to_dict(load()),
        load("--cluster.num_workers", "2", "--engine.zero_stage", "3", "--run.steps", "7"),
    )
    assert changed_keys(before, other) == []
    lines = changed_keys(before, load("--model.hidden_size", "768", "--order.seed", "1"))
    assert [line.split("=")[0] for line in lines] == ["model.hidden_size", "order.seed"]
    assert "'run.name'" in lines[0] or "run.name" in lines[0]


def test_a_changed_configuration_is_refused_by_the_run_that_has_another(tmp_path):
    run = open_store(str(tmp_path))
    check_unchanged(run, load())
    run.put(CONFIG, to_yaml(load()).encode())
    check_unchanged(run, load())
    with pytest.raises(ConfigError, match=r"batch.seq_len=512, but the run was started with 1024"):
        check_unchanged(run, load("--batch.seq_len", "512"))


def test_workers_that_leave_no_cpu_for_reads_are_refused_with_what_fits():
    cluster = ClusterConfig(num_workers=2, cpus_per_worker=1.0)
    problem = cpu_problem(cluster, 0.25, num_cpus=2)
    assert problem and "cluster.cpus_per_worker=0.87" in problem
    fitting = replace(cluster, cpus_per_worker=0.87)
    assert cpu_problem(fitting, 0.25, num_cpus=2) is None


def test_uris_are_absolute_before_they_travel_to_a_worker(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = absolute(load("--run.storage", "runs", "--run.name", "first"))
    monkeypatch.chdir("/")
    assert Path(run_store(config).uri.removeprefix("file://")) == tmp_path / "runs" / "first"
    assert config.corpus.uri == f"file://{tmp_path}/raw"
    assert absolute(config) == config


def test_a_batch_has_at_least_one_row_and_one_token():
    assert len(list(BatchConfig(seq_len=0, rows_per_step=-1).problems("batch"))) == 2


def test_no_secret_of_the_environment_reaches_a_run_folder(monkeypatch):
    from trainers.run_folder import environment

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    assert "planted-secret" not in json.dumps(environment(load()))
