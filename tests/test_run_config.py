"""The root configuration: what does not fit between sections, what may change under way, the presets."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from cluster.configuration.config import load_config, to_dict, to_yaml
from cluster.console.errors import ConfigError
from cluster.sessions.session import PROJECT, joined_resources
from cluster.sessions.workers import ClusterConfig
from cluster.storage.uris import open_store
from data.prepare import main as prepare_main
from data.tokens.tokenizer import TokenizerConfig, train_tokenizer
from trainers.evaluation.verdict import claim_test_split
from trainers.finetuning.config import FinetuneConfig
from trainers.model.backbone import Backbone
from trainers.model.shape import count_parameters
from trainers.planning.checks import resources_here
from trainers.pretrain import main
from trainers.pretraining.config import BatchConfig, PretrainConfig, absolute, run_store
from trainers.pretraining.run_folder import CONFIG, check_unchanged
from trainers.stored.changes import changed_keys
from tune.curves.label_curve import CurveConfig
from tune.search.config import SweepConfig

# As the sample's documents are named, and in both its languages.
DOCUMENTS = [
    *(
        (f"{play}/01", f"Enter the king of {play}. He speaks. " * 20)
        for play in ("macbeth", "hamlet", "lear")
    ),
    *((f"review/{number}", f"今天天气真好，我们去公园吧。{number}" * 20) for number in range(3)),
]
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
        (
            ["--order.weights.wbe", "1"],
            ["order.weights.wbe", "order.weights has no weight for the source corpus"],
        ),
        (["--corpus.splits.test", "0"], ["the test split", "corpus.splits.test"]),
    ],
)
def test_sizes_that_do_not_fit_name_key_value_and_remedy(arguments, named):
    with pytest.raises(ConfigError) as error:
        load(*arguments)
    assert all(word in str(error.value) for word in named)


def test_a_split_of_named_documents_alone_is_no_empty_one():
    assert load("--corpus.splits.test", "0", "--corpus.splits.test_documents", '["hamlet/*"]')


def arguments_of(preset: Path, raw: str = "raw", folder: str = "") -> list[str]:
    """A preset with its sources, whatever they are called, all in one place."""
    written = yaml.safe_load(preset.read_text())
    sources = written.get("corpus", {}).get("sources") or written.get("order", {}).get("weights") or {}
    uris = {f"corpus.sources.{name}": raw for name in sources} or {"corpus.uri": raw}
    uris |= {"corpus.prepared": f"{folder}prepared", "run.storage": f"{folder}runs"}
    return ["--config", str(preset), *(part for key, value in uris.items() for part in (f"--{key}", value))]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid_and_their_models_have_the_counted_parameters_on_meta_tensors(preset):
    config = load_config(PretrainConfig, arguments_of(preset), description="").config
    shape = replace(config.model, vocab_size=config.corpus.tokenizer.vocab_size)
    with torch.device("meta"):
        model = Backbone(shape)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(shape).total


@pytest.fixture(scope="module")
def small_export(tmp_path_factory) -> Path:
    """A model to go on from."""
    folder = tmp_path_factory.mktemp("export")
    shape = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer = train_tokenizer([text for _, text in DOCUMENTS], TokenizerConfig(vocab_size=300))
    (folder / "tokenizer.json").write_text(tokenizer.json)
    return folder


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_dry_run_of_every_preset_prints_its_plan_and_writes_nothing(preset, small_export, tmp_path, capsys):
    lines = [json.dumps({"id": name, "text": text}, ensure_ascii=False) for name, text in DOCUMENTS]
    raw = open_store(f"{tmp_path}/raw")
    raw.put("part-0.jsonl", "\n".join(lines).encode())
    arguments = arguments_of(preset, raw.uri, f"{tmp_path}/")
    if preset.stem == "continue":
        arguments += ["--run.init_from", str(small_export)]
    main([*arguments, "--dry-run"])
    plan = capsys.readouterr().out
    config = load_config(PretrainConfig, arguments, description="").config
    assert f"{config.run.steps:,} steps x {config.batch.rows_per_step:,} rows" in plan
    assert all(
        f"\n{name} " in plan for name in ("model", "compute", "workers", "memory", "checkpoints", "time")
    )
    needs_gpus = config.cluster.gpus_per_worker * config.cluster.num_workers > resources_here()["GPU"]
    assert ("not on this machine" in plan and "GPUs" in plan) or not needs_gpus
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_piece_of_the_corpus_too_large_for_this_machine_is_said_by_each_dry_run(tmp_path, capsys):
    lines = [json.dumps({"id": name, "text": text}, ensure_ascii=False) for name, text in DOCUMENTS]
    open_store(f"{tmp_path}/raw").put("part-0.jsonl", "\n".join(lines).encode())
    corpus = ["--corpus.uri", f"{tmp_path}/raw", "--corpus.prepared", f"{tmp_path}/prepared"]
    corpus += ["--corpus.cpus_per_piece", str(resources_here()["CPU"] + 1), "--dry-run"]
    runs = ["--run.storage", f"{tmp_path}/runs", "--run.name", "one"]
    for command, own in ((main, runs), (prepare_main, [])):
        command([*corpus, *own])
        assert "not on this machine: corpus.cpus_per_piece" in capsys.readouterr().out
    for command, own in ((main, runs), (prepare_main, [])):
        with pytest.raises(ConfigError, match=r"corpus\.cpus_per_piece"):
            command([*corpus[:-1], *own])


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


@pytest.mark.parametrize("finished", [False, True])
def test_a_bound_on_unpacking_changes_no_run_nor_one_of_before_there_was_one(finished: bool) -> None:
    before = to_dict(load())
    assert changed_keys(before, load("--corpus.max_expansion", "7"), finished=finished) == []
    del before["corpus"]["max_expansion"]
    assert changed_keys(before, load(), finished=finished) == []


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("key", [("model", "num_layers"), ("order", "seed"), ("schedule", "warmup_steps")])
def test_a_key_that_is_younger_than_a_run_had_its_default_there(key: tuple[str, str], finished: bool) -> None:
    before = to_dict(load())
    del before[key[0]][key[1]]
    assert changed_keys(before, load(), finished=finished) == []
    [line] = changed_keys(before, load(f"--{'.'.join(key)}", "77"), finished=finished)
    assert line.startswith(f"{'.'.join(key)}=77")


def test_a_changed_configuration_is_refused_by_the_run_that_has_another(tmp_path):
    run = open_store(str(tmp_path))
    check_unchanged(run, load())
    run.put(CONFIG, to_yaml(load()).encode())
    check_unchanged(run, load())
    with pytest.raises(ConfigError, match=r"batch.seq_len=512, but the run was started with 1024"):
        check_unchanged(run, load("--batch.seq_len", "512"))


def test_steps_that_are_no_more_than_those_done_are_one_line_and_the_runs_own_are_not_refused(tmp_path):
    run = open_store(str(tmp_path))
    run.put(CONFIG, to_yaml(load("--run.steps", "100")).encode())
    for step in (20, 40):
        run.put(f"checkpoints/step-{step:08d}-w1-a1/COMMIT.json", b"{}")
    for steps in ("100", "41", "200"):
        check_unchanged(run, load("--run.steps", steps))
    for steps in ("40", "20", "7"):
        with pytest.raises(ConfigError, match=rf"run.steps={steps} is not above the 40 steps that are done"):
            check_unchanged(run, load("--run.steps", steps))
    run.put(CONFIG, to_yaml(load("--run.steps", "40")).encode())
    check_unchanged(run, load("--run.steps", "40"))  # cut off between its last step and its judgement


def test_once_the_test_split_is_opened_nothing_may_lead_to_another_choice(tmp_path):
    run = open_store(str(tmp_path))
    run.put(CONFIG, to_yaml(load()).encode())
    check_unchanged(run, load("--run.steps", "7"))
    claim_test_split(run, "step-00000001")
    check_unchanged(run, load("--run.prompts", '["a"]'))
    for change in (["--run.steps", "7"], ["--validation.patience", "1"]):
        with pytest.raises(ConfigError, match=change[0].removeprefix("--")):
            check_unchanged(run, load(*change))


def test_a_driver_waits_for_the_nodes_of_a_cluster_that_just_starts(monkeypatch, capsys):
    config, nodes = ClusterConfig(num_workers=2), iter([[], [{"CPU": 1.0}], [{"CPU": 1.0}] * 2])
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert joined_resources(config, lambda: next(nodes)) == [{"CPU": 1.0}] * 2
    assert "cluster.num_workers=2" in capsys.readouterr().out
    given_up = replace(config, join_seconds=0.0)
    assert joined_resources(given_up, lambda: [{"CPU": 1.0}]) == [{"CPU": 1.0}], (
        "the caller says what is lacking"
    )


def test_a_driver_that_waits_long_for_nodes_goes_on_saying_what_is_there_and_how_long_it_waits(
    monkeypatch, capsys
):
    now = iter(range(0, 10_000, 20))
    monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    joined_resources(ClusterConfig(num_workers=2, join_seconds=100.0), lambda: [{"CPU": 1.0}])
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told] == [
        f"waiting for nodes, {left} s more" for left in (100, 60, 20)
    ]
    assert all("= 2 CPUs, but the cluster has 1" in line for line in told)


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
    from trainers.pretraining.run_folder import environment

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    assert "planted-secret" not in json.dumps(environment(load()))


def test_what_commands_leave_is_not_uploaded_with_a_job() -> None:
    """`ray job submit` leaves out what .gitignore names; models among it would be more than Ray takes."""
    ignored = (PROJECT / ".gitignore").read_text().split()
    folders = [PretrainConfig().run.storage, FinetuneConfig().run.storage, FinetuneConfig().run.prepared]
    folders += [SweepConfig().sweep.storage, CurveConfig().storage]
    assert {f"/{folder.partition('/')[0]}/" for folder in folders} <= set(ignored)
