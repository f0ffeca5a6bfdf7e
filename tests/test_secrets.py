"""Keys that are planted in a run's surroundings are found nowhere that it writes to (law L9)."""

import json
import secrets
import shutil
import tempfile
from pathlib import Path

import pytest

from cluster.storage import open_store
from k8s.check import K8S
from tests.small_run import SmallRun, put_corpus

VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN")


def files_with(folder: Path, words: list[bytes]) -> list[str]:
    """Files below a folder that hold any of the words, in their names or contents."""
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and any(word in path.read_bytes() or word in str(path).encode() for word in words)
    ]


@pytest.mark.cluster
def test_planted_keys_are_in_no_file_of_the_run_nor_in_any_log(tmp_path, monkeypatch) -> None:
    planted = {name: secrets.token_hex(16) for name in VARIABLES}
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    session = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a short path: it becomes that of sockets
    monkeypatch.setenv("RAY_TMPDIR", session)
    run = SmallRun(str(tmp_path / "storage"), tmp_path / "log.txt")
    put_corpus(open_store(f"{run.root}/raw"))
    try:
        assert run.finish(run.start(run__steps=4)) == 0, run.output()
        words = [value.encode() for value in planted.values()]
        assert open_store(f"{run.root}/runs/pretrain").exists("report.html")
        assert list(Path(session).rglob("*.log")), "no log of Ray was looked at"
        assert files_with(tmp_path, words) == []
        assert files_with(Path(session), words) == []
    finally:
        shutil.rmtree(session, ignore_errors=True)


@pytest.mark.parametrize(
    "key", ["AKIAPLANTED:planted/key@bucket", "AKIAPLANTED:planted@bucket", "planted@bucket"]
)
def test_a_key_in_a_uri_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ValueError, match="credentials") as found:
        open_store(f"s3://{key}/prefix")
    assert "planted" not in str(found.value).lower()


def test_the_policy_lets_a_run_write_its_own_places_and_nothing_else() -> None:
    policy = json.loads((K8S / "s3-policy.json").read_text())
    allowed: dict[str, set[str]] = {}
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        for resource in statement["Resource"]:
            allowed.setdefault(resource, set()).update(statement["Action"])
    writable = {resource for resource, actions in allowed.items() if "s3:PutObject" in actions}
    assert writable == {"arn:aws:s3:::example-corpus/prepared/*", "arn:aws:s3:::example-runs/runs/*"}
    assert not any("*" in action for actions in allowed.values() for action in actions)
    assert all(resource.startswith("arn:aws:s3:::example-") for resource in allowed)
