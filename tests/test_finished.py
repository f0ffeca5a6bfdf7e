"""Laws of a finished run: the same command hands it out at once, and another one is told what was trained instead."""

import json
import shutil
from pathlib import Path

import pytest

from cluster.configuration.config import load_config
from cluster.console.errors import ConfigError
from cluster.storage.uris import open_store
from data.preparing.corpus import prepare
from tests.small_finetune import SHORT, config, put_place
from tests.test_prepare import one_by_one
from tests.test_report import FILES
from trainers import pretrain
from trainers.finetuning.run import finetune
from trainers.pretraining.config import PretrainConfig, absolute, run_store
from trainers.pretraining.run_folder import write_start
from trainers.reporting.metrics import MetricsWriter

OF_A_FINISHED_RUN = ("best.json", "test.json", "floor.json", "samples.json")


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command of a run that is finished, in a working directory with its raw corpus."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"id": f"d{n}", "text": f"the {n}th text of {n * n} words " * 9}) for n in range(60)]
    open_store("raw").put("part-0.jsonl", "\n".join(lines).encode())
    given = [
        "--corpus.uri", "raw", "--corpus.prepared", "prepared", "--run.storage", "runs", "--run.steps", "20",
        "--corpus.fragment_tokens", "256", "--corpus.tokenizer.vocab_size", "300", "--corpus.splits.validation", "0.2",
        "--corpus.splits.test", "0.2", "--batch.seq_len", "16", "--batch.rows_per_step", "4",
    ]  # fmt: skip
    started = absolute(load_config(PretrainConfig, given, description="").config)
    run = run_store(started)
    write_start(run, started, prepare(started.corpus, fan_out=one_by_one), "plan")
    for path in OF_A_FINISHED_RUN:
        run.put(path, FILES[path].encode())
    run.put("test.claim.json", json.dumps({"checkpoint": "step-00000010-w2-a1"}).encode())
    run.put("export/config.json", b"{}")
    with MetricsWriter(run, 1) as writer:
        writer.write({"step": 0, "event": "start", "world_size": 1})
    return given


def test_the_same_command_says_that_it_is_finished_and_no_more(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain.main(arguments)
    said = capsys.readouterr().out
    assert "the run is finished" in said and "the run was trained on" not in said


def test_so_does_one_that_runs_elsewhere_or_otherwise(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    others = ["--engine.zero_stage", "2", "--checkpoint.every_steps", "7", "--run.max_failures", "9"]
    pretrain.main([*arguments, *others, "--cluster.join_seconds", "5", "--run.log_events"])
    assert "the run is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.seed", "1"),
        ("run.steps", "40"),
        ("run.prompts", "[To be]"),
        ("run.floor_bytes", "0"),
        ("corpus.uri", "raw2"),
        ("corpus.uri", "not/there"),
        ("order.seed", "1"),
        ("validation.patience", "1"),
        ("engine.precision", "fp32"),
        ("engine.deepspeed", "{zero_optimization: {overlap_comm: false}}"),
        ("energy.overhead", "2"),
    ],
)
def test_one_that_would_have_trained_or_reported_something_else_is_refused_by_the_key(
    key: str, value: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("raw", "raw2")
    for flags in ([], ["--dry-run"]):
        with pytest.raises(ConfigError) as refused:
            pretrain.main([*arguments, f"--{key}", value, *flags])
        [line] = refused.value.problems
        assert f": {key}" in line and "but the run was started with" in line
    assert "finished" not in capsys.readouterr().out


@pytest.mark.parametrize("what", ["gone", "grown", "rewritten"])
def test_a_raw_corpus_that_is_no_longer_what_was_trained_is_named(
    what: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if what == "gone":
        shutil.rmtree("raw")
    else:
        name = "part-0.jsonl" if what == "rewritten" else "part-1.jsonl"
        open_store("raw").put(name, json.dumps({"id": "new", "text": "another text"}).encode())
    pretrain.main(arguments)
    [remark, *_] = capsys.readouterr().out.splitlines()
    assert str(Path("raw").absolute()) in remark and "the run was trained on what it was then" in remark


@pytest.mark.slow
def test_so_is_a_finished_fine_tuning(tmp_path: Path) -> None:
    place = put_place(tmp_path)
    finetune(config(place, "done", batch=SHORT), keep_model=False, judge=False)
    assert finetune(config(place, "done", batch=SHORT, checkpoint={"every_steps": 3}), judge=False)
    for key, value in (("gradient_clip", 3.0), ("precision", "bf16")):
        with pytest.raises(ConfigError, match=rf"engine.{key}={value!r}, but the run was started with"):
            finetune(config(place, "done", batch=SHORT, engine={key: value}), judge=False)
