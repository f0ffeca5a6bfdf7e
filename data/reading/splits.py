"""Which split a document belongs to: a pure function of its names and the hash of its content.

Split by content, copies of a text always fall on the same side, whatever shard they come in and whenever it
is added.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import numpy as np


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How documents are dealt to train, validation and test, by fractions or by names."""

    validation: float = 0.005
    """Share of the documents, by hash of content, in 0 to 1; not used if validation is named below."""
    test: float = 0.005
    """Share of the documents, by hash of content, in 0 to 1; not used if test is named below."""
    validation_shards: tuple[str, ...] = ()
    """Patterns (`*`, `?`, `[abc]`) of raw shards' paths, relative to their source, that are validation."""
    test_shards: tuple[str, ...] = ()
    """Patterns of raw shards' paths that are test."""
    validation_documents: tuple[str, ...] = ()
    """Patterns of document ids that are validation, as `macbeth/*`."""
    test_documents: tuple[str, ...] = ()
    """Patterns of document ids that are test."""
    seed: int = 0
    """Another seed, another choice by content."""

    def problems(self, at: str) -> Iterator[str]:
        """Messages on values that cannot be met; `at` is the section's dotted name."""
        for key in ("validation", "test"):
            share = getattr(self, key)
            if not 0 <= share < 1:
                yield f"{at}.{key}={share} is not a share of the documents; give a number in 0 to 1, as 0.005"
        if self.validation + self.test >= 1:
            yield f"{at}.validation + {at}.test = {self.validation + self.test} leave nothing to train on"

    def is_empty(self, split: str) -> bool:
        """Whether no document can fall into `validation`, or `test`."""
        return not getattr(self, split) and not any(key.startswith(split) for key, _ in self.patterns())

    def patterns(self) -> tuple[tuple[str, str], ...]:
        """All patterns with the key that each stands under, as ("test_documents", "hamlet/*")."""
        keys = ("test_shards", "test_documents", "validation_shards", "validation_documents")
        return tuple((key, pattern) for key in keys for pattern in getattr(self, key))


def matching_pattern(config: SplitConfig, shard: str, document_id: str) -> tuple[str, str] | None:
    """The first of `config.patterns()` that names this document, by shard or id; None if none does."""
    for key, pattern in config.patterns():
        if fnmatchcase(shard if key.endswith("_shards") else document_id, pattern):
            return key, pattern
    return None


def split_of(config: SplitConfig, shard: str, document_id: str, content: bytes) -> str:
    """The split of one document.

    Args:
        shard: Path of its raw shard, relative to its source.
        document_id: Its id.
        content: `data.reading.clean.content_hash` of its normalised text.
    """
    named = matching_pattern(config, shard, document_id)
    if named is not None:
        return named[0].partition("_")[0]
    return split_by_content(config, content)


def split_by_content(config: SplitConfig, content: bytes) -> str:
    """The split that the fractions give, which a split named by patterns takes no part in."""
    point = keyed_points(int.from_bytes(content[:8], "little"), config.seed)
    test = 0.0 if config.test_shards or config.test_documents else config.test
    validation = 0.0 if config.validation_shards or config.validation_documents else config.validation
    if point < test:
        return "test"
    return "validation" if point < test + validation else "train"


Words = TypeVar("Words", int, np.ndarray)


def keyed_points(words: Words, key: int) -> Any:
    """Spread 64-bit words over [0, 1): the same word and key give the same point, another key an unrelated
    one.

    Args:
        words: One word of a content hash as an int, or of many as uint64 [n].

    Returns:
        float, or float64 [n]: multiples of 2**-53, as many bits as a float64 holds.
    """
    return (scrambled(words, key) >> 11) * 2.0**-53


def scrambled(words: Words, key: int) -> Words:
    """Permute 64-bit words: SplitMix64's output function (Steele, Lea, Flood 2014) on a stream chosen by `key`."""
    # An int is not cut to 64 bits by itself; one document at a time, numpy would take ten times as long as ints do.
    mask = 2**64 - 1
    with np.errstate(over="ignore"):
        mixed = (words + (key + 1) * 0x9E3779B97F4A7C15 % 2**64) & mask
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        return mixed ^ (mixed >> 31)


# Whose copy stays of a text that stands in several splits, as named shards and documents make possible: test
# before validation before train, so that what judges is never also trained on.
KEEPING_ORDER = ("test", "validation", "train")
