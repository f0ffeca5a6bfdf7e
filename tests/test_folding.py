"""What a comparison of texts sees, and what it does not."""

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.curation.folding import folded

INVISIBLE = ["\u00ad", "\u200b", "\u200c", "\u200d", "\u2060", "\ufeff", "\ufe0f", "\u034f", "\u202e", "\x00"]


@pytest.mark.parametrize(
    "other", ["Good.", "good", "ＧＯＯＤ！", " “Good”…", "go-od", "g o o d", "Go\u00adod"]
)
def test_case_width_blanks_and_punctuation_make_no_difference(other: str) -> None:
    assert folded(other) == folded("Good")


@pytest.mark.parametrize("character", INVISIBLE)
def test_what_is_not_shown_makes_no_difference_within_words_and_numbers(character: str) -> None:
    for text in ("cat", "1889", "कि"):
        assert folded(character.join(text)) == folded(text)


def test_chinese_is_the_same_with_and_without_blanks_line_ends_and_either_width_of_marks() -> None:
    assert folded("床前明月光，疑是地上霜。") == folded("床前 明月光,\n疑是地上霜") == "床前明月光疑是地上霜"


@pytest.mark.parametrize("pair", [("कि", "की"), ("कि", "क"), ("กา", "ก"), ("résumé", "resume"), ("が", "か")])
def test_marks_and_vowels_of_any_script_are_kept(pair: tuple[str, str]) -> None:
    assert folded(pair[0]) != folded(pair[1])


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_composition_makes_no_difference(form: str) -> None:
    text = "Ｒésumé ﬁn Ａ１ が 각 ẛ̣"
    assert folded(unicodedata.normalize(form, text)) == folded(text)


def test_texts_without_a_letter_stay_apart() -> None:
    texts = ["?", "!", "...", "👍", "👎", "\u200b", "1.25", "12.5", "125", "1 25.", "<", ">"]
    assert len({folded(text) for text in texts}) == len(texts) - 1  # 1.25 and "1 25."
    assert all(folded(text) for text in texts)


@given(st.text(max_size=40))
def test_a_folded_text_folds_to_itself_and_no_text_to_nothing(text: str) -> None:
    once = folded(text)
    assert folded(once) == once
    assert bool(once) == bool(text)


def test_a_hidden_character_beside_a_blank_makes_no_difference_to_punctuation_alone() -> None:
    assert folded("! \u200b") == folded("\u200b !") == folded("!")


@pytest.mark.parametrize("marks", ["\u0301\u0323", "\u0301\u200b\u0323", "\u0301.\u0323", "\uff9e\u0301"])
def test_a_text_of_marks_takes_time_in_proportion_to_its_length(marks: str) -> None:
    def seconds(number: int) -> float:
        start = time.process_time()
        assert len(folded("a" + marks * number)) < 40
        return time.process_time() - start

    assert seconds(300_000) < 40 * max(seconds(30_000), 0.01)
