"""Laws of local files of work in progress: gone in the end, swept after a kill, and never another's."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cluster.sessions.session import PROJECT
from cluster.storage.scratch import problem_writing_locally, scratch_folder
from cluster.storage.uris import StorageError, open_store
from data.shards.shards import ShardWriter

WRITES = """
import sys
from cluster.storage.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "shard").write_bytes(bytes(1_000))
    print(folder, flush=True)
    sys.stdin.read()
"""


@contextmanager
def writing(place: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that writes below a folder until it is killed."""
    variables = os.environ | {"TMPDIR": str(place)}
    command = [sys.executable, "-c", WRITES]
    with subprocess.Popen(
        command, cwd=PROJECT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip()).parent
        finally:
            process.kill()


def named_as(folder: Path, ending: str) -> Path:
    """Another folder of the same process by name."""
    return folder.with_name(folder.name[:-8] + ending)


def test_what_a_killed_process_left_is_swept_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, elsewhere = tmp_path / "tmp", tmp_path / "elsewhere"
    place.mkdir()
    with writing(place) as (killed, left), writing(place) as (_, living):
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        never_locked = named_as(left, "unlocked")
        never_locked.mkdir()
        others = [
            elsewhere,
            place / f"{left.name}.old",
            place / f"x{left.name}",
            place / left.name.replace("scratch-", "scratch-another-host-"),
            place / "tmpabcdefgh",
        ]
        for folder in others:
            folder.mkdir()
            (folder / "kept").touch()
        link = named_as(left, "a_link00")
        link.symlink_to(elsewhere)
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        with scratch_folder() as mine:
            assert mine.is_dir() and not left.exists() and not never_locked.exists()
        assert not mine.exists() and (living / "files" / "shard").exists()
        assert set(place.iterdir()) == {living, link, *others} - {elsewhere}
        assert all((folder / "kept").exists() for folder in others)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may make another user's folder")
def test_what_another_user_left_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with writing(tmp_path) as (killed, left):
        killed.kill()
    assert left.is_relative_to(tmp_path)
    os.chown(left, 12_345, -1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder():
        assert left.exists()


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow above that, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_or_one_that_is_not_writable_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    assert problem_writing_locally(1_000) is None
    little = problem_writing_locally(2**62)
    assert little is not None and "a piece of work may take 4,611,686,018,427,387,904; free space" in little
    tokens = np.arange(10_000, dtype=np.uint16)
    with room_for(4_096):
        problem = problem_writing_locally(0)
        assert problem is not None and problem.startswith(
            f"{place}: cannot write temporary files: File too large"
        )
        assert "TMPDIR" in problem
        with (
            pytest.raises(StorageError, match="cannot write temporary files"),
            ShardWriter(
                open_store(f"{tmp_path}/prepared"),
                split="train",
                source="web",
                token_dtype="uint16",
                fragment_tokens=1_000,
            ) as writer,
        ):
            for document in range(100):
                writer.add(str(document), tokens, 1)
            writer.finish()
    assert not list(place.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}/absent")
    problem = problem_writing_locally(0)
    assert problem is not None and problem.startswith(
        f"{tmp_path}/absent: cannot write temporary files: No such file"
    )
