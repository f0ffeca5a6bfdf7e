import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokens.ngram import MAX_ORDER, NGram, Smoothing, fit

SMOOTHINGS: tuple[Smoothing, ...] = ("kneser-ney", "witten-bell")
texts = st.lists(st.text("abc \n", max_size=60).map(str.encode), min_size=1, max_size=4).filter(any)


def next_byte_distribution(model: NGram, context: bytes) -> np.ndarray:
    return np.array([model.probabilities([context + bytes([byte])])[-1] for byte in range(256)])


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@settings(max_examples=25, deadline=None)
@given(documents=texts, context=st.binary(max_size=8) | st.text("abc ", max_size=8).map(str.encode))
def test_probabilities_of_the_next_byte_sum_to_one_after_any_context(smoothing, documents, context):
    probabilities = next_byte_distribution(fit(documents, order=4, smoothing=smoothing), context)
    assert probabilities.min() > 0
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_witten_bell_bigram_equals_the_computation_by_hand():
    model = fit([b"abac"], order=2, smoothing="witten-bell")
    # Order 1: a twice, b and c once, 3 distinct in 4: what is left to the uniform distribution is 3 / 7.
    b_alone = 1 / 7 + 3 / 7 / 256
    a_alone = 2 / 7 + 3 / 7 / 256
    # Order 2: after the start only a (1 distinct in 1); after a: b and c (2 in 2); after b only a (1 in 1).
    expected = [1 / 2 + 1 / 2 * a_alone, 1 / 4 + 2 / 4 * b_alone, 1 / 2 + 1 / 2 * a_alone]
    assert model.probabilities([b"aba"]) == pytest.approx(expected, abs=1e-15)
    assert model.bits([b"aba"]) == pytest.approx(-sum(map(math.log2, expected)), abs=1e-12)
    assert model.bits([b"aba", b"", b"aba"]) == pytest.approx(2 * model.bits([b"aba"]), abs=1e-12)


def test_kneser_ney_bigram_equals_the_computation_by_hand():
    model = fit([b"abac"], order=2)  # too short to estimate discounts: half a count each
    # Order 1 counts distinct bytes before: a after the start and after b, b after a, c after a: 2, 1, 1 of 4.
    freed = 3 * 0.5 / 4
    a_alone, c_alone = 1.5 / 4 + freed / 256, 0.5 / 4 + freed / 256
    # Order 2: a follows the start once; after a: b once, c once; after c nothing was seen.
    expected = [0.5 / 1 + 0.5 / 1 * a_alone, 0.5 / 2 + 2 * 0.5 / 2 * c_alone, a_alone]
    assert model.probabilities([b"aca"]) == pytest.approx(expected, abs=1e-15)


def test_kneser_ney_of_every_order_equals_a_direct_implementation():
    letters = np.random.default_rng(5).choice(list(b"abcdefgh"), 300, p=np.arange(8, 0, -1) / 36)
    text, query = bytes(letters.tolist()), b"abcdefghhgfedcbaxaab"
    model = fit([text], order=MAX_ORDER)
    bits = []
    for order in range(1, MAX_ORDER + 1):
        contexts = [(b"\0" * order + query)[at + 1 : at + order] for at in range(len(query))]
        expected = [direct_kneser_ney(text, *pair, order) for pair in zip(contexts, query, strict=True)]
        for alike in (fit([text], order), model.of_order(order)):
            assert alike.probabilities([query]) == pytest.approx(expected, rel=1e-12)
        bits.append(-sum(map(math.log2, expected)))
    assert model.bits_by_order([query]) == pytest.approx(bits, rel=1e-12)
    assert model.bits_by_order([query, b"", query]) == pytest.approx(2 * np.array(bits), rel=1e-12)


def test_unseen_bytes_have_a_probability_where_the_estimate_of_a_discount_is_negative():
    # Pairs seen once: 4, twice: 4, three times: 2, four times: 16; 3 - 4 y n4 / n3 is below zero.
    times = [1, 1, 2, 2, 3, *[4] * 8]
    documents = [
        bytes([number, 0x61]) for number, repeats in enumerate(times, start=65) for _ in range(repeats)
    ]
    probabilities = next_byte_distribution(fit(documents, order=2), b"M")
    assert probabilities.min() > 0 and probabilities.sum() == pytest.approx(1, abs=1e-12)


def direct_kneser_ney(text: bytes, context: bytes, byte: int, highest: int) -> float:
    """Interpolated modified Kneser-Ney of the order `highest` from dictionaries, as its authors write it down."""
    order = len(context) + 1
    padded = b"\0" * (highest - 1) + text
    counts = Counter(padded[at : at + highest] for at in range(len(text)))
    for _ in range(highest - order):  # distinct left neighbours instead of occurrences
        counts = Counter(gram[1:] for gram in counts)
    n1, n2, n3, n4 = (sum(count == n for count in counts.values()) for n in (1, 2, 3, 4))
    discounts = [0.0, 0.5, 0.5, 0.5]
    if n1 and n2 and n3 and n4:
        y = n1 / (n1 + 2 * n2)
        estimates = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        bounded = [min(estimate, count) for count, estimate in enumerate(estimates, start=1)]
        discounts[1:] = [discount if discount > 0 else 0.5 for discount in bounded]
    lower = direct_kneser_ney(text, context[1:], byte, highest) if context else 1 / 256
    after = {gram: count for gram, count in counts.items() if gram[:-1] == context}
    if not after:
        return lower
    own = after.get(context + bytes([byte]), 0)
    freed = sum(discounts[min(count, 3)] for count in after.values())
    return (own - discounts[min(own, 3)] + freed * lower) / sum(after.values())


def test_documents_do_not_see_each_other():
    model = fit([b"abcabcabc"], order=3)
    together = model.probabilities([b"ab", b"ca"])
    apart = [*model.probabilities([b"ab"]), *model.probabilities([b"ca"])]
    assert together.tolist() == apart


def test_no_more_text_than_the_limit_is_fitted():
    assert fit([b"aaaa", b"bbbb", b"cccc"], order=2, max_bytes=6).num_bytes == 6
    limited = fit([b"aaaa", b"bbbb", b"cccc"], order=2, max_bytes=6).probabilities([b"bcb"])
    assert limited.tolist() == fit([b"aaaa", b"bb"], order=2).probabilities([b"bcb"]).tolist()


def test_a_long_document_scores_the_same_as_in_blocks(monkeypatch):
    text = b"to be or not to be that is the question " * 5
    model = fit([text], order=6)
    whole = model.probabilities([text])
    monkeypatch.setattr("data.tokens.ngram.BLOCK_BYTES", 7)
    assert model.probabilities([text]).tolist() == whole.tolist()


@pytest.mark.parametrize("order", [0, 9])
def test_an_order_that_does_not_fit_64_bits_is_named(order):
    with pytest.raises(ValueError, match=f"order={order}"):
        fit([b"text"], order=order)


def test_nothing_to_fit_is_an_error():
    with pytest.raises(ValueError, match="no text"):
        fit([b"", b""])
