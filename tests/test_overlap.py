import random
from pydoc_data.topics import topics

import pytest

from benchmarks.overlap_rates import REWRITTEN
from data.curation.overlap import RUN, Runs

WORDS = [f"word{number}" for number in range(40)]


def test_a_text_is_found_wherever_a_long_run_of_it_stands() -> None:
    text = " ".join(WORDS[:20])
    assert Runs([text]).found_in(f"before {text.upper()}  after") == {0}
    assert Runs([text]).found_in(text[7 : 7 + RUN + 8]) == {0}


def test_shared_words_alone_are_no_overlap() -> None:
    text = " ".join(WORDS[:20])
    assert Runs([text]).found_in(" ".join(reversed(WORDS))) == set()


def test_a_short_text_counts_as_a_whole() -> None:
    assert Runs(["床前明月光", "没有这首诗"]).found_in("李白：床前明月光，疑是地上霜。") == {0}


TEXTS = [topic.strip()[:300] for topic in topics.values()][:40]


@pytest.mark.parametrize("way", REWRITTEN)
@pytest.mark.parametrize(
    "text", [TEXTS[0], "床前明月光，疑是地上霜。举头望明月，低头思故乡。", "The 12 men sold 1250 bonds."]
)
def test_a_text_is_found_however_it_is_rewritten_and_no_other_with_it(text: str, way: str) -> None:
    unrelated = [*TEXTS[1:], "没有这首诗", "春眠不觉晓，处处闻啼鸟。", "The 125 men sold 12.50 bonds."]
    runs = Runs([text, *unrelated])
    assert runs.found_in(f"It says: {REWRITTEN[way](text)} And so on.") == {0}


def test_the_same_words_in_another_order_and_punctuation_alone_are_no_overlap() -> None:
    runs = Runs([*TEXTS, "...", "?!"])
    for text in TEXTS:
        words = text.split()
        random.Random(0).shuffle(words)
        assert runs.found_in(f"{' '.join(words)}... ?!") == set()
