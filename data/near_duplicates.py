"""Groups of near-duplicate texts, by MinHash (Broder 1997) and locality-sensitive hashing, from datasketch."""

import zlib
from collections.abc import Sequence

import numpy as np

SHINGLE = 5
"""Characters of a shingle: a word in English, a phrase in Chinese."""
PERMUTATIONS = 128
"""Standard error of an estimated similarity of 0.7: sqrt(0.7 * 0.3 / 128) = 0.04."""


def folded(text: str) -> str:
    """Lower case, with single blanks: what is compared."""
    return " ".join(text.lower().split())


def group_near_duplicates(texts: Sequence[str], similarity: float) -> np.ndarray:
    """Number the groups that near-duplicates link, int64 [n]; each group's number is its first text's index.

    Texts that are equal when `folded` are always of one group. Two texts are linked if the estimated Jaccard
    similarity of their character 5-grams is at least `similarity`; a group is whatever links connect, so its ends
    may be less alike. 1 groups equal texts alone.
    """
    first: dict[str, int] = {}
    group = np.array([first.setdefault(folded(text), index) for index, text in enumerate(texts)], np.int64)
    if similarity < 1 and len(first) > 1:
        parent = dict(zip(first.values(), first.values(), strict=True))
        for one, other in near_pairs(list(first), similarity):
            _join(parent, first[one], first[other])
        root = {index: _root(parent, index) for index in parent}
        group = np.array([root[index] for index in group.tolist()], np.int64)
    return group


def near_pairs(texts: Sequence[str], similarity: float) -> list[tuple[str, str]]:
    """Pairs of different texts at least so alike."""
    from datasketch import MinHash, MinHashLSH  # here: it brings scipy, half a second of a worker's start

    hashes = MinHash.bulk(
        [shingles(text) for text in texts], num_perm=PERMUTATIONS, hashfunc=zlib.crc32, seed=1
    )
    # Bands for few misses; what they find too much of is compared below.
    index = MinHashLSH(threshold=similarity, num_perm=PERMUTATIONS, weights=(0.05, 0.95))
    pairs = []
    for number, (text, sketch) in enumerate(zip(texts, hashes, strict=True)):
        for other in index.query(sketch):
            if sketch.jaccard(hashes[other]) >= similarity:
                pairs.append((texts[other], text))
        index.insert(number, sketch, check_duplication=False)
    return pairs


def shingles(text: str) -> list[bytes]:
    """The character 5-grams, each once; of a shorter text the whole."""
    return [
        part.encode()
        for part in sorted({text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))})
    ]


def _root(parent: dict[int, int], index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return index


def _join(parent: dict[int, int], one: int, other: int) -> None:
    low, high = sorted((_root(parent, one), _root(parent, other)))
    parent[high] = low
