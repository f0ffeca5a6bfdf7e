"""Groups of near-duplicate texts, by MinHash (Broder 1997) and locality-sensitive hashing, from datasketch."""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from data.curation.folding import folded

VERSION = 2
"""What counts as a near-duplicate, for the name of what was made by it. 1 folded case and blanks alone and linked by
the estimated similarity."""
SHINGLE = 5
"""Characters of a shingle: a word in English, a phrase in Chinese."""
PERMUTATIONS = 128
RECALL = 0.98
"""Share of the pairs just at the similarity that are compared at all, at least; of those above it more. Measured at
0.7 on sample tasks in two languages: 180 of 181 pairs of true similarity 0.70 to 0.75, and all 532 above
(`benchmarks/near_duplicate_recall.py`)."""


def group_near_duplicates(texts: Sequence[str], similarity: float) -> np.ndarray:
    """Number the groups that near-duplicates link, int64 [n]; each group's number is its first text's index.

    Texts that are equal when `folded` are always of one group. Two texts are linked if the Jaccard similarity of
    their character 5-grams, when folded, is at least `similarity`; a group is whatever links connect, so its ends
    may be less alike. 1 groups equal texts alone.
    """
    first: dict[str, int] = {}
    group = np.array([first.setdefault(folded(text), index) for index, text in enumerate(texts)], np.int64)
    if similarity < 1 and len(first) > 1:
        index = list(first.values())
        parent = {one: one for one in index}
        shingles = [hashed_shingles(text) for text in first]
        for one, other in candidate_pairs(shingles, similarity):
            low, high = sorted((_root(parent, index[one]), _root(parent, index[other])))
            if low != high and jaccard(shingles[one], shingles[other]) >= similarity:
                parent[high] = low
        root = {one: _root(parent, one) for one in index}
        group = np.array([root[one] for one in group.tolist()], np.int64)
    return group


def candidate_pairs(shingles: Sequence[np.ndarray], similarity: float) -> Iterator[tuple[int, int]]:
    """Pairs that share a band of their MinHashes: nearly all at least so alike, and some less alike.

    A pair of similarity s is among them with probability 1 - (1 - s**rows)**bands (Leskovec et al. 2020, section
    3.4.2).
    """
    from datasketch import MinHash, MinHashLSH  # here: it brings scipy, half a second of a worker's start

    index = MinHashLSH(num_perm=PERMUTATIONS, params=bands_and_rows(similarity))
    sketches = MinHash.generator(shingles, num_perm=PERMUTATIONS, hashfunc=int, seed=1)
    for number, sketch in enumerate(sketches):
        for other in index.query(sketch):
            yield other, number
        index.insert(number, sketch, check_duplication=False)


def bands_and_rows(similarity: float) -> tuple[int, int]:
    """The fewest bands, of the most rows, that find `RECALL` of the pairs of that similarity."""
    splits = ((PERMUTATIONS // rows, rows) for rows in range(PERMUTATIONS // 2, 0, -1))
    return next((b, r) for b, r in splits if 1 - (1 - similarity**r) ** b >= RECALL)


def hashed_shingles(text: str) -> np.ndarray:
    """CRC-32 of each character 5-gram, uint32, ascending, each once; of a shorter text of the whole."""
    parts = {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}
    return np.unique(np.array([zlib.crc32(part.encode()) for part in parts], np.uint32))


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Share of what either has that both have."""
    both = np.intersect1d(one, other, assume_unique=True).size
    return both / (one.size + other.size - both)


def _root(parent: dict[int, int], index: int) -> int:
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return index
