import random

from data.near_duplicates import folded, group_near_duplicates, shingles

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def sentence(seed: int) -> str:
    """Twenty words of random letters: two sentences share hardly a run of five characters."""
    random_letters = random.Random(seed).choices
    return " ".join("".join(random_letters(LETTERS, k=7)) for _ in range(20))


def jaccard(one: str, other: str) -> float:
    a, b = set(shingles(folded(one))), set(shingles(folded(other)))
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
