"""Whether a surveyed corpus is what the configuration expects: asked once, before any text is tokenized."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.reading.raw_shards import CorpusConfig, CorpusError
from data.shards.manifest import SPLITS

# In an error: enough to see what they have in common.
SHARDS_NAMED = 3


def check_surveys(config: CorpusConfig, surveys: Sequence[Mapping[str, Any]]) -> None:
    """Stop before any text is tokenized if the corpus is not what the configuration expects.

    Raises:
        CorpusError: with one line for each: too many broken records, too many torn shards, patterns that name no
            document, empty splits.
    """
    problems = [
        *_broken_records(config, surveys),
        *_torn_shards(config, surveys),
        *_empty_names(config, surveys),
    ]
    if problems:
        raise CorpusError("\n".join(problems))


def _broken_records(config: CorpusConfig, surveys: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    set_aside = sum(survey["set_aside"] for survey in surveys)
    records = set_aside + sum(survey["documents"] for survey in surveys)
    if set_aside <= config.set_aside_limit * records:
        return
    reasons = Counter[str]()
    for survey in surveys:
        reasons.update(survey["reasons"])
    shard = next(survey["shards"][0] for survey in surveys if survey["set_aside"])
    common = "; ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(3))
    yield (
        f"{set_aside:,} of {records:,} records are broken, more than corpus.set_aside_limit="
        f"{config.set_aside_limit}, as in {shard}: {common}. Of each piece of work "
        f"the first 10,000 are in {config.prepared}/set_aside/"
    )


def _torn_shards(config: CorpusConfig, surveys: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A torn shard is one broken record, however much of the corpus is behind the tear: shards are counted too."""
    # Surveys of versions before this count do not name them.
    torn = [named for survey in surveys for named in survey.get("torn", {}).items()]
    shards = sum(len(survey["shards"]) for survey in surveys)
    if len(torn) <= config.set_aside_limit * shards:
        return
    named = "; ".join(f"{path}: {reason}" for path, reason in torn[:SHARDS_NAMED])
    yield (
        f"{len(torn):,} of {shards:,} raw shards are torn, more than corpus.set_aside_limit="
        f"{config.set_aside_limit}, and what is behind a tear is lost: {named}. Put them there whole, "
        "leave them out by corpus.include, or raise the limit"
    )


def _empty_names(config: CorpusConfig, surveys: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    named, bytes_of = Counter[str](), Counter[str]()
    for survey in surveys:
        named.update(survey["named"])
        bytes_of.update(survey["bytes"])
    for key, pattern in config.splits.patterns():
        if key.endswith("_documents") and not named[f"{key}={pattern}"]:
            yield f"corpus.splits.{key}: {pattern!r} names no document that an earlier pattern does not"
    documents = sum(survey["documents"] for survey in surveys)
    for split in SPLITS:
        share = 1 if split == "train" else getattr(config.splits, split)
        if (
            share
            and not bytes_of[split]
            and not any(key.startswith(split) for key, _ in config.splits.patterns())
        ):
            remedy = "name other ones" if split == "train" else "raise it, name some, or set it to 0"
            at = "corpus.splits" if split == "train" else f"corpus.splits.{split}={share}"
            yield f"{at}: none of {documents:,} documents is in {split}; {remedy}"
