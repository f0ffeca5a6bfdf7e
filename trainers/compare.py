"""Losses of several models on each source of a prepared corpus: what training on has learnt, and what it forgot.

python trainers/compare.py --model before=runs/old/export --model after=runs/new/export --corpus corpora/prepared
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.table import Table

from cluster.configuration.config import run_entry
from cluster.console.terminal import Terminal
from cluster.limits.bounds import whole_number
from cluster.storage.uris import open_store
from data.shards.manifest import read_manifest
from data.tokens.words import WordKind
from trainers.evaluation.loss import Evaluation
from trainers.evaluation.scoring import WORDS_HELP, number_problems, score


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of the models that the command line names."""
    parser = argparse.ArgumentParser(description="Compare models on each source of a prepared corpus.")
    parser.add_argument(
        "--model", required=True, action="append", metavar="NAME=URI", help="folder of a model; repeatable"
    )
    parser.add_argument("--corpus", required=True, metavar="URI", help="prepared corpus")
    parser.add_argument(
        "--manifest", default="latest", metavar="DIGEST", help="of the corpus (default: latest)"
    )
    parser.add_argument("--split", default="validation", help="train or validation (default: validation)")
    parser.add_argument(
        "--max-rows", type=whole_number, default=0, metavar="N", help="rows of a source at most; 0: all"
    )
    parser.add_argument(
        "--seq-len", type=whole_number, metavar="N", help="target tokens per row (default: the model's)"
    )
    parser.add_argument("--words", choices=get_args(WordKind), help=WORDS_HELP)
    parser.add_argument("--rows-per-batch", type=whole_number, default=8, metavar="N", help="default: 8")
    options = parser.parse_args(argv)
    if problems := number_problems(options):
        parser.error("; ".join(problems))
    if unnamed := [each for each in options.model if "=" not in each]:
        parser.error(f"--model {unnamed[0]} has no name; write NAME=URI, as before={unnamed[0]}")
    models = dict(each.split("=", 1) for each in options.model)
    Terminal(soft_wrap=True).print(table(losses(models, options)))


def losses(models: Mapping[str, str], options: argparse.Namespace) -> dict[str, dict[str, Evaluation]]:
    """Evaluations by source and name of the model; raises as `trainers.evaluation.scoring.score`."""
    sources = read_manifest(open_store(options.corpus), options.manifest).sources
    return {
        source: {
            name: score(
                argparse.Namespace(**vars(options) | {"model": uri, "source": source, "precision": "fp32"})
            )
            for name, uri in models.items()
        }
        for source in sources
    }


def table(found: Mapping[str, Mapping[str, Evaluation]]) -> Table:
    """A row per source; of every model after the first the change from it too."""
    names = list(next(iter(found.values())))
    shown = Table("source", *(f"{name}, nats per target" for name in names))
    for source, by_name in found.items():
        first = by_name[names[0]].loss
        changes = [f"{by_name[name].loss:.3f} ({by_name[name].loss - first:+.3f})" for name in names[1:]]
        shown.add_row(source, f"{first:.3f}", *changes)
    return shown


if __name__ == "__main__":
    run_entry(main, ValueError)  # a missing folder, a model of another shape or tokenizer
