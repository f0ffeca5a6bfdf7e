"""Laws of every command: what its user can mend is one line with the place and the remedy, and no traceback."""

import ast
import importlib.util
import runpy
import signal
import sys
from pathlib import Path

import pytest
from task_files import put_task

from cluster.configuration.config import run_entry
from cluster.console.errors import ConfigError, UserError
from cluster.sessions.session import PROJECT
from cluster.storage.store import StorageError

ENTRIES = [
    path
    for folder in ("cluster", "data", "trainers", "tune")
    for path in sorted((PROJECT / folder).glob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text()
]
READS_NO_GIVEN_STORE = {
    "local_s3": "it is the store",
    "plan_cluster": "it computes",
    "preflight": "it lists a store that is away among the faults of each node (test_preflight.py)",
}
AWAY = "gs://bucket/away"
SPACE = '--space {"optimizer.learning_rate":{"choice":[0.1,0.2]}}'
ARGUMENTS = {
    "compare": f"--model a={AWAY} --corpus {AWAY}",
    "domain_text": f"--task TASK --output {AWAY}",
    "embed": f"--model {AWAY} --text a",
    "evaluate": f"--model {AWAY} --corpus {AWAY}",
    "export": f"--run {AWAY} --output out",
    "fill_mask": f"--model {AWAY} --text [MASK]",
    "finetune": f"--run.task TASK --backbone.uri {AWAY}",
    "generate": f"--model {AWAY} --prompt a",
    "harness": f"--model {AWAY} --task TASK",
    "label_efficiency": f"--base.run.task TASK --base.backbone.uri {AWAY}",
    "next_sentence": f"--model {AWAY} --first a --second b",
    "predict": f"--model {AWAY} --input {AWAY} --output out",
    "prepare": f"--corpus.uri {AWAY} --corpus.prepared out",
    "pretrain": f"--corpus.uri {AWAY} --corpus.prepared out --run.storage out",
    "report": f"--run {AWAY}",
    "sample": f"--output {AWAY}",
    "sample_tasks": f"--output {AWAY}",
    "sweep": f"--base.run.task TASK --base.backbone.uri {AWAY} {SPACE}",
    "sweep_pretraining": f"--base.corpus.uri {AWAY} --base.corpus.prepared out {SPACE}",
}


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder to work in, with a task whose records lie in a store at a port that is closed."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("STORE_PATIENCE_SECONDS", "0")
    monkeypatch.chdir(tmp_path)
    return put_task(tmp_path / "task.yaml", name="away", kind="classification", data={"uri": AWAY})


def run(entry: str, arguments: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Exit status and standard error of an entry that is run as a file, in this process."""
    [path] = [path for path in ENTRIES if path.stem == entry]
    monkeypatch.setattr(sys, "argv", [str(path), *arguments.split()])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return ended.value.code, capfd.readouterr().err


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_every_entry_runs_through_the_one_place_that_tells_errors(path: Path) -> None:
    [ends] = [
        node for node in ast.parse(path.read_text()).body if ast.unparse(node).startswith("if __name__ == ")
    ][-1:]
    assert isinstance(ends, ast.If) and ast.unparse(ends.body[-1]).startswith("run_entry(")


def test_every_entry_is_tried_with_a_store_that_is_away() -> None:
    assert {path.stem for path in ENTRIES} == ARGUMENTS.keys() | READS_NO_GIVEN_STORE.keys()


@pytest.mark.parametrize("entry", ARGUMENTS)
def test_a_store_that_is_away_is_one_line_with_place_and_remedy(
    entry: str, away: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec  # lm-eval has an environment of its own
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: name == "lm_eval" or find(name, *at))
    status, told = run(entry, ARGUMENTS[entry].replace("TASK", away), monkeypatch, capfd)
    assert status in (1, 2), told
    [line] = told.splitlines()
    assert AWAY in line and "check that the store can be reached" in line


@pytest.mark.parametrize("uri", ["file.txt", "s3://bucket/away"])
def test_so_is_a_folder_that_is_a_file_and_a_bucket_behind_a_closed_port(
    uri: str, away: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file.txt").write_text("a file")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    status, told = run("report", f"--run {uri}", monkeypatch, capfd)
    [line] = told.splitlines()
    assert status == 1 and uri in line and ("correct the URI" in line or "check that the store runs" in line)


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ConfigError(["a=1 is wrong", "b=2 too"]), 2, "a=1 is wrong\nb=2 too\n"),
        (UserError("the corpus is torn"), 1, "train: the corpus is torn\n"),
        (StorageError("s3://b/a: cannot read"), 1, "train: s3://b/a: cannot read\n"),
        (
            PermissionError(13, "Permission denied", "x.yaml"),
            1,
            "train: [Errno 13] Permission denied: 'x.yaml'\n",
        ),
        (LookupError("declared by the entry"), 1, "train: declared by the entry\n"),
        (KeyboardInterrupt(), 130, "train: interrupted\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_mend_has_its_lines_and_status(error, status, told, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py"])

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_entry(main, LookupError)
    assert ended.value.code == status and capsys.readouterr().err == told


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_entry(lambda: 1 // 0)
