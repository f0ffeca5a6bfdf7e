import os
import subprocess
import sys
from pathlib import Path

from fault_proxy import FaultProxy

from cluster.local_s3 import LocalS3
from cluster.sessions.session import PROJECT
from cluster.storage.uris import open_store
from trainers.exported.local_copy import local_copy


def test_a_remote_folder_is_fetched_once_for_each_version(s3_uri: str, tmp_path: Path) -> None:
    source = open_store(s3_uri)
    source.put("config.json", b"1")
    source.put("deep/weights", b"w" * 1_000)
    first = local_copy(source, tmp_path)
    assert [first.read("config.json"), first.read("deep/weights")] == [b"1", b"w" * 1_000]
    Path(first.uri.removeprefix("file://"), "config.json").write_bytes(
        b"kept"
    )  # what is fetched is not fetched again
    assert local_copy(source, tmp_path).read("config.json") == b"kept"
    source.put("config.json", b"2")
    assert local_copy(source, tmp_path).read("config.json") == b"2"


def test_a_local_folder_is_read_where_it_is(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert local_copy(store) is store


FETCH = """
import sys
from pathlib import Path
from cluster.storage.uris import open_store
from trainers.exported.local_copy import local_copy
print("ready", flush=True)
sys.stdin.readline()
print(len(local_copy(open_store(sys.argv[1]), Path(sys.argv[2])).read("weights")))
"""


def test_of_a_nodes_processes_one_fetches_and_what_a_dead_one_left_is_no_part_of_it(
    s3: LocalS3, s3_uri: str, tmp_path: Path
) -> None:
    open_store(s3_uri).put("weights", b"w" * 1_000)
    with FaultProxy(s3.port) as proxy:
        proxy.break_next("slow", times=10, method="GET", target="weights")  # each read takes 0.2 s
        command = [sys.executable, "-c", FETCH, s3_uri, str(tmp_path)]
        processes = [
            subprocess.Popen(
                command,
                cwd=PROJECT,
                env=os.environ | {"AWS_ENDPOINT_URL": proxy.url},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        assert [process.stdout and process.stdout.readline() for process in processes] == ["ready\n"] * 2
        for process in processes:
            assert process.stdin
            print(file=process.stdin, flush=True)
        assert [process.communicate(timeout=60)[0] for process in processes] == ["1000\n"] * 2
        assert len(proxy.broken) == 1, "the object was read more than once"
    [copy] = [path for path in tmp_path.iterdir() if path.is_dir()]
    copy.rename(copy.with_name(f".{copy.name}"))  # as if it had been killed before it was done
    (copy.with_name(f".{copy.name}") / "torn").write_bytes(b"half")
    assert [info.path for info in local_copy(open_store(s3_uri), tmp_path).list()] == ["weights"]
