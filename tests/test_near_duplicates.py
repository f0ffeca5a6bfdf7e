import random
from pydoc_data.topics import topics

import pytest

from benchmarks.near_duplicate_recall import recall, true_pairs, with_copies
from data.curation.folding import folded
from data.curation.near_duplicates import RECALL, group_near_duplicates

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def sentence(seed: int) -> str:
    """Twenty words of random letters: two sentences share hardly a run of five characters."""
    random_letters = random.Random(seed).choices
    return " ".join("".join(random_letters(LETTERS, k=7)) for _ in range(20))


def jaccard(one: str, other: str) -> float:
    a, b = ({text[i : i + 5] for i in range(len(text) - 4)} for text in (folded(one), folded(other)))
    return len(a & b) / len(a | b)


def test_texts_that_differ_in_a_word_are_grouped_and_others_are_not() -> None:
    texts = [sentence(seed) for seed in range(50)]
    altered = [text.replace(" ", " indeed ", 1) for text in texts]
    groups = group_near_duplicates(texts + altered, 0.7)
    assert min(jaccard(a, b) for a, b in zip(texts, altered, strict=True)) > 0.75
    assert max(jaccard(a, b) for a in texts for b in texts if a != b) < 0.05
    assert (groups[:50] == groups[50:]).all()
    assert len(set(groups.tolist())) == 50


def test_case_and_blanks_make_no_difference_even_where_only_equal_texts_are_grouped() -> None:
    groups = group_near_duplicates(["A  good film", "a good\nfilm", "a good movie"], 1.0)
    assert groups.tolist() == [0, 0, 2]


def test_links_join_groups() -> None:
    # a is like b and b is like c: no split may part them.
    start = [f"word{number}" for number in range(60)]
    chain = [" ".join(start[shift : shift + 40]) for shift in (0, 5, 10)]
    assert jaccard(chain[0], chain[1]) > 0.75 > 0.65 > jaccard(chain[0], chain[2])
    assert len(set(group_near_duplicates(chain, 0.7).tolist())) == 1


def test_texts_shorter_than_a_shingle_are_compared_whole() -> None:
    assert group_near_duplicates(["好", "坏", "好"], 0.7).tolist() == [0, 1, 0]


@pytest.mark.parametrize("similarity", [0.7, 1.0])
def test_punctuation_width_and_hidden_characters_make_no_difference(similarity: float) -> None:
    texts = ["Good.", "Good", "ＧＯＯＤ！", "Go\u00adod", "很好。", "很好!", "Bad", "!", "?", "👍", "👎"]
    assert group_near_duplicates(texts, similarity).tolist() == [0, 0, 0, 0, 4, 4, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.9])
def test_nearly_all_pairs_at_or_above_the_similarity_are_found_and_the_others_as_the_bands_say(
    similarity: float,
) -> None:
    sentences = [part for topic in topics.values() for part in topic.split("\n\n") if 30 < len(part) < 300]
    texts = list(dict.fromkeys(map(folded, with_copies(sentences[:2_000]))))
    bands = recall(texts, true_pairs(texts, similarity - 0.1), similarity)
    alike = [band for band in bands if band[0] >= similarity]
    assert alike[0][1] >= 30  # pairs just above the similarity
    assert all(found >= RECALL * pairs - 1 for _, pairs, found, _ in alike)
    assert sum(found for *_, found, _ in alike) >= 0.99 * sum(pairs for _, pairs, _, _ in alike)
    for _, pairs, found, expected in bands:
        # Four standard deviations of a binomial count.
        assert abs(found - expected) <= 4 * (expected * (1 - expected / pairs)) ** 0.5 + 1 if pairs else True
