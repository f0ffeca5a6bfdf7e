"""Laws of splits: decided by content or by name, never by time, place, or what else is in the corpus."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.reading.clean import content_hash
from data.reading.splits import SplitConfig, keyed_points, matching_pattern, split_of


def hashes(count: int) -> list[bytes]:
    return [content_hash(str(number).encode()) for number in range(count)]


@given(st.text(), st.text(), st.text(), st.binary(min_size=16, max_size=16))
def test_copies_of_a_text_fall_into_one_split_wherever_they_stand(
    shard: str, one: str, other: str, content: bytes
) -> None:
    config = SplitConfig(validation=0.3, test=0.3)
    assert split_of(config, shard, one, content) == split_of(config, "a.jsonl", other, content)


@pytest.mark.parametrize("seed", [0, 1, 12_345])
def test_splits_have_their_shares(seed: int) -> None:
    config = SplitConfig(validation=0.1, test=0.02, seed=seed)
    splits = [split_of(config, "s", "d", content) for content in hashes(20_000)]
    for split, share in (("validation", 0.1), ("test", 0.02), ("train", 0.88)):
        deviation = math.sqrt(20_000 * share * (1 - share))
        assert abs(splits.count(split) - 20_000 * share) < 4 * deviation


def test_another_seed_is_another_choice() -> None:
    one, two = (
        [split_of(SplitConfig(validation=0.5, seed=seed), "s", "d", content) for content in hashes(1_000)]
        for seed in (0, 1)
    )
    assert 350 < sum(a == b for a, b in zip(one, two, strict=True)) < 650


def test_named_documents_and_shards_go_before_fractions_and_test_before_validation() -> None:
    config = SplitConfig(
        validation=0.9,
        test=0.05,
        test_documents=("hamlet/*",),
        validation_shards=("held-out/*.jsonl",),
    )
    for content in hashes(200):
        assert split_of(config, "held-out/a.jsonl", "hamlet/1", content) == "test"
        assert split_of(config, "held-out/a.jsonl", "macbeth/1", content) == "validation"
        assert split_of(config, "a.jsonl", "macbeth/1", content) == "train"
    assert matching_pattern(config, "held-out/a.jsonl", "x") == ("validation_shards", "held-out/*.jsonl")


def test_a_split_that_is_named_leaves_the_other_its_fraction() -> None:
    config = SplitConfig(validation=0.2, test=0.2, test_documents=("hamlet/*",))
    splits = [split_of(config, "s", "d", content) for content in hashes(5_000)]
    assert 0 < splits.count("validation") < 1_300 and splits.count("test") == 0


def test_points_of_different_keys_are_unrelated_and_even() -> None:
    words = np.arange(100_000, dtype=np.uint64)
    one, two = keyed_points(words, 1), keyed_points(words, 2)
    counts, _ = np.histogram(one, bins=20, range=(0, 1))
    assert np.abs(counts - 5_000).max() < 4 * math.sqrt(5_000)
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.015
    assert len(np.unique(one)) == len(words)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.integers(0, 2**40))
def test_a_word_has_the_same_point_alone_as_among_others(words: list[int], key: int) -> None:
    together = keyed_points(np.array(words, np.uint64), key)
    assert [keyed_points(word, key) for word in words] == together.tolist()
