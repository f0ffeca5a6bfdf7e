"""A text's one form is Unicode's, whatever marks it holds, in time in proportion to its length."""

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.reading.clean import normalise, with_ordered_marks

MARKS = "\u0301\u0323\u0345\u0344\u0f71\u0f73\u3099\uff9e\u093f\u094d\u05b0\u0300\u1ab0"


@given(
    text=st.text(alphabet="aé각1" + MARKS, min_size=1, max_size=40),
    times=st.integers(16, 60),
    form=st.sampled_from(["NFC", "NFKC"]),
)
def test_ordered_marks_are_the_same_text(text, times, form):
    long = "é" + text * times + "."
    assert unicodedata.normalize(form, with_ordered_marks(long, form)) == unicodedata.normalize(form, long)


def test_marks_of_a_long_run_are_ordered_and_a_usual_text_is_left_alone():
    assert with_ordered_marks("a" + "\u0301\u0323" * 300, "NFC") == "a" + "\u0323" * 300 + "\u0301" * 300
    usual = "Zażółć gęślą jaźń, दिल्ली में बारिश, 今天天气真好 a\u0301\u0323. " * 50
    assert with_ordered_marks(usual, "NFC") is usual


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
@pytest.mark.parametrize("marks", ["\u0301\u0323", "\uff9e\u0301", "\u0344\u0323"])
def test_a_text_of_marks_takes_time_in_proportion_to_its_length(marks, form):
    def seconds(number):
        start = time.process_time()
        normalise("a" + marks * number, form)
        return time.process_time() - start

    assert seconds(300_000) < 40 * max(seconds(30_000), 0.01)
