"""The passes over a corpus: survey, duplicates, tokenizer, tokens."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cluster.configuration.stored_file import MAX_BYTES, DamagedFileError
from cluster.console.interrupts import interruptible
from cluster.storage.uris import StorageError, Store, open_store
from data.curation.exact_duplicates import add_up
from data.finished_pieces.records import put_record, read_record, record_path
from data.preparing.assemble import (
    assemble,
    finished,
    given_tokenizer,
    inputs_path,
    plan_groups,
    plan_ranges,
    plan_tokens,
    read_records,
    shard_sizes,
    with_former_tokens,
)
from data.preparing.pieces import Piece, deduplicate, digest_of, merge, survey, tokenize
from data.preparing.progress import PassMeter, PassProgress
from data.preparing.survey_check import check_surveys
from data.preparing.tokenizer_sample import sample_texts
from data.reading.raw_shards import (
    BYTES_PER_TOKEN,
    CorpusConfig,
    CorpusError,
    fragment_tokens_for,
    group_shards,
    list_raw_shards,
)
from data.shards.manifest import Manifest, mark_latest, write_manifest
from data.shards.shards import SHARD_TOKENS
from data.tokens.tokenizer import FixedTokenizer, TokenizerError, load_tokenizer, train_tokenizer

# Ray Data puts all tasks of a pipeline into the object store before the first one runs.
TASKS_PER_PIPELINE = 8_000


# What a piece of work may find wrong with its input, told to the user as it is.
EXPECTED = (CorpusError, TokenizerError, StorageError)


# Of a vocabulary up to 65,536.
BYTES_PER_ID = 2


Work = TypeVar("Work")


OnProgress = Callable[[PassProgress], None]


FanOut = Callable[[Callable[[Work, CorpusConfig], None], Sequence[Work], CorpusConfig], Iterator[int]]


def ray_tasks(
    function: Callable[[Work, CorpusConfig], None], work: Sequence[Work], config: CorpusConfig
) -> Iterator[int]:
    """Call `function` on each piece of work in a Ray Data task of its own; yields indices as they are
    done."""
    import ray.data  # here, because the session sets variables that Ray reads when it is imported

    logging.getLogger("ray.data").setLevel(logging.WARNING)  # else some lines of plans for each pass
    for start in range(0, len(work), TASKS_PER_PIPELINE):
        part = work[start : start + TASKS_PER_PIPELINE]

        def run(row: dict[str, int], part: Sequence[Work] = part) -> dict[str, Any]:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per task: Ray counts the CPUs
            try:
                function(part[row["id"]], config)
            except EXPECTED as error:  # Ray Data's own wrapping loses the error's type and cause
                return row | {"error": type(error).__name__, "message": str(error)}
            return row | {"error": "", "message": ""}

        tasks = ray.data.range(len(part), override_num_blocks=len(part)).map(
            run, num_cpus=config.cpus_per_piece
        )
        for row in tasks.iter_rows():
            for kind in EXPECTED:
                if row["error"] == kind.__name__:
                    raise kind(row["message"])
            yield start + row["id"]


def prepare(
    config: CorpusConfig,
    on_progress: OnProgress = lambda _: None,
    fan_out: FanOut = ray_tasks,
    *,
    renew: bool = False,
) -> Manifest:
    """Prepare the corpus, as far as that is not done yet, and name its manifest the latest.

    Args:
        on_progress: Called in this process whenever a piece of work is done.
        fan_out: Calls a function on each piece of work and yields indices as they are done. `ray_tasks` needs
            a session.
        renew: Whether a finished corpus of before there were hashes gets a manifest with them. Runs and sweeps take it
            as it is: the manifest's name is part of what they are.

    Raises:
        CorpusError, TokenizerError: the input is not what the configuration says; what is done stays done.
        StorageError: a store failed for longer than its retries last.
    """
    shards, given = list_raw_shards(config), given_tokenizer(config)
    store = open_store(config.prepared)
    store.sweep()
    manifest = finished(config, shards, given)
    if manifest is not None and not (renew and manifest.weakness):
        mark_latest(store, manifest)
        return manifest
    pieces = [Piece(group) for group in group_shards(shards)]
    sizes = [piece.num_bytes for piece in pieces]
    digests = [piece.survey_digest(config) for piece in pieces]
    passes = _Passes(config, store, on_progress, fan_out)
    surveys = list(passes.run("survey", survey, pieces, digests, sizes))
    check_surveys(config, surveys)
    if groups := plan_groups(surveys, digests):
        passes.run("merged", merge, groups, [each.digest for each in groups], [1] * len(groups))
    ranges = plan_ranges(surveys, digests, groups)
    found = passes.run("duplicates", deduplicate, ranges, [each.digest for each in ranges], [1] * len(ranges))
    duplicates = add_up(found, len(pieces))
    tokenizer = _fix_tokenizer(config, store, given, pieces, surveys)
    fragment_tokens = fragment_tokens_for(config, shards)
    plan = plan_tokens(pieces, surveys, ranges, duplicates, tokenizer, fragment_tokens)
    plan = with_former_tokens(config, surveys, plan, duplicates, tokenizer)
    _forget_lost_shards(store, [each.digest for each in plan])
    tokens = passes.run("tokens", tokenize, plan, [each.digest for each in plan], sizes)
    manifest = assemble(config, tokenizer, pieces, surveys, duplicates, tokens)
    write_manifest(store, manifest)
    put_record(store, inputs_path(config, shards, given), {"manifest": manifest.digest})
    return manifest


def _fix_tokenizer(
    config: CorpusConfig,
    store: Store,
    given: FixedTokenizer | None,
    pieces: Sequence[Piece],
    surveys: Sequence[dict[str, Any]],
) -> FixedTokenizer:
    """The given tokenizer, or the one that was once trained with these settings, or one trained now."""
    if given is not None:
        store.put(given.path, given.json.encode())
        return given
    reading = (config.text_column, config.normalization, asdict(config.splits), list(config.named_sources()))
    trained = record_path("tokenizer", digest_of("tokenizer", asdict(config.tokenizer), reading))
    if store.exists(trained):
        remedy = 'write {"tokenizer": NAME} there, by the name of its folder in tokenizers/, or change corpus.prepared'
        fingerprint = read_record(store, trained, remedy)["tokenizer"]
        try:
            return load_tokenizer(store, fingerprint, config.tokenizer.boundary)
        except FileNotFoundError as gone:
            raise CorpusError(
                f"{gone}, but {trained} names it: put it back, or choose another corpus.prepared"
            ) from None
    train_bytes = [each["bytes"].get("train", 0) for each in surveys]
    texts = sample_texts(pieces, train_bytes, config)
    fixed = interruptible(partial(train_tokenizer, texts, config.tokenizer))
    store.put(fixed.path, fixed.json.encode())
    put_record(store, trained, {"tokenizer": fixed.fingerprint})
    return fixed


def _forget_lost_shards(store: Store, digests: Sequence[str]) -> None:
    """Delete records of pieces whose token shards were deleted or cut since: they are done again."""
    listed = {each.path for each in store.list("pieces/tokens-") if each.num_bytes <= MAX_BYTES}
    done = [digest for digest in digests if record_path("tokens", digest) in listed]
    sizes = shard_sizes(store)
    for digest, record in zip(done, read_records(store, "tokens", done), strict=True):
        if isinstance(record, DamagedFileError):
            continue  # its piece is done again once the record is taken
        shards = [written["shard"] for written in record["shards"]]
        if any(sizes.get(shard["path"]) != shard["num_bytes"] for shard in shards):
            store.delete(record_path("tokens", digest))


@dataclass(frozen=True)
class _Passes:
    """Deals pieces of work out, except those that have a record."""

    config: CorpusConfig
    store: Store
    on_progress: OnProgress
    fan_out: FanOut

    def run(
        self,
        kind: str,
        function: Callable[[Work, CorpusConfig], None],
        work: Sequence[Work],
        digests: Sequence[str],
        sizes: Sequence[int],
    ) -> Iterator[dict[str, Any]]:
        """Call `function`, which puts the record named by the digest, where it is not there. Then all records, each
        read when it is taken.
        """
        listed = {each.path for each in self.store.list(f"pieces/{kind}-") if each.num_bytes <= MAX_BYTES}
        todo = [index for index, digest in enumerate(digests) if record_path(kind, digest) not in listed]
        meter = PassMeter(
            kind, sum(sizes), sum(sizes) - sum(sizes[index] for index in todo), self.on_progress
        )
        for finished_one in self.fan_out(function, [work[index] for index in todo], self.config):
            meter.add(sizes[todo[finished_one]])
        return self._records(kind, function, work, digests)

    def _records(
        self,
        kind: str,
        function: Callable[[Work, CorpusConfig], None],
        work: Sequence[Work],
        digests: Sequence[str],
    ) -> Iterator[dict[str, Any]]:
        """All records; a piece whose record is damaged is done again."""
        for each, digest, record in zip(work, digests, read_records(self.store, kind, digests), strict=True):
            if isinstance(record, DamagedFileError):
                print(record, flush=True)
                deque(self.fan_out(function, [each], self.config), maxlen=0)
                record = read_record(self.store, record_path(kind, digest))
            yield record


def describe(config: CorpusConfig) -> list[str]:
    """What preparing would do, in lines: shards, bytes, pieces, fragment size. Lists the sources."""
    shards = list_raw_shards(config)
    lines = [
        f"{name}: {len(found):,} raw shards, {sum(shard.num_bytes for shard in found):,} bytes at {uri}"
        for name, uri in config.named_sources().items()
        for found in [[shard for shard in shards if shard.source == name]]
    ]
    fragment = fragment_tokens_for(config, shards)
    return [*lines, f"{len(group_shards(shards)):,} pieces of work; fragments of {fragment:,} tokens"]


def temporary_bytes(config: CorpusConfig) -> int:
    """About what a piece of work takes of its machine's disk: the token shards that it fills."""
    text = max(sum(shard.text_bytes for shard in group) for group in group_shards(list_raw_shards(config)))
    return min(text // BYTES_PER_TOKEN, SHARD_TOKENS) * BYTES_PER_ID


def corpus_table(manifest: Manifest) -> Table:
    """What a prepared corpus holds, per split and source."""
    title = f"corpus {manifest.digest}, tokenizer of {manifest.vocab_size:,} entries"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("split", "source"):
        table.add_column(name, no_wrap=True)
    for name in ("documents", "bytes", "tokens", "bytes\n/token", "dupli-\ncates", "set\naside"):
        table.add_column(name, justify="right", no_wrap=True)
    summary = manifest.summary()
    for split, of_source in summary["splits"].items():
        for source, counts in of_source.items():
            numbers = [f"{counts[name]:,}" for name in ("documents", "bytes", "tokens")]
            table.add_row(
                split, source, *numbers, f"{counts['bytes_per_token']:.3f}", f"{counts['duplicates']:,}", ""
            )
    table.add_section()
    for source, records in summary["set_aside"].items():
        table.add_row("none", source, "", "", "", "", "", f"{records:,}")
    return table
