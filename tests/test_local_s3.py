import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

import psutil
import pytest

from cluster import local_s3
from cluster.local_s3 import LocalS3

PROJECT = Path(__file__).parents[1]
# Leaves its count of lives in the store, tells where that is, and ends as it is told to.
COMMAND = """
import os, signal, sys
from cluster.storage.uris import open_store
store = open_store("s3://checkpoints/lives")
def save(*_):
    store.put(f"{len(store.list())}", b"")
    print("saved", len(store.list()), flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
print(os.environ["AWS_ENDPOINT_URL"], flush=True)
signal.pause()
"""


def start(folder: Path) -> tuple[subprocess.Popen[str], int]:
    """The server's script with `COMMAND` running under it, and the server's port."""
    arguments = [
        sys.executable,
        "cluster/local_s3.py",
        "--dir",
        str(folder),
        "--",
        sys.executable,
        "-c",
        COMMAND,
    ]
    script = subprocess.Popen(arguments, cwd=PROJECT, stdout=subprocess.PIPE, text=True, process_group=0)
    assert script.stdout
    return script, urlparse(script.stdout.readline().strip()).port or 0


def wait_for_refusal(port: int) -> None:
    """Return once nobody listens; the test's own limit of time ends it otherwise."""
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return


@pytest.mark.slow
def test_a_command_under_the_server_saves_when_it_is_told_to_end(tmp_path: Path) -> None:
    for lives in (1, 2):
        script, port = start(tmp_path)
        with script:
            script.terminate()
            assert script.stdout and script.stdout.read() == f"saved {lives}\n"
        assert script.returncode == 7
        wait_for_refusal(port)


@pytest.mark.slow
def test_an_interrupt_at_the_keyboard_lets_the_command_save(tmp_path: Path) -> None:
    script, _ = start(tmp_path)
    with script:
        for process in (script.pid, *(child.pid for child in psutil.Process(script.pid).children())):
            if (
                "weed" not in psutil.Process(process).name()
            ):  # which has a session, hence a keyboard, of its own
                psutil.Process(process).send_signal(signal.SIGINT)
        assert script.stdout and script.stdout.read() == "saved 1\n"
    assert script.returncode == 7


@pytest.mark.timeout(60)
@pytest.mark.slow
def test_the_server_does_not_outlive_a_killed_script(tmp_path: Path) -> None:
    script, port = start(tmp_path)
    command = next(child for child in psutil.Process(script.pid).children() if "weed" not in child.name())
    script.kill()
    script.wait()
    wait_for_refusal(port)
    command.kill()


def test_a_server_that_cannot_start_leaves_the_aws_variables_as_they_were(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://before:1")
    server = LocalS3(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", server.port + 2))
        taken.listen()
        with pytest.raises(RuntimeError, match="did not start"), server:
            pass
    assert os.environ["AWS_ENDPOINT_URL"] == "http://before:1"


def test_ports_that_are_taken_on_another_address_are_left_alone(tmp_path, monkeypatch):
    free = LocalS3(tmp_path).port
    with socket.socket() as other:
        other.bind(("127.0.0.2", 0))
        drawn = iter((other.getsockname()[1], free))
        monkeypatch.setattr(local_s3.random, "randrange", lambda *_: next(drawn))
        assert LocalS3(tmp_path).port == free
