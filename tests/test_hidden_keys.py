"""A key that is planted in any location that a command takes is shown nowhere, and written into no file."""

import importlib.util
import re
import runpy
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_entries import ARGUMENTS, AWAY
from test_entries import ENTRIES as PATHS
from test_secrets import files_with

from cluster.configuration.keys import keys_of
from cluster.sessions.session import PROJECT
from data.prepare import PrepareConfig
from tests.task_files import put_task
from trainers.finetuning.config import FinetuneConfig
from trainers.planning.cluster_plan import ClusterPlanConfig
from trainers.pretraining.config import PretrainConfig
from tune.curves.label_curve import LabelEfficiencyConfig
from tune.sweep import SweepConfig
from tune.sweep_pretraining import PretrainSweepConfig

CONFIGS = {
    "prepare": PrepareConfig,
    "pretrain": PretrainConfig,
    "plan_cluster": ClusterPlanConfig,
    "finetune": FinetuneConfig,
    "sweep": SweepConfig,
    "sweep_pretraining": PretrainSweepConfig,
    "label_efficiency": LabelEfficiencyConfig,
}
ENTRIES = ARGUMENTS | {"plan_cluster": "", "preflight": f"--storage {AWAY}"}
FORMS = ("s3://AKIAKEY:{}@bucket/x", "s3:/AKIAKEY:{}@bucket/x", "gs://{}@bucket", "https://user:{}@host/x")
LOCATION = re.compile(r"\b(URI|path|folder|file|address)s?\b", re.IGNORECASE)


def location_keys(entry: str) -> Iterator[str]:
    """Keys of an entry's configuration that take a location, by what they say of themselves."""
    for name, key in keys_of(CONFIGS[entry]).items() if entry in CONFIGS else ():
        if LOCATION.search(key.doc) and ("str" in str(key.hint)):
            yield name


def command_lines(entry: str, given: str, uri: str) -> Iterator[str]:
    """The entry's arguments with `uri` in the place of each location, and as the value of each key."""
    words = given.split()
    for at, word in enumerate(words):
        if not word.startswith("-") and word not in ("a", "b", "[MASK]") and "{" not in word:
            yield " ".join([*words[:at], uri if "=" not in word else f"a={uri}", *words[at + 1 :]])
    for key in location_keys(entry):
        yield f"{given} --{key} {uri}"
        yield f"{given} --{key} {{a:{uri}}}"
    if entry in CONFIGS:
        yield f"{given} --config {uri}"
        yield f"{given} --print-config --{next(location_keys(entry), 'model.layers')} {uri}"
        yield f"{given} --no.such.key {uri}"
    yield f"{given} --no-such-option {uri}"


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A task whose records lie in a store at a port that is closed, in a folder to work in."""
    find = importlib.util.find_spec  # lm-eval has an environment of its own
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: name == "lm_eval" or find(name, *at))
    monkeypatch.setenv("STORE_PATIENCE_SECONDS", "0")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for name in ("STORAGE_EMULATOR_HOST", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    return put_task(tmp_path / "task.yaml", name="away", kind="classification", data={"uri": AWAY})


def run(entry: str, arguments: str, monkeypatch, capfd) -> tuple[object, str]:
    """Exit status and all output of an entry that is run as a file, in this process."""
    [path] = [path for path in PATHS if path.stem == entry]
    monkeypatch.setattr(sys, "argv", [str(path), *arguments.split()])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    status: object = 0
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as ended:
        status = ended.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    told = capfd.readouterr()
    return status, told.out + told.err


def test_the_locations_of_every_configuration_are_known() -> None:
    found = {entry: set(location_keys(entry)) for entry in CONFIGS}
    assert found["pretrain"] >= {
        "run.storage", "run.init_from", "corpus.uri", "corpus.sources", "corpus.prepared",
        "corpus.tokenizer.path", "cluster.address",
    }  # fmt: skip
    assert found["finetune"] >= {"run.storage", "run.task", "backbone.uri", "cluster.address"}
    assert found["sweep"] >= {"sweep.storage", "base.run.task", "base.backbone.uri"}


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_key_in_any_location_is_shown_by_no_command_and_written_nowhere(
    entry: str, task: str, monkeypatch, capfd, tmp_path: Path
) -> None:
    for form in FORMS if entry in ARGUMENTS else FORMS[:1]:
        secret = secrets.token_hex(12)
        for arguments in command_lines(entry, ENTRIES[entry].replace("TASK", task), form.format(secret)):
            status, told = run(entry, arguments, monkeypatch, capfd)
            assert secret not in told, arguments
            assert status in (0, 1, 2), (arguments, told)
        assert files_with(tmp_path, [secret.encode()]) == []


@pytest.mark.slow
@pytest.mark.parametrize("entry", ARGUMENTS)
@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST", "HTTP_PROXY"])
def test_a_key_in_the_address_of_a_store_that_is_away_is_not_shown(
    variable: str, entry: str, task: str, monkeypatch, capfd, tmp_path: Path
) -> None:
    secret = secrets.token_hex(12)
    monkeypatch.setenv("STORE_PATIENCE_SECONDS", "0.01")  # so that it says that it tries again
    monkeypatch.setenv(variable, f"http://user:{secret}@127.0.0.1:9")
    if variable == "HTTP_PROXY":
        for name in ("STORAGE_EMULATOR_HOST", "AWS_ENDPOINT_URL"):
            monkeypatch.setenv(name, "http://store.example")
        monkeypatch.setenv("http_proxy", f"http://user:{secret}@127.0.0.1:9")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
    uri = "s3://bucket/away" if variable == "AWS_ENDPOINT_URL" else AWAY
    _, told = run(entry, ARGUMENTS[entry].replace("TASK", task).replace(AWAY, uri), monkeypatch, capfd)
    assert secret not in told and "Traceback" not in told
    assert files_with(tmp_path, [secret.encode()]) == []


def test_entries_are_those_of_the_project() -> None:
    paths = [
        path for top in ("cluster", "data", "trainers", "tune") for path in (PROJECT / top).rglob("*.py")
    ]
    there = {path.stem for path in paths if "run_entry(" in path.read_text()} - {"config", "local_s3"}
    assert there == ENTRIES.keys()
