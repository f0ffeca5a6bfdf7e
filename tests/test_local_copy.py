from pathlib import Path

from cluster.storage import open_store
from trainers.local_copy import local_copy


def test_a_remote_folder_is_fetched_once_for_each_version(s3_uri: str, tmp_path: Path) -> None:
    source = open_store(s3_uri)
    source.put("config.json", b"1")
    source.put("deep/weights", b"w" * 1_000)
    first = local_copy(source, tmp_path)
    assert [first.read("config.json"), first.read("deep/weights")] == [b"1", b"w" * 1_000]
    open_store(first.uri).put("config.json", b"kept")  # what is fetched is not fetched again
    assert local_copy(source, tmp_path).read("config.json") == b"kept"
    source.put("config.json", b"2")
    assert local_copy(source, tmp_path).read("config.json") == b"2"


def test_a_local_folder_is_read_where_it_is(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert local_copy(store) is store
