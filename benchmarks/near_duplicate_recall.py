"""Which share of near-duplicates is found, by their true Jaccard similarity, and what finding takes.

python data/sample_tasks.py --output corpora/task-texts movies topics poems
python benchmarks/near_duplicate_recall.py corpora/task-texts

The texts are those of the folder and copies of each second one with some characters changed. All their pairs are
compared as sets of 5-grams, by a product of sparse matrices, which knows nothing of MinHash.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.sparse as sp

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.curation.folding import folded
from data.curation.near_duplicates import (
    SHINGLE,
    bands_and_rows,
    candidate_pairs,
    group_near_duplicates,
    hashed_shingles,
    jaccard,
)
from data.reading.documents import raw_texts

BAND = 0.05


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", nargs="+", help="folder of texts as raw shards")
    parser.add_argument("--texts", type=int, default=6_000, help="texts drawn from each, before copies")
    parser.add_argument("--similarity", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    options = parser.parse_args(argv)
    for uri in options.corpus:
        drawn = list(raw_texts(uri))
        random.Random(0).shuffle(drawn)
        texts = with_copies(drawn[: options.texts])
        distinct = list(dict.fromkeys(map(folded, texts)))
        true = true_pairs(distinct, min(options.similarity) - 2 * BAND)
        for similarity in options.similarity:
            start = time.process_time()
            group_near_duplicates(texts, similarity)
            seconds = time.process_time() - start
            print(f"{uri}: {len(texts):,} texts, similarity {similarity}, grouped in {seconds:.1f} s of CPU")
            for low, pairs, found, expected in recall(distinct, true, similarity):
                print(
                    f"  {low:.2f} to {low + BAND:.2f}: {found:,} of {pairs:,} found, {expected:.1f} expected"
                )


def with_copies(texts: Sequence[str]) -> list[str]:
    """The texts, and of each second one a copy in which up to a tenth of the characters are others of its own."""
    draw = random.Random(0)
    copies = []
    for text in texts[::2]:
        characters = list(text)
        for _ in range(draw.randint(1, len(text) // 10 + 1)):
            characters[draw.randrange(len(text))] = draw.choice(text)
        copies.append("".join(characters))
    return [*texts, *copies]


def true_pairs(texts: Sequence[str], lowest: float) -> dict[tuple[int, int], float]:
    """Jaccard similarity of the sets of 5-grams of all pairs that have at least `lowest`."""
    column: dict[str, int] = {}
    sets = [{text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))} for text in texts]
    columns = [column.setdefault(part, len(column)) for parts in sets for part in parts]
    size = np.array([len(parts) for parts in sets])
    ends = np.concatenate([[0], np.cumsum(size)])
    matrix = sp.csr_matrix((np.ones(len(columns), np.int32), columns, ends), (len(texts), len(column)))
    pairs: dict[tuple[int, int], float] = {}
    for first in range(0, len(texts), 500):
        both = (matrix[first : first + 500] @ matrix.T).tocoo()
        one, other = both.row + first, both.col
        alike = both.data / (size[one] + size[other] - both.data)
        kept = (other > one) & (alike >= lowest)
        keys = zip(one[kept].tolist(), other[kept].tolist(), strict=True)
        pairs |= dict(zip(keys, alike[kept].tolist(), strict=True))
    return pairs


def recall(
    texts: Sequence[str], true: dict[tuple[int, int], float], similarity: float
) -> list[tuple[float, int, int, float]]:
    """For each band of true similarity from below the threshold on: pairs, how many are candidates, and how many the
    curve of the bands expects. A candidate at or above the threshold is a link, if `jaccard` is right of it."""
    shingles = [hashed_shingles(text) for text in texts]
    found = set(candidate_pairs(shingles, similarity))
    for one, other in found & true.keys():
        if jaccard(shingles[one], shingles[other]) != true[one, other]:
            raise RuntimeError(f"the similarity of {texts[one]!r} and {texts[other]!r} is wrong")
    bands, rows = bands_and_rows(similarity)
    counted = []
    for low in np.arange(similarity - 2 * BAND, 1, BAND).round(2).tolist():
        pairs = {pair: s for pair, s in true.items() if low <= s < low + BAND}
        expected = sum(1 - (1 - s**rows) ** bands for s in pairs.values())
        counted.append((low, len(pairs), len(found & pairs.keys()), expected))
    return counted


if __name__ == "__main__":
    main()
