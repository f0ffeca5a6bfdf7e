"""From finished pieces to the corpus: the work that follows from them, and the manifest."""

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.configuration.config import to_dict
from cluster.configuration.stored_file import DamagedFileError
from cluster.storage.store import former_version
from cluster.storage.uris import Store, open_parent, open_store
from data.curation.exact_duplicates import DOCUMENTS_PER_RANGE, Duplicates, HashFile
from data.finished_pieces.records import read_record, record_path
from data.preparing.pieces import EMPTIED, HashGroup, HashRange, Piece, TokenWork, digest_of, hashes_path
from data.reading.raw_shards import CorpusConfig, CorpusError, RawShard, list_raw_shards
from data.shards.manifest import SPLITS, Manifest, ManifestError, read_manifest
from data.shards.manifest_table import FRAGMENT_DTYPES, HASH_DTYPE, LISTED, Fragments, Shard
from data.tokens.tokenizer import FixedTokenizer, fix_tokenizer

# Records are a few KiB: at 10 to 30 ms a request, 10,000 pieces take some 15 s.
READING_THREADS = 16
# Parts of a file's version: modified, size, changed.
FILE_TIMES = 3
# Of a range of hashes, read one by one; of more pieces the files are merged in groups of as many, or of as many
# documents as a range has.
FILES_PER_RANGE = 1_000


def read_records(
    store: Store, kind: str, digests: Iterable[str]
) -> Iterator[dict[str, Any] | DamagedFileError]:
    """Read the records of finished pieces, in the order of `digests`, or why one is none; no more than the threads hold
    are in memory. Their sizes were listed: asking for each would take twice as long."""

    def read(digest: str) -> dict[str, Any] | DamagedFileError:
        try:
            return read_record(store, record_path(kind, digest), is_bounded=True)
        except DamagedFileError as damaged:
            return damaged

    with ThreadPoolExecutor(READING_THREADS) as pool:
        reading = deque[Future[dict[str, Any] | DamagedFileError]]()
        for digest in digests:
            reading.append(pool.submit(read, digest))
            if len(reading) == READING_THREADS:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()


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
        HashGroup(digest_of("merged", _pinned(surveys[first:end])), tuple(digests[first:end]), first)
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
    pinned = _pinned(surveys)
    return [
        HashRange(digest_of("duplicates", pinned, num_ranges, index), files, index, num_ranges)
        for index in range(num_ranges)
    ]


def _pinned(surveys: Sequence[Mapping[str, Any]]) -> list[str]:
    return [survey["pinned"] for survey in surveys]


def plan_tokens(
    pieces: Sequence[Piece],
    surveys: Sequence[Mapping[str, Any]],
    ranges: Sequence[HashRange],
    duplicates: Duplicates,
    tokenizer: FixedTokenizer,
    fragment_tokens: int,
) -> list[TokenWork]:
    """The second half of the work on every piece, named by all that it depends on: not by versions of files, so a
    corpus that was copied or checked out anew is hashed again and not tokenized again.

    Args:
        duplicates: Added up over `ranges`.
    """
    left_out, paths = duplicates.fingerprint.tolist(), tuple(each.path for each in ranges)
    return [
        TokenWork(
            digest_of(
                "hashed tokens",
                piece.source,
                survey["shards"],
                survey["pinned"],
                *_encoding(left_out[index], tokenizer, fragment_tokens),
            ),
            piece,
            index,
            paths,
            survey["pinned"],
            tokenizer.fingerprint,
            fragment_tokens,
        )
        for index, (piece, survey) in enumerate(zip(pieces, surveys, strict=True))
    ]


def _encoding(left_out: int, tokenizer: FixedTokenizer, fragment_tokens: int) -> tuple[int, str, int, int]:
    # One tokenizer may offer several tokens as the boundary, and its fingerprint does not say which was taken.
    return left_out, tokenizer.fingerprint, tokenizer.boundary_id, fragment_tokens


def with_former_tokens(
    config: CorpusConfig,
    surveys: Sequence[Mapping[str, Any]],
    plan: Sequence[TokenWork],
    duplicates: Duplicates,
    tokenizer: FixedTokenizer,
) -> list[TokenWork]:
    """The plan, with the records of pieces that were tokenized when they were still named by their survey's name and
    shards had no hashes, where the texts are the same: such a corpus is hashed and not tokenized again.
    """
    store = open_store(config.prepared)
    listed = {each.path for each in store.list("pieces/")}
    left_out = duplicates.fingerprint.tolist()

    def with_former(work: TokenWork, survey: Mapping[str, Any]) -> TokenWork:
        former = work.piece.former_survey_digest(config)
        encoding = _encoding(left_out[work.index], tokenizer, work.fragment_tokens)
        surveyed = record_path("survey", former)
        tokens = record_path("tokens", digest_of("tokens", former, *encoding))
        if {surveyed, tokens} <= listed:
            with suppress(DamagedFileError):  # then it is tokenized as if there were none
                if read_record(store, surveyed, kind="former survey").get("content") == survey["content"]:
                    return replace(work, former=tokens)
        return work

    with ThreadPoolExecutor(READING_THREADS) as pool:
        return list(pool.map(with_former, plan, surveys))


def assemble(
    config: CorpusConfig,
    tokenizer: FixedTokenizer,
    pieces: Sequence[Piece],
    surveys: Sequence[Mapping[str, Any]],
    duplicates: Duplicates,
    tokens: Iterable[Mapping[str, Any]],
) -> Manifest:
    """Join what the passes found, in the corpus's order, into the manifest.

    Args:
        tokens: Records of the last pass, taken one at a time.

    Raises:
        CorpusError: the tokenizer's own normaliser empties more documents than may be set aside.
    """
    shards, fragments, emptied = _join_shards(tokens)
    documents = sum(survey["documents"] for survey in surveys)
    if emptied.sum() > config.set_aside_limit * documents:
        raise CorpusError(
            f"{emptied.sum():,} of {documents:,} documents are {EMPTIED}, more than corpus.set_aside_limit="
            f"{config.set_aside_limit}: give a tokenizer that keeps these characters. "
            f"All of them: {config.prepared}/set_aside/"
        )
    sources = tuple(config.named_sources())
    left_out = {split: dict.fromkeys(sources, 0) for split in SPLITS}
    set_aside = dict.fromkeys(sources, 0)
    for index, (piece, survey) in enumerate(zip(pieces, surveys, strict=True)):
        set_aside[piece.source] += survey["set_aside"] + int(emptied[index])
        for split, count in zip(SPLITS, duplicates.count[index].tolist(), strict=True):
            left_out[split][piece.source] += count
    return Manifest(
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        boundary_id=tokenizer.boundary_id,
        token_dtype=tokenizer.token_dtype,
        sources=sources,
        shards=shards,
        fragments=fragments,
        duplicates=left_out,
        set_aside=set_aside,
    )


def _join_shards(
    tokens: Iterable[Mapping[str, Any]],
) -> tuple[tuple[Shard, ...], Fragments, NDArray[np.int64]]:
    """All shards, their fragments, and [pieces]: the documents that each piece set aside."""
    shards, columns = list[Shard](), {name: array("q") for name in FRAGMENT_DTYPES}
    set_aside, hashes = array("q"), bytearray()
    for record in tokens:
        set_aside.append(record["set_aside"])
        for written in record["shards"]:
            for name in LISTED:
                columns[name].extend(written["fragments"][name])
            hashes += bytes.fromhex("".join(written["fragments"]["blake2b"]))
            columns["shard"].extend([len(shards)] * len(written["fragments"]["row_group"]))
            shards.append(Shard(**written["shard"]))
    fragments = Fragments.from_columns({**columns, "blake2b": np.frombuffer(hashes, HASH_DTYPE)})
    return tuple(shards), fragments, np.array(set_aside, np.int64)


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
    noted = inputs_path(config, shards, given)
    if not store.exists(noted):
        noted = _former_inputs_path(store, config, shards, given) or noted
    try:
        manifest = read_manifest(store, read_record(store, noted)["manifest"])
    except (FileNotFoundError, ManifestError):
        return None  # preparing again makes it anew, from pieces that are done
    except DamagedFileError as damaged:
        print(damaged)
        return None
    sizes = shard_sizes(store)
    whole = all(sizes.get(shard.path) == shard.num_bytes for shard in manifest.shards)
    return manifest if whole else None


def _former_inputs_path(
    store: Store, config: CorpusConfig, shards: Sequence[RawShard], given: FixedTokenizer | None
) -> str | None:
    """As `inputs_path` was before a file's version had its change time, if no file was changed since that was noted."""
    former = [replace(shard, version=former_version(shard.version)) for shard in shards]
    path = inputs_path(config, former, given)
    written = [info.version for info in store.list(path)]
    files = [version.split("-") for version in (*written, *(shard.version for shard in shards))]
    if not written or any(len(times) != FILE_TIMES for times in files):
        return None  # in a bucket nothing is named otherwise
    noted_at = int(files[0][0])
    return path if all(int(changed) < noted_at for _, _, changed in files[1:]) else None


def shard_sizes(store: Store) -> dict[str, int]:
    """Bytes of the token shards that are in the store, by path."""
    return {each.path: each.num_bytes for each in store.list("shards/")}


def inputs_path(config: CorpusConfig, shards: Sequence[RawShard], given: FixedTokenizer | None) -> str:
    """Where the manifest made of these inputs is noted."""
    settings = to_dict(config)
    # On what is prepared: a bound on unpacking refuses a shard, or does nothing.
    for without_effect in ("prepared", "cpus_per_piece", "max_expansion"):
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
    try:
        folder, name = open_parent(path)
        serialised = folder.read(name)
    except FileNotFoundError as absent:
        remedy = "give the URI of a tokenizer.json, or leave it empty to train one"
        raise CorpusError(f"corpus.tokenizer.path={path}: {absent}; {remedy}") from absent
    return fix_tokenizer(serialised, f"corpus.tokenizer.path={path}", config.tokenizer.boundary)
