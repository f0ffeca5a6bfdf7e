"""What a killed writer leaves in a folder is removed once it is nobody's for certain, a living one's is not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.sessions.session import PROJECT
from cluster.storage.local import ABANDONED_SECONDS
from cluster.storage.uris import open_store
from trainers.checkpoints.keeping import CheckpointConfig, retire

UPLOAD = """
import os, sys
from cluster.storage.uris import open_store
os.fsync = lambda _: (print("written", flush=True), sys.stdin.readline())  # it has no name yet
open_store(sys.argv[1]).put("checkpoints/step-00000001-w1-a1/part", b"1" * 1_000)
"""


def start_writer(root: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """A writer that waits before it gives its file the name, and that file."""
    command, pipe = [sys.executable, "-c", UPLOAD, str(root)], subprocess.PIPE
    writer = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=PROJECT)
    assert writer.stdout and writer.stdout.readline()
    (file,) = root.rglob(".unfinished-*")
    return writer, file


def age(path: Path, seconds: float) -> None:
    when = time.time() - seconds
    os.utime(path, (when, when))


def on_another_host(file: Path) -> Path:
    """The file as a writer of another kernel names it, whose locks are not seen from here."""
    other = format(int(file.name[12:20], 16) ^ 1, "08x")
    return file.rename(file.with_name(f".unfinished-{other}{file.name[20:]}"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["write", "sweep", "retire"])
def test_what_a_killed_writer_left_goes_after_an_hour_and_not_before(how: str, tmp_path: Path) -> None:
    writer, left = start_writer(tmp_path)
    with writer:
        writer.kill()
    left = on_another_host(left)
    store, again = open_store(str(tmp_path)), "checkpoints/step-00000001-w1-a1/another"
    assert store.list() == []
    store.sweep()
    assert left.exists(), "its writer might live"
    age(left, ABANDONED_SECONDS + 60)
    if how == "write":
        store.put(again, b"")
    elif how == "sweep":
        store.sweep("checkpoints")
    else:
        retire(store, CheckpointConfig(), newest="step-00000002-w1-a1")
    assert not left.exists()
    assert [info.path for info in store.list()] == ([again] if how == "write" else [])


@pytest.mark.slow
def test_a_writer_that_lives_keeps_its_file_however_long_it_sleeps(tmp_path: Path) -> None:
    writer, file = start_writer(tmp_path)
    with writer:
        writer.send_signal(signal.SIGSTOP)
        age(file, 2 * ABANDONED_SECONDS)
        open_store(str(tmp_path)).sweep()
        kept = file.exists()
        writer.kill()
    open_store(str(tmp_path)).sweep()
    assert kept and not file.exists()


def test_a_file_of_another_name_is_nobodys_left_over(tmp_path: Path) -> None:
    theirs = [
        tmp_path / name for name in (".unfinished-novel.txt", ".unfinished-", f".unfinished-{'a' * 33}")
    ]
    for path in theirs:
        path.write_text("kept")
        age(path, 2 * ABANDONED_SECONDS)
    open_store(str(tmp_path)).sweep()
    assert all(path.exists() for path in theirs)


@pytest.mark.slow
def test_what_a_writer_of_this_host_was_killed_over_goes_at_once_and_a_living_ones_file_beside_it_stays(
    tmp_path: Path,
) -> None:
    killed, left = start_writer(tmp_path / "run")
    living, file = start_writer(tmp_path / "run" / "other")
    link = left.with_name(left.name[:-1] + ("0" if left.name[-1] != "0" else "1"))
    (tmp_path / "theirs").write_text("kept")
    link.symlink_to(tmp_path / "theirs")
    with killed:
        killed.kill()
    open_store(str(tmp_path / "run")).sweep()
    assert not left.exists() and file.exists() and (tmp_path / "theirs").read_text() == "kept"
    living.communicate(b"go on\n")
    assert living.returncode == 0 and not file.exists()


@pytest.mark.slow
def test_what_a_living_writer_has_written_is_left_alone_and_gets_its_name(tmp_path: Path) -> None:
    writer, file = start_writer(tmp_path)
    store = open_store(str(tmp_path))
    age(file, ABANDONED_SECONDS - 60)
    store.sweep()
    store.put("checkpoints/step-00000001-w1-a1/beside", b"")
    writer.communicate(b"go on\n")
    assert writer.returncode == 0
    assert store.size("checkpoints/step-00000001-w1-a1/part") == 1_000
