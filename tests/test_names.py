"""Laws of names: whatever a folder may be called, every command works in it to its end."""

import sys
from pathlib import Path

import pytest
import yaml
from task_files import put_lines, put_task, sentences

from cluster.sessions.session import PROJECT
from cluster.storage.uris import open_store
from tests.small_finetune import SHORT, command, put_place, run_of
from tests.small_run import SmallRun, put_corpus, start_command
from trainers.pretraining.run_folder import is_finished
from trainers.reporting.live_metrics import DriverLog, LiveMetrics, label_of

pytestmark = pytest.mark.cluster
NAME = "实验 一🚀 50%?#é'"


def ended_well(arguments: list[str], log: Path) -> str:
    """What a command printed, which has to end with status 0."""
    status = start_command(arguments, log).wait(240)
    said = log.read_text()
    assert status == 0, said[-3000:]
    return said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of such a name, with a task named so, a backbone and records."""
    folder = tmp_path_factory.mktemp("names") / NAME
    folder.mkdir()
    put_place(folder)
    put_task(
        folder / "task.yaml", name=NAME, kind="classification", data={"uri": str(folder / "records.jsonl")}
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("where", ["file", "s3"])
def test_a_run_of_any_name_is_trained_to_its_report(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue("s3_uri") if where == "s3" else str(tmp_path)
    run = SmallRun(f"{root}/{NAME}", tmp_path / "log.txt")
    put_corpus(open_store(f"{run.root}/raw"))
    arguments = run.command(run__steps=4, run__name=NAME, run__log_events=True, cluster__num_workers=2)
    ended_well(arguments, tmp_path / "log.txt")
    assert is_finished(open_store(f"{run.root}/runs").child(NAME))
    again = ended_well(arguments, tmp_path / "again.txt")
    assert f"{NAME}/report.html" in again


@pytest.mark.slow
def test_so_is_a_model_fine_tuned_by_a_group_of_workers_and_asked(place: Path, tmp_path: Path) -> None:
    ended_well(command(place, NAME, {"batch": SHORT, "cluster": {"num_workers": 2, "address": "local",
        "cpus_per_worker": 0.5}}), tmp_path / "log.txt")  # fmt: skip
    run = run_of(place, NAME)
    assert run.exists("report.html")
    records = put_lines(place / f"{NAME}.jsonl", sentences(10))
    answered = [sys.executable, str(PROJECT / "trainers" / "predict.py"), "--address", "local", "--model",
        run.child("export").uri, "--input", records, "--output", str(place / "answers" / NAME)]  # fmt: skip
    assert "10 records answered" in ended_well(answered, tmp_path / "predict.txt")


@pytest.mark.slow
def test_so_are_the_trials_of_a_sweep(place: Path, tmp_path: Path) -> None:
    content = {
        "sweep": {"name": NAME, "storage": str(place / "sweeps"), "trials": 1, "best": 1, "seeds": 1,
            "search": "random", "scheduler": "none"},
        "base": {
            "run": {"task": str(place / "task.yaml"), "prepared": str(place / "prepared")},
            "backbone": {"uri": str(place / "model")},
            "batch": SHORT,
            "engine": {"precision": "fp32", "zero_stage": 0, "micro_batch_rows": 16},
            "cluster": {"address": "local"},
        },
        "space": {"optimizer.learning_rate": {"choice": [0.001]}},
    }  # fmt: skip
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    ended_well(
        [sys.executable, str(PROJECT / "tune" / "sweep.py"), "--config", str(path)], tmp_path / "log.txt"
    )
    sweep = open_store(str(place / "sweeps")).child(NAME)
    assert sweep.exists("test.json") and sweep.exists("best.yaml")


@pytest.mark.parametrize("run", ["pretrain", "a b", "50%", "实验", "🚀", "naïve", 'q"\\'])
def test_metrics_take_any_name(run: str, ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with LiveMetrics(run) as live:
        live.observe({"attempt": 1, "step": 1, "event": "skipped", "time": 0.0})
    DriverLog(run, log_events=False)("finished", attempt=1)
    assert label_of(run).isascii() and (label_of(run) == run) == run.isascii()
