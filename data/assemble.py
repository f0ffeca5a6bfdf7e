"""From finished pieces to the corpus: checks between the passes, the work that follows, the manifest."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np

from cluster.config import to_dict
from cluster.storage import Store, open_store
from data.corpus import CorpusConfig, CorpusError, RawShard, list_raw_shards
from data.dedup import DOCUMENTS_PER_RANGE, HashFile
from data.manifest import (
    FRAGMENT_DTYPES,
    SPLITS,
    Fragments,
    Manifest,
    ManifestError,
    Shard,
    read_manifest,
)
from data.pieces import (
    EMPTIED,
    HashGroup,
    HashRange,
    Piece,
    TokenWork,
    digest_of,
    hashes_path,
    record_path,
)
from data.tokens import FixedTokenizer, fix_tokenizer

# Records are a few KiB: at 10 to 30 ms a request, 10,000 pieces take some 15 s.
READING_THREADS = 16
# Of a range of hashes, read one by one; of more pieces the files are merged in groups of as many, or of as many
# documents as a range has.
FILES_PER_RANGE = 1_000


def read_records(store: Store, kind: str, digests: Sequence[str]) -> list[dict[str, Any]]:
    """Read the records of finished pieces, in the order of `digests`."""
    with ThreadPoolExecutor(READING_THREADS) as pool:
        return [
            json.loads(each) for each in pool.map(lambda name: store.read(record_path(kind, name)), digests)
        ]


def check_surveys(config: CorpusConfig, surveys: Sequence[Mapping[str, Any]]) -> None:
    """Stop before any text is tokenized if the corpus is not what the configuration expects.

    Raises:
        CorpusError: with one line for each: too many broken records, patterns that name no document, empty
            splits.
    """
    problems = [*_broken_records(config, surveys), *_empty_names(config, surveys)]
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
        f"{config.set_aside_limit}, as in {shard}: {common}. All of them: {config.prepared}/set_aside/"
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


def plan_groups(surveys: Sequence[Mapping[str, Any]], digests: Sequence[str]) -> list[HashGroup]:
    """Which pieces' hashes to merge first: those that fit into memory together; none where files are few."""
    if len(digests) <= FILES_PER_RANGE:
        return []
    bounds, documents = [0], 0
    for piece, survey in enumerate(surveys):
        documents += survey["documents"]
        if documents > DOCUMENTS_PER_RANGE or piece - bounds[-1] == FILES_PER_RANGE:
            bounds.append(piece)
            documents = survey["documents"]
    return [
        HashGroup(digest_of("merged", digests[first:end]), tuple(digests[first:end]), first)
        for first, end in pairwise([*bounds, len(digests)])
        if first < end
    ]


def plan_ranges(
    surveys: Sequence[Mapping[str, Any]], digests: Sequence[str], groups: Sequence[HashGroup] = ()
) -> list[HashRange]:
    """Into how many ranges the hashes are cut so that each fits into memory.

    Args:
        groups: Merged already; without any, each piece's own file is read.
    """
    documents = sum(survey["documents"] for survey in surveys)
    num_ranges = -(-documents // DOCUMENTS_PER_RANGE) or 1
    files = tuple(group.file for group in groups) or tuple(
        HashFile(hashes_path(digest), piece) for piece, digest in enumerate(digests)
    )
    return [
        HashRange(digest_of("duplicates", digests, num_ranges, index), files, index, num_ranges)
        for index in range(num_ranges)
    ]


def plan_tokens(
    pieces: Sequence[Piece],
    digests: Sequence[str],
    surveys: Sequence[Mapping[str, Any]],
    ranges: Sequence[HashRange],
    found: Sequence[Mapping[str, Any]],
    tokenizer: FixedTokenizer,
    fragment_tokens: int,
) -> list[TokenWork]:
    """The second half of the work on every piece, named by all that it depends on.

    Args:
        digests: Of the pieces' surveys, whose records are `surveys`.
        found: Records of `ranges`.
    """
    left_out = np.zeros(len(pieces), np.uint64)  # sums modulo 2**64: which documents of a piece are left out
    for record in found:
        np.add.at(left_out, np.array(record["piece"], np.int64), np.array(record["fingerprint"], np.uint64))
    paths = tuple(each.path for each in ranges)
    return [
        TokenWork(
            digest_of("tokens", digest, int(left_out[index]), tokenizer.fingerprint, fragment_tokens),
            piece,
            index,
            paths,
            survey["content"],
            tokenizer.fingerprint,
            fragment_tokens,
        )
        for index, (piece, digest, survey) in enumerate(zip(pieces, digests, surveys, strict=True))
    ]


def assemble(
    config: CorpusConfig,
    tokenizer: FixedTokenizer,
    pieces: Sequence[Piece],
    surveys: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[str, Any]],
    tokens: Sequence[Mapping[str, Any]],
) -> Manifest:
    """Join the records of all passes, in the corpus's order, into the manifest.

    Raises:
        CorpusError: the tokenizer's own normaliser empties more documents than may be set aside.
    """
    emptied = sum(record["set_aside"] for record in tokens)
    documents = sum(survey["documents"] for survey in surveys)
    if emptied > config.set_aside_limit * documents:
        raise CorpusError(
            f"{emptied:,} of {documents:,} documents are {EMPTIED}, more than corpus.set_aside_limit="
            f"{config.set_aside_limit}: give a tokenizer that keeps these characters. "
            f"All of them: {config.prepared}/set_aside/"
        )
    shards: list[Shard] = []
    columns: dict[str, list[np.ndarray]] = {name: [] for name in FRAGMENT_DTYPES}
    for record in tokens:
        for written in record["shards"]:
            fragments = written["fragments"] | {
                "shard": [len(shards)] * len(written["fragments"]["row_group"])
            }
            shards.append(Shard(**written["shard"]))
            for name, dtype in FRAGMENT_DTYPES.items():
                columns[name].append(np.array(fragments[name], dtype))
    sources = tuple(config.named_sources())
    duplicates = {split: dict.fromkeys(sources, 0) for split in SPLITS}
    for record in found:
        for piece, split, count in zip(record["piece"], record["split"], record["count"], strict=True):
            duplicates[SPLITS[split]][pieces[piece].source] += count
    set_aside = dict.fromkeys(sources, 0)
    for piece, survey, record in zip(pieces, surveys, tokens, strict=True):
        set_aside[piece.source] += survey["set_aside"] + record["set_aside"]
    return Manifest(
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        boundary_id=tokenizer.boundary_id,
        token_dtype=tokenizer.token_dtype,
        sources=sources,
        shards=tuple(shards),
        fragments=Fragments.from_columns({name: np.concatenate(parts) for name, parts in columns.items()}),
        duplicates=duplicates,
        set_aside=set_aside,
    )


def existing_manifest(config: CorpusConfig) -> Manifest | None:
    """The manifest of a finished preparation of exactly these raw shards with these settings; None if there
    is none.

    Lists the sources and reads one record and the manifest. Needs no Ray.

    Raises:
        CorpusError: as `list_raw_shards`.
    """
    return finished(config, list_raw_shards(config), given_tokenizer(config))


def finished(
    config: CorpusConfig, shards: Sequence[RawShard], given: FixedTokenizer | None
) -> Manifest | None:
    """As `existing_manifest`, for inputs that were already read."""
    store = open_store(config.prepared)
    try:
        record = json.loads(store.read(inputs_path(config, shards, given)))
        manifest = read_manifest(store, record["manifest"])
    except (FileNotFoundError, ManifestError):
        return None  # preparing again makes it anew, from pieces that are done
    return manifest if not missing_shards(store, manifest.shards) else None


def missing_shards(store: Store, shards: Sequence[Shard]) -> set[str]:
    """Paths of token shards that are not in the store with their size."""
    sizes = {each.path: each.num_bytes for each in store.list("shards/")}
    return {shard.path for shard in shards if sizes.get(shard.path) != shard.num_bytes}


def inputs_path(config: CorpusConfig, shards: Sequence[RawShard], given: FixedTokenizer | None) -> str:
    """Where the manifest made of these inputs is noted."""
    settings = to_dict(config)
    for without_effect in ("prepared", "cpus_per_piece"):
        del settings[without_effect]
    tokenizer = given.fingerprint if given else None
    return record_path(
        "inputs", digest_of("inputs", [asdict(shard) for shard in shards], settings, tokenizer)
    )


def given_tokenizer(config: CorpusConfig) -> FixedTokenizer | None:
    """The tokenizer that the configuration names, or None if one is to be trained.

    Raises:
        CorpusError: it cannot be found.
        TokenizerError: it cannot be read.
    """
    path = config.tokenizer.path
    if not path:
        return None
    folder, _, name = path.rpartition("/")
    try:
        serialised = open_store(folder or ".").read(name).decode()
    except (FileNotFoundError, UnicodeDecodeError) as absent:
        remedy = "give the URI of a tokenizer.json, or leave it empty to train one"
        raise CorpusError(f"corpus.tokenizer.path={path}: {absent}; {remedy}") from absent
    return fix_tokenizer(serialised, f"corpus.tokenizer.path={path}", config.tokenizer.boundary)
