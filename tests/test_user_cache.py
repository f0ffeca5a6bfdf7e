"""What is copied for a user lies where nobody else can read it, and nothing that somebody else put there is read."""

import errno
import logging
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.sessions.session import PROJECT
from cluster.storage.store import ObjectInfo, Store
from cluster.storage.user_cache import NAME, PrivateFolderError, process_folder, user_cache
from trainers.exported.local_copy import local_copy
from trainers.model import compiling

SOMEBODY_ELSE = os.geteuid() + 1


class Bucket(Store):
    """A remote store of a model's two files, in place of S3."""

    def __init__(self) -> None:
        super().__init__("s3://bucket/model")

    def scan(self, prefix: str = "") -> list[ObjectInfo]:  # type: ignore[override]
        return [ObjectInfo(path, 4, "1") for path in ("config.json", "deep/weights")]

    def read(self, path: str) -> bytes:
        return path[:4].encode()


Bucket.__abstractmethods__ = frozenset()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, as it is where nothing was made yet."""
    process_folder.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / NAME


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_copy_is_readable_by_its_user_alone_whatever_the_umask(cache: Path) -> None:
    before = os.umask(0)
    try:
        copy = Path(local_copy(Bucket()).uri.removeprefix("file://"))
    finally:
        os.umask(before)
    assert copy.parent == cache and (copy / "deep/weights").read_bytes() == b"deep"
    found = {path.relative_to(cache): mode_of(path) for path in (cache, *cache.rglob("*"))}
    assert {each for path, each in found.items() if (cache / path).is_dir()} == {0o700}
    assert {each for path, each in found.items() if (cache / path).is_file()} == {0o600}


def test_the_cache_is_the_users_by_its_specification(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert user_cache() == cache
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert user_cache() == tmp_path / "home/.cache" / NAME
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache() == tmp_path / "home/.cache" / NAME


def planted_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("where", [".", "copy", "copy/config.json", "copy/deep"])
@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (planted_link, "is a link or no folder|is neither a file nor a folder"),
        (lambda path: path.chmod(mode_of(path) | 0o020), "open to others"),
        (lambda path: path.chmod(mode_of(path) | 0o004), "open to others"),
    ],
    ids=["a link", "others may write", "others may read"],
)
def test_what_others_could_have_planted_or_read_is_refused_by_name(
    cache: Path, where: str, plant: Callable[[Path], None], told: str
) -> None:
    copy = Path(local_copy(Bucket()).uri.removeprefix("file://"))
    path = cache / where.replace("copy", copy.name)
    plant(path)
    with pytest.raises(PrivateFolderError, match=told) as refused:
        local_copy(Bucket())
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("where", [".", "copy", "copy/config.json"])
def test_what_belongs_to_somebody_else_is_refused_by_name(
    cache: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(local_copy(Bucket()).uri.removeprefix("file://"))
    path = cache / where.replace("copy", copy.name)
    lstat = Path.lstat

    def planted(self: Path) -> os.stat_result:
        found = lstat(self)
        if self != path:
            return found
        return os.stat_result((*found[:4], SOMEBODY_ELSE, *found[5:]))

    monkeypatch.setattr(Path, "lstat", planted)
    with pytest.raises(PrivateFolderError, match=f"belongs to user {SOMEBODY_ELSE}") as refused:
        local_copy(Bucket())
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("home", ["a file", "read-only", "none"])
def test_without_a_cache_a_process_says_so_and_has_a_folder_of_its_own(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    mkdir = Path.mkdir

    def refused(self: Path, *arguments: object, **options: object) -> None:
        if "read-only" in self.parts:
            raise OSError(errno.EROFS, "Read-only file system")
        mkdir(self, *arguments, **options)  # type: ignore[arg-type]

    if home == "read-only":  # root may write wherever it likes, so that modes cannot tell
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "read-only"))
        monkeypatch.setattr(Path, "mkdir", refused)
    if home == "none":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with caplog.at_level(logging.WARNING):
        folder = user_cache()
    monkeypatch.undo()
    assert mode_of(folder) == 0o700 and folder.is_relative_to(tempfile.gettempdir())
    assert any(mode_of(parent) == 0o700 for parent in folder.parents)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "XDG_CACHE_HOME" in caplog.text and str(folder) in caplog.text


def test_a_folder_of_a_process_goes_with_it(tmp_path: Path) -> None:
    code = "from cluster.storage.user_cache import *; "
    code += "folder = process_folder('no home'); (folder / 'a').touch(); print(folder)"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    folder = Path(ended.stdout.strip())
    assert folder.is_relative_to(tmp_path) and not list(tmp_path.iterdir())
    assert ended.stderr.startswith("no home: ") and ended.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("plant", ["link", "file", "open", "somebody else's", "own"])
def test_no_compiled_code_is_loaded_from_where_others_could_have_put_it(
    plant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(compiling.VARIABLE, "")  # so that it is as before in the end
    monkeypatch.delenv(compiling.VARIABLE)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setenv("USER", "alice")
    monkeypatch.setenv("LOGNAME", "alice")
    folder = tmp_path / "torchinductor_alice"
    match plant:
        case "link":
            (tmp_path / "planted").mkdir()
            folder.symlink_to(tmp_path / "planted")
        case "file":
            folder.write_text("")
        case "open":
            folder.mkdir()
            folder.chmod(0o777)
        case "somebody else's":
            folder.mkdir()
            monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY_ELSE)
    compiling.compiled(len)
    found = Path(os.environ[compiling.VARIABLE])
    assert (found == folder) == (plant == "own")
    assert mode_of(found) == 0o700 and found.is_relative_to(tmp_path)


def test_no_module_names_a_place_in_the_shared_temporary_folder() -> None:
    paths = [
        path for top in ("cluster", "data", "trainers", "tune") for path in (PROJECT / top).rglob("*.py")
    ]
    named = re.compile(r"gettempdir|[\"\']/(var/)?tmp")
    found = {path.name for path in paths if named.search(path.read_text())}
    # nodes.py: Ray's own folder, whose size is told.
    assert found == {"nodes.py", "scratch.py"}, "use cluster.storage.scratch or cluster.storage.user_cache"
