"""Laws of links and special files in a local store: nothing inside it leads out, only regular files are objects."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.configuration.config import load_config
from cluster.console.errors import ConfigError
from cluster.storage.uris import StorageError, Store, open_store
from data.reading.raw_shards import CorpusConfig, list_raw_shards
from data.tokens.tokenizer import TokenizerConfig

READS: dict[str, Callable[[Store, str], object]] = {
    "read": lambda store, path: store.read(path),
    "read_range": lambda store, path: store.read_range(path, 0, 1),
    "open": lambda store, path: store.open(path),
    "size": lambda store, path: store.size(path),
    "exists": lambda store, path: store.exists(path),
    "list": lambda store, path: store.list(path),
}
WRITES: dict[str, Callable[[Store, str], object]] = {
    "put": lambda store, path: store.put(path, b"new"),
    "put_if_absent": lambda store, path: store.put_if_absent(path, b"new"),
    "upload": lambda store, path: store.upload(Path(__file__), path),
    "delete": lambda store, path: store.delete(path),
}


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file outside of every store."""
    path = tmp_path / "elsewhere" / "secret.jsonl"
    path.parent.mkdir()
    path.write_text('{"text": "a secret"}\n')
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    path.mkdir()
    return path


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails instead of waiting for ever."""

    def too_long(*_: object) -> None:
        raise AssertionError(f"still waiting after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("way", READS)
@pytest.mark.parametrize("path", ["link.jsonl", "linked/secret.jsonl"])
def test_no_read_follows_a_link_out_of_the_store(way: str, path: str, folder: Path, secret: Path) -> None:
    (folder / "link.jsonl").symlink_to(secret)
    (folder / "linked").symlink_to(secret.parent)
    with pytest.raises(StorageError, match=path.partition("/")[0]) as refused:
        READS[way](open_store(str(folder)), path)
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("way", WRITES)
def test_no_write_follows_a_link_out_of_the_store(way: str, folder: Path, secret: Path) -> None:
    (folder / "linked").symlink_to(secret.parent)
    for store, path in (
        (open_store(str(folder)), "linked/secret.jsonl"),
        (open_store(str(folder)), "linked/deep/er/new"),
        (open_store(str(folder)).child("linked"), "secret.jsonl"),
        (open_store(str(folder)).child("linked").child("deep"), "new"),
    ):
        with pytest.raises(StorageError, match=r"leads out of .*store"):
            WRITES[way](store, path)
    assert secret.read_text() == '{"text": "a secret"}\n'
    assert os.listdir(secret.parent) == [secret.name]


def test_an_export_that_is_a_link_to_another_folder_is_neither_listed_nor_emptied(
    folder: Path, secret: Path
) -> None:
    (folder / "export").symlink_to(secret.parent)
    export = open_store(str(folder)).child("export")
    for use in (
        export.list,
        export.sweep,
        lambda: export.delete("secret.jsonl"),
        lambda: export.put("x", b""),
    ):
        with pytest.raises(StorageError, match="leads out"):
            use()
    assert "leads out" in (export.problem_reading() or "")
    assert "leads out" in (export.problem_writing() or "")
    assert os.listdir(secret.parent) == [secret.name]


@pytest.mark.parametrize("linked", ["runs/new/export", "runs/new"])
def test_one_run_does_not_export_over_another_by_a_link(linked: str, folder: Path) -> None:
    old = folder / "runs" / "old" / "export"
    old.mkdir(parents=True)
    (old / "config.json").write_bytes(b"old")
    (folder / linked).parent.mkdir(exist_ok=True)
    (folder / linked).symlink_to(old if linked.endswith("export") else old.parent)
    export = open_store(f"{folder}/runs").child("new").child("export")
    for use in (export.list, lambda: export.delete("config.json"), lambda: export.put("config.json", b"new")):
        with pytest.raises(StorageError, match=r"leads out of .*runs/new/export"):
            use()
    assert (old / "config.json").read_bytes() == b"old"


@pytest.mark.parametrize("way", ["put", "upload", "delete"])
def test_a_link_is_itself_replaced_or_removed_and_what_it_leads_to_stays(
    way: str, folder: Path, secret: Path
) -> None:
    (folder / "link").symlink_to(secret)
    WRITES[way](open_store(str(folder)), "link")
    assert not (folder / "link").is_symlink()
    assert secret.read_text() == '{"text": "a secret"}\n'


def test_a_link_keeps_its_name_from_who_writes_what_is_absent(folder: Path, secret: Path) -> None:
    (folder / "link").symlink_to(secret)
    assert not open_store(str(folder)).put_if_absent("link", b"new")
    assert secret.read_text() == '{"text": "a secret"}\n'


def test_a_raw_shard_that_is_a_link_to_a_foreign_file_is_no_training_text(
    folder: Path, secret: Path, tmp_path: Path
) -> None:
    (folder / "shard.jsonl").symlink_to(secret)
    with pytest.raises(StorageError, match=r"shard\.jsonl.*leads out"):
        list_raw_shards(CorpusConfig(uri=str(folder), prepared=str(tmp_path / "prepared")))


def test_the_folder_of_a_store_may_be_a_link_and_lie_under_one(tmp_path: Path) -> None:
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    (tmp_path / "mounted").symlink_to("disk")
    (tmp_path / "mounted" / "latest").symlink_to("runs")
    for place in ("mounted/runs", "mounted/latest"):
        store = open_store(str(tmp_path / place))
        assert store.problem_writing() is None
        store.child("a").put("b", b"1")
        assert store.read("a/b") == b"1"
        assert [info.path for info in store.list()] == ["a/b"]
        store.delete("a/b")


def test_a_link_that_stays_in_the_store_is_followed(folder: Path) -> None:
    """A ConfigMap is mounted so: each file a link through a link to a folder beside it."""
    store = open_store(str(folder))
    store.put("data-1/tokenizer.json", b"{}")
    (folder / "..data").symlink_to("data-1")
    (folder / "tokenizer.json").symlink_to("..data/tokenizer.json")
    assert store.read("tokenizer.json") == b"{}"
    assert store.size("tokenizer.json") == 2
    assert [(info.path, info.num_bytes) for info in store.list("token")] == [("tokenizer.json", 2)]


def test_a_listing_refuses_a_link_to_a_folder_which_could_lead_in_a_circle(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "up").symlink_to("..")
    with pytest.raises(StorageError, match=r"a/up: cannot list: it is a link to a folder"):
        open_store(str(folder)).list()


def test_links_to_nothing_and_in_a_circle_are_one_line_with_their_name(folder: Path) -> None:
    (folder / "nowhere").symlink_to("absent")
    (folder / "circle").symlink_to("circle")
    store = open_store(str(folder))
    for name in ("nowhere", "circle"):
        with pytest.raises(StorageError, match=f"{name}: cannot list") as refused:
            store.list(name)
        assert "\n" not in str(refused.value)
    assert not store.exists("nowhere")
    with pytest.raises(StorageError, match="circle"):
        store.read("circle")


@pytest.mark.parametrize("kind", ["fifo", "socket", "/dev/zero"])
@pytest.mark.parametrize("way", READS)
def test_what_is_no_regular_file_is_refused_without_waiting(way: str, kind: str, folder: Path) -> None:
    path = folder / "shard.jsonl"
    with socket.socket(socket.AF_UNIX) as listening, within(seconds=5):
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            with pytest.MonkeyPatch.context() as patch:  # the name of a socket may have 107 bytes
                patch.chdir(folder)
                listening.bind(path.name)
        else:
            path.symlink_to(kind)
        with pytest.raises(StorageError, match=r"shard\.jsonl"):
            READS[way](open_store(str(folder)), path.name)


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "circle"])
def test_a_configuration_that_is_no_regular_file_is_one_line_and_no_waiting(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "circle" else kind)
    with within(seconds=5), pytest.raises(ConfigError) as refused:
        load_config(TokenizerConfig, ["--config", str(path)], description="")
    [line] = refused.value.problems
    assert line.startswith(f"--config {path}: ")


def test_a_configuration_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.yaml").write_text("boundary: x\n")
    (tmp_path / "link.yaml").symlink_to("real.yaml")
    arguments = ["--config", str(tmp_path / "link.yaml")]
    assert load_config(TokenizerConfig, arguments, description="").config.boundary == "x"


def test_a_device_inside_the_store_is_refused(folder: Path) -> None:
    try:
        os.mknod(folder / "zero", 0o644 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root makes devices")
    for way, read in READS.items():
        with within(seconds=5), pytest.raises(StorageError, match="not a regular file"):
            read(open_store(str(folder)), "zero")
        assert way


@pytest.mark.parametrize("way", ["put", "put_if_absent", "upload"])
def test_a_file_where_a_folder_is_wanted_is_an_error_and_no_object_that_is_there(
    way: str, folder: Path
) -> None:
    store = open_store(str(folder))
    store.put("file", b"")
    with pytest.raises(StorageError, match="part of the path is a file"):
        WRITES[way](store, "file/x")


def test_a_listing_stays_in_the_store() -> None:
    with pytest.raises(ValueError, match="path within a store"):
        open_store("/tmp").list("../etc/")
