import errno
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.console.errors import ConfigError
from cluster.local_s3 import LocalS3
from cluster.storage.store import former_version
from cluster.storage.uris import MULTIPART, RetryPolicy, StorageError, Store, lies_in, open_parent, open_store
from data.reading.raw_shards import CorpusConfig
from tests.fault_proxy import FaultProxy
from tests.google_stub import GoogleStub
from trainers.planning.checks import problems_before_start
from trainers.pretraining.config import PretrainConfig, RunConfig

SOON = RetryPolicy(connect_seconds=1, silence_seconds=0.5, give_up_seconds=20)
CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def gs_uri(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with GoogleStub("bucket") as stub:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{stub.port}")
        yield "gs://bucket/a folder+"


S3 = pytest.param("s3", marks=pytest.mark.cluster)
SLOW = [pytest.param(fault, marks=pytest.mark.slow) for fault in ("hang", "slow")]


@pytest.fixture(params=["file", S3, "gs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return open_store(str(tmp_path / "store"))
    return open_store(request.getfixturevalue(f"{request.param}_uri"))


@pytest.fixture
def proxy(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture(params=[S3, "gs"])
def remote(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, FaultProxy]]:
    """A place in a store behind a network, and the proxy on the way there."""
    uri = request.getfixturevalue(f"{request.param}_uri")
    if request.param == "s3":
        yield uri, request.getfixturevalue("proxy")
    else:
        with FaultProxy(int(os.environ["STORAGE_EMULATOR_HOST"].rpartition(":")[2])) as proxy:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
            yield uri, proxy


def test_every_part_of_an_object_is_read_as_it_was_put(store: Store) -> None:
    store.put("a/b.bin", CONTENT)
    assert store.read("a/b.bin") == CONTENT
    assert store.read_range("a/b.bin", 1_000, 50_000) == CONTENT[1_000:51_000]
    assert store.size("a/b.bin") == len(CONTENT)
    assert store.child("a").read("b.bin") == CONTENT
    assert pickle.loads(pickle.dumps(store)).read("a/b.bin") == CONTENT
    store.put("a/b.bin", memoryview(b"over it"))
    assert store.read("a/b.bin") == b"over it"


def test_files_of_any_size_are_uploaded(store: Store, tmp_path: Path) -> None:
    for content in (b"", b"1", CONTENT):
        (tmp_path / "local").write_bytes(content)
        store.upload(tmp_path / "local", "x")
        assert store.read("x") == content


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=st.lists(st.tuples(st.integers(0, 320_000), st.integers(0, 90_000)), max_size=5))
def test_an_open_object_reads_as_a_file_does(store: Store, moves: list[tuple[int, int]]) -> None:
    if not store.exists("object"):
        store.put("object", CONTENT)
    reference = io.BytesIO(CONTENT)
    with store.open("object") as file:
        for position, length in moves:
            assert file.seek(position) == reference.seek(position)
            assert file.read(length) == reference.read(length)
        assert file.seek(-7, os.SEEK_END) == reference.seek(-7, os.SEEK_END)
        assert file.read() == reference.read()


def test_parquet_is_read_through_an_open_object(store: Store) -> None:
    table = pa.table({"tokens": np.arange(50_000)})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=10_000)
    store.put("table.parquet", sink.getvalue())
    with store.open("table.parquet") as file:
        assert pq.ParquetFile(file).read_row_group(3).equals(table.slice(30_000, 10_000))


def test_a_listing_holds_all_objects_below_a_prefix_in_order(store: Store) -> None:
    for path in ("b", "a/z", "a-b", "a/deep/er/x", "a.c", "ab/c"):
        store.put(path, path.encode())
    assert [info.path for info in store.list()] == ["a-b", "a.c", "a/deep/er/x", "a/z", "ab/c", "b"]
    assert [info.path for info in store.list("a/")] == ["a/deep/er/x", "a/z"]
    assert [info.path for info in store.list("a/de")] == ["a/deep/er/x"]
    assert [info.path for info in store.list("a")] == ["a-b", "a.c", "a/deep/er/x", "a/z", "ab/c"]
    assert [(info.path, info.num_bytes) for info in store.child("a").list()] == [("deep/er/x", 11), ("z", 3)]
    assert store.list("none/") == []


def test_a_listing_goes_on_after_a_full_page(store: Store) -> None:
    paths = [f"{number:05}" for number in range(1_003)]  # a page holds 1,000
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda path: store.put(path, b""), paths))
    assert [info.path for info in store.list()] == paths


def test_what_is_deleted_during_a_listing_is_left_out(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for name in "abc":
        store.put(name, b"")
    listing = store.scan()
    first = next(listing).path
    for name in "abc":
        store.delete(name)
    assert [info.path for info in listing] == [] and first in "abc"


def test_a_version_changes_with_the_content(store: Store) -> None:
    store.put("x", b"one")
    before = store.list()[0].version
    assert store.list()[0].version == before
    store.put("x", b"two")
    assert store.list()[0].version != before


def test_a_file_replaced_by_one_of_equal_size_and_time_has_another_version(tmp_path: Path) -> None:
    store, file = open_store(str(tmp_path)), tmp_path / "x"
    file.write_bytes(b"one")
    before, there = store.list()[0].version, file.stat()
    while (
        file.stat().st_ctime_ns == there.st_ctime_ns
    ):  # the file system's clock ticks some 250 times a second
        file.write_bytes(b"two")
    os.utime(file, ns=(there.st_atime_ns, there.st_mtime_ns))
    after = store.list()[0].version
    assert after != before and former_version(after) == former_version(before)


def test_a_store_tells_the_time(store: Store) -> None:
    assert abs(store.clock() - time.time()) < 3
    assert store.list() == [], "asking left a trace"


def test_an_absent_object_is_a_file_not_found(store: Store) -> None:
    store.put("folder/x", b"")
    for path in ("absent", "folder"):
        assert not store.exists(path)
        for read in (store.read, store.size, store.open, lambda path: store.read_range(path, 0, 1)):
            if path == "absent" or read is store.size:
                with pytest.raises(FileNotFoundError, match=path):
                    read(path)
    store.delete("absent")
    store.delete("folder/x")
    assert not store.exists("folder/x")


def test_a_range_past_the_end_is_an_error(store: Store) -> None:
    store.put("x", b"12345")
    assert store.read_range("x", 5, 0) == b""
    for start, length in ((3, 3), (7, 1)):
        with pytest.raises(StorageError, match="cut or replaced"):
            store.read_range("x", start, length)


@pytest.mark.slow
def test_one_of_many_racers_writes_an_absent_object(store: Store) -> None:
    start = threading.Barrier(24)

    def race(racer: int) -> bool:
        start.wait()
        return store.put_if_absent("record", b"%d" % racer)

    with ThreadPoolExecutor(24) as threads:
        won = list(threads.map(race, range(24)))
    assert sum(won) == 1
    assert store.read("record") == b"%d" % won.index(True)


def test_readers_see_the_old_object_or_the_new_one_whole(store: Store) -> None:
    versions = {bytes([number]) * (number * 40_001) for number in range(1, 6)}
    store.put("x", max(versions))
    is_over = threading.Event()

    def write() -> None:
        for _ in range(10):
            for version in versions:
                store.put("x", version)
        is_over.set()

    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(write)
        while not is_over.is_set() and not writing.done():
            assert store.read("x") in versions
        writing.result()


WRITE_FOR_EVER = """
import hashlib, sys
from cluster.storage.uris import open_store
store = open_store(sys.argv[1])
for number in range(1_000_000):
    content = bytes([number % 251]) * 3_000_000
    store.put("x", content + hashlib.sha256(content).digest())
    print(number, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_object(store: Store) -> None:
    for lines_before_the_end in (1, 2, 3):
        command = [sys.executable, "-c", WRITE_FOR_EVER, store.uri]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as writer:
            for _ in range(lines_before_the_end):
                assert writer.stdout and writer.stdout.readline()
            writer.kill()
        content = store.read("x")
        assert hashlib.sha256(content[:-32]).digest() == content[-32:]
        assert [info.path for info in store.list()] == ["x"]


def test_a_large_file_is_uploaded_in_parts_in_spite_of_faults(
    s3_uri: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    # A part of 32 MiB takes a while on a busy machine, and its silence is no fault.
    local, store = tmp_path / "large", open_store(s3_uri, RetryPolicy(silence_seconds=15))
    local.write_bytes(CONTENT * (MULTIPART.multipart_threshold // len(CONTENT) + 1))
    for fault in ("503", "reset"):
        proxy.break_next(fault, method="PUT", target="partNumber=2")
    store.upload(local, "large")
    assert proxy.broken == ["503", "reset"]
    assert hashlib.sha256(store.read("large")).digest() == hashlib.sha256(local.read_bytes()).digest()


@pytest.mark.parametrize("fault", ["503", "500", "reset", "lost", "truncate", *SLOW])
def test_a_passing_fault_changes_no_result(
    fault: str, remote: tuple[str, FaultProxy], tmp_path: Path
) -> None:
    uri, proxy = remote
    store = open_store(uri, SOON)
    local = tmp_path / "local"
    local.write_bytes(CONTENT)
    operations = {
        "put": lambda: store.put("x", CONTENT),
        "put_if_absent": lambda: store.put_if_absent("once", b"1"),
        "upload": lambda: store.upload(local, "y"),
        "read": lambda: store.read("x"),
        "read_range": lambda: store.read_range("y", 5, 100_000),
        "list": lambda: [info.path for info in store.list()],
        "size": lambda: store.size("y"),
        "delete": lambda: store.delete("y"),
    }
    results = {}
    for name, operation in operations.items():
        proxy.break_next(fault)
        results[name] = operation()
    assert results == {
        "put": None,
        "put_if_absent": True,
        "upload": None,
        "read": CONTENT,
        "read_range": CONTENT[5:100_005],
        "list": ["once", "x", "y"],
        "size": len(CONTENT),
        "delete": None,
    }
    assert proxy.broken == [fault] * len(operations)


def test_a_flipped_byte_of_a_whole_object_is_noticed(s3_uri: str, proxy: FaultProxy) -> None:
    store = open_store(s3_uri, SOON)
    store.put("x", CONTENT)
    proxy.break_next("corrupt", method="GET")
    assert store.read("x") == CONTENT
    assert proxy.broken == ["corrupt"]


@pytest.mark.slow
def test_the_winner_whose_answers_are_lost_still_wins(remote: tuple[str, FaultProxy]) -> None:
    uri, proxy = remote
    store = open_store(uri, SOON)
    proxy.break_next("lost", times=4, method="PUT" if uri.startswith("s3://") else "POST")
    assert store.put_if_absent("record", b"mine")
    assert len(proxy.broken) == 4
    assert not store.put_if_absent("record", b"mine")


def test_what_a_killed_server_acknowledged_is_there_after_its_restart(s3: LocalS3, s3_uri: str) -> None:
    store = open_store(s3_uri, RetryPolicy(connect_seconds=1, silence_seconds=5, give_up_seconds=60))
    acknowledged: list[str] = []
    enough = threading.Event()

    def write() -> None:
        while not (enough.is_set() and len(acknowledged) >= 60):
            path = f"{len(acknowledged):05}"
            store.put(path, path.encode() * 1_000)
            acknowledged.append(path)

    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(write)
        while len(acknowledged) < 30 and not writing.done():
            assert store.exists("00000") or len(acknowledged) < 30
        s3.kill()
        s3.start()
        enough.set()
        writing.result()
    assert [info.path for info in store.list()] == acknowledged
    assert all(store.read(path) == path.encode() * 1_000 for path in acknowledged)


@pytest.mark.slow
def test_a_store_that_stays_away_is_named_with_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    store = open_store("s3://corpus/x", RetryPolicy(connect_seconds=1, silence_seconds=1, give_up_seconds=1))
    with pytest.raises(StorageError, match=r"s3://corpus/x/y.*read.*127\.0\.0\.1:9.*AWS_ENDPOINT_URL"):
        store.read("y")


def test_a_wrong_key_is_one_line_without_the_secret(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    store = open_store(s3_uri)
    for problem in (store.problem_reading(), store.problem_writing()):
        assert problem and "\n" not in problem and "not-the-secret" not in problem
        assert s3_uri in problem and "AWS_SECRET_ACCESS_KEY" in problem
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY"):
        store.size("x")


def test_a_bucket_that_may_be_read_and_not_written_is_one_line_before_a_job_starts(
    s3_uri: str, proxy: FaultProxy
) -> None:
    store = open_store(s3_uri)
    store.put("x", b"input")
    proxy.break_next("403", times=100, method="PUT")
    assert store.problem_reading() is None
    problem = store.problem_writing() or ""
    assert problem.startswith(f"{s3_uri}/") and "\n" not in problem
    assert "cannot write: AccessDenied" in problem and "the bucket's policy" in problem
    config = PretrainConfig(
        run=RunConfig(storage=f"{s3_uri}/runs"),
        corpus=CorpusConfig(uri=s3_uri, prepared=f"{s3_uri}/prepared"),
    )
    denied = [line for line in problems_before_start(config) if "AccessDenied" in line]
    assert [line.partition(":")[0] for line in denied][:1] == ["run.storage"], denied
    assert store.list() == store.list("x"), "nothing was left behind"


def test_no_key_at_all_is_named(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "AWS_PROFILE" in (open_store(s3_uri).problem_writing() or "")


def test_a_role_whose_keys_do_not_come_at_once_is_asked_again(
    s3: LocalS3, s3_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = {
        "Version": 1,
        "AccessKeyId": s3.environment["AWS_ACCESS_KEY_ID"],
        "SecretAccessKey": s3.environment["AWS_SECRET_ACCESS_KEY"],
    }
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    asked = tmp_path / "asked"
    script = tmp_path / "keys.sh"
    script.write_text(f"test -e {asked} && exec cat {tmp_path}/keys.json; touch {asked}; exit 1\n")
    (tmp_path / "config").write_text(f"[default]\ncredential_process = sh {script}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    open_store(s3_uri, SOON).put("x", b"1")
    assert asked.exists()


def test_a_service_accounts_token_is_exchanged_for_keys(
    s3: LocalS3, s3_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, list[str]]] = []
    keys = {
        "AccessKeyId": s3.environment["AWS_ACCESS_KEY_ID"],
        "SecretAccessKey": s3.environment["AWS_SECRET_ACCESS_KEY"],
        "SessionToken": "",  # the S3 server has no sessions
        "Expiration": "2100-01-01T00:00:00Z",
    }
    found = "".join(f"<{name}>{value}</{name}>" for name, value in keys.items())
    call = "AssumeRoleWithWebIdentity"
    answer = (
        f"<{call}Response><{call}Result><Credentials>{found}</Credentials></{call}Result></{call}Response>"
    )

    class SecurityTokenService(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer.encode())

    (tmp_path / "token").write_text("signed by the cluster")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    # What EKS puts into a pod of such an account.
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/pretraining")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    with serving(SecurityTokenService) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", url)
        open_store(s3_uri, SOON).put("x", b"1")
    assert asked[0]["Action"] == [call]
    assert asked[0]["RoleArn"] == ["arn:aws:iam::123456789012:role/pretraining"]
    assert asked[0]["WebIdentityToken"] == ["signed by the cluster"]


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of an HTTP server for the length of a with-block."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, ThreadPoolExecutor(1) as thread:
        thread.submit(server.serve_forever, 0.05)
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


@pytest.mark.slow
def test_a_store_that_throttles_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = b"<Error><Code>Throttling</Code><Message>Rate exceeded</Message></Error>"
    answers = [(400, busy)] * 4 + [(200, b"content")]  # three of them the client itself takes

    class Throttling(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with serving(Throttling) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        assert open_store("s3://bucket/x", SOON).read("y") == b"content"


def test_the_patience_with_a_store_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_store("s3://bucket/x").policy == RetryPolicy()
    monkeypatch.setenv("STORE_PATIENCE_SECONDS", "900")
    assert open_store("s3://bucket/x").policy.give_up_seconds == 900
    for wrong in ("soon", "-1", "nan"):
        monkeypatch.setenv("STORE_PATIENCE_SECONDS", wrong)
        with pytest.raises(ValueError, match=f"STORE_PATIENCE_SECONDS={wrong}"):
            open_store("s3://bucket/x")


def test_a_disk_without_hard_links_is_named_before_a_job_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "link", refuse)
    assert "hard links" in (open_store(str(tmp_path / "runs")).problem_writing() or "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", [S3, "gs"])
def test_a_missing_bucket_is_named(scheme: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(f"{scheme}_uri")
    store = open_store(f"{scheme}://no-such-bucket/x")
    for problem in (store.problem_reading(), store.problem_writing()):
        assert "create the bucket" in (problem or "")


def test_a_place_is_tried_before_a_job_starts(store: Store) -> None:
    assert "nothing is there" in (store.problem_reading() or "")
    assert store.problem_writing() is None
    assert store.list() == []
    store.put("x", b"")
    assert store.problem_reading() is None


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = open_store(str(tmp_path / "file" / "folder"))
    assert "is a file" in (store.problem_writing() or "")
    with pytest.raises(StorageError, match="part of the path is a file"):
        store.put("x", b"")


@pytest.mark.parametrize("uri", ["http://x/y", "file://host/x", "s3://", "gs://", "s4://b/x"])
def test_what_is_no_location_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="s3://BUCKET/PREFIX"):
        open_store(uri)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x"])
def test_no_path_leads_out_of_a_store(store: Store, path: str) -> None:
    for use in (store.read, store.child, lambda path: store.put(path, b"")):
        with pytest.raises(ValueError, match="path within a store"):
            use(path)


@pytest.mark.parametrize(
    ("uri", "folder", "name"),
    [
        ("/tokenizer.json", "file:///", "tokenizer.json"),
        ("a/b.json", f"file://{os.getcwd()}/a", "b.json"),
        ("b.json", f"file://{os.getcwd()}", "b.json"),
        ("file:///a/b/", "file:///a", "b"),
        ("s3://bucket/a.json", "s3://bucket", "a.json"),
    ],
)
def test_the_store_that_holds_a_file_is_that_of_its_uri(uri: str, folder: str, name: str) -> None:
    store, found = open_parent(uri)
    assert (store.uri, found) == (folder, name)


@pytest.mark.parametrize(
    ("inner", "outer", "lies"),
    [
        ("s3://bucket/in/out", "s3://bucket/in/", True),
        ("s3://bucket/in", "s3://bucket/in", True),
        ("s3://bucket/in-2", "s3://bucket/in", False),
        ("s3://bucket/in", "s3://bucket/in/out", False),
        ("gs://bucket/in/out", "s3://bucket/in", False),
        ("in/../in/out", "in", True),
        ("in2", "in", False),
    ],
)
def test_a_place_lies_in_another_by_its_parts_however_both_are_spelled(
    inner: str, outer: str, lies: bool
) -> None:
    assert lies_in(inner, outer) is lies


@pytest.mark.parametrize("uri", ["s3:/bucket/x", "gs:/bucket"])
def test_a_slash_too_few_is_no_folder_of_that_name(uri: str) -> None:
    with pytest.raises(ConfigError, match=uri.replace(":/", "://")):
        open_store(uri)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text("ab %?#é中+&=;:@[]{}|^`~'\"", min_size=1).map(lambda name: f"x{name}x"))
@pytest.mark.parametrize("scheme", ["s3://bucket/", "gs://bucket/", "/folder/"])
def test_ray_and_pyarrow_take_a_place_for_the_place_that_it_is(
    scheme: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in (("AWS_ENDPOINT_URL", "http://127.0.0.1:9"), ("AWS_REGION", "us-east-1")):
        monkeypatch.setenv(variable, value)  # or it would ask Amazon where the bucket is
    uri = scheme + name
    _, path = pyarrow.fs.FileSystem.from_uri(open_store(uri).storage_path())
    assert path == uri.partition("://")[2] or path == uri


def test_a_traceback_shows_no_password_of_an_endpoint_either(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret")):
        monkeypatch.setenv(name, value)
    at_once = RetryPolicy(connect_seconds=1, silence_seconds=1, give_up_seconds=0)
    for endpoint, chained in (("http://user:PLANTED@127.0.0.1:9", False), ("http://127.0.0.1:9", True)):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(StorageError) as failed:
            open_store("s3://bucket/x", at_once).read("y")
        told = "".join(traceback.format_exception(failed.value))
        assert "PLANTED" not in told and ("botocore" in told) == chained, told


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:9/user:PLANTED@x",
        "http//user:PLANTED@h",
        "http://user:PLANTED x@h",
        "http://user:PLANTED@[::1",
    ],
)
def test_what_is_no_address_is_told_in_one_line_that_does_not_show_it(
    variable: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, address)
    with pytest.raises(ConfigError, match=f"{variable} is no address") as refused:
        open_store("s3://bucket/x").exists("y")
    assert "PLANTED" not in str(refused.value)


def test_addresses_of_stores_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("http://127.0.0.1:9", "HTTP://minio.ns.svc:9000/", "https://u:p@h", "http://[::1]:9000"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        assert getattr(open_store("s3://bucket/x"), "endpoint", None) == address
