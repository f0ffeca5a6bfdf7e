"""Prepare a corpus: raw shards in, token shards and a manifest out.

    python data/prepare.py --corpus.uri s3://bucket/raw --corpus.prepared s3://bucket/prepared

Four passes over pieces of work, each named by its input and done once:

1. survey: read every piece (some raw shards), write its documents' content hashes and splits, set broken
   records aside;
2. duplicates: sort the hashes of all pieces, one range at a time, and note which documents to leave out; of more
   than 1,000 pieces the hashes are merged in groups first;
3. tokenizer: the given one, or one trained on a bounded sample of the train split;
4. tokens: read every piece again, leave out what was noted, write token shards.

Memory of a task is bounded by a piece's hashes (17 bytes a document), a range of hashes, and a batch of texts;
that of this process by the surveys' records and the manifest, for all other records are added up as they are
read. After a kill, finished pieces are found by their records. When shards are added, all hashes are sorted
again, which takes seconds where tokenizing takes hours; an old piece is tokenized anew only if one of its
documents became, or stopped being, a duplicate. So a corpus that grew has the manifest of one prepared at
once, with one exception: a trained tokenizer stays as it was first trained.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster.configuration.config import load_config, run_entry
from cluster.console.errors import ConfigError
from cluster.console.terminal import Terminal
from cluster.hardware.machine import available_cores
from cluster.sessions.session import ray_session
from cluster.sessions.workers import ClusterConfig, piece_shortages
from cluster.storage.scratch import problem_writing_locally
from data.preparing.assemble import (
    existing_manifest,
)
from data.preparing.corpus import EXPECTED, corpus_table, describe, prepare, temporary_bytes
from data.preparing.progress import progress_line
from data.reading.documents import corpus_problems
from data.reading.raw_shards import (
    CorpusConfig,
)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Prepare a corpus for pretraining."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the tasks run."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """What is prepared, and how."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare the corpus that the command line describes; without work to do, show what there is."""
    flags = {"dry-run": "list the raw shards, read the first records, start nothing"}
    loaded = load_config(
        PrepareConfig, sys.argv[1:] if argv is None else argv, description=__doc__ or "", extra_flags=flags
    )
    config, console = loaded.config, Terminal()
    if problems := corpus_problems(config.corpus):
        raise ConfigError(problems)
    here = [{"CPU": available_cores()}] if config.cluster.is_local else []
    too_large = list(piece_shortages(config.corpus.cpus_per_piece, here)) if here else []
    if "dry-run" in loaded.flags:
        if problem := problem_writing_locally(temporary_bytes(config.corpus)):
            raise ConfigError([problem])
        lines = [*describe(config.corpus), *(f"not on this machine: {line}" for line in too_large)]
        return console.print(*lines, sep="\n")
    try:
        manifest = existing_manifest(config.corpus)
        if manifest is None or manifest.weakness:
            if too_large:
                raise ConfigError(too_large)
            with ray_session(config.cluster) as nodes, progress_line(console) as on_progress:
                if problems := list(piece_shortages(config.corpus.cpus_per_piece, nodes)):
                    raise ConfigError(problems)
                manifest = prepare(config.corpus, on_progress, renew=True)
    except EXPECTED as error:
        raise ConfigError(str(error).splitlines()) from error
    console.print(corpus_table(manifest))
    console.print(f"{config.corpus.prepared}: manifest {manifest.digest}")


if __name__ == "__main__":
    run_entry(main)
