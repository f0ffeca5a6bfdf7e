"""Vectors of texts, by an exported encoder, as JSON lines: {"text": …, "embedding": […]}.

python trainers/embed.py --model runs/NAME/export --text "a text" --text "another"
python trainers/embed.py --model s3://bucket/export --pooling cls < texts.txt > vectors.jsonl
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster.configuration.config import run_entry
from cluster.hardware.machine import device_here
from cluster.limits.bounds import whole_number
from cluster.storage.uris import open_store
from trainers.exported.folder import load_exported
from trainers.exported.reading import Reader


def main(argv: Sequence[str] | None = None) -> None:
    """Print a JSON line for each text, given or read from the standard input."""
    parser = argparse.ArgumentParser(description="Turn texts into vectors, printed as JSON lines.")
    parser.add_argument(
        "--model", required=True, metavar="URI", help="exported folder: a path, file://, s3://, gs://"
    )
    parser.add_argument(
        "--text", action="append", help="repeatable; without any, the lines of standard input"
    )
    parser.add_argument(
        "--pooling",
        choices=("mean", "cls"),
        default="mean",
        help="over a text's tokens, or its first position",
    )
    parser.add_argument(
        "--batch-size", type=whole_number, default=32, metavar="N", help="texts at a time (default 32)"
    )
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        parser.error(f"--batch-size {options.batch_size} must be at least 1")
    reader = Reader(load_exported(open_store(options.model)), device_here())
    texts = iter(options.text or lines())
    while batch := list(islice(texts, options.batch_size)):
        vectors = reader.embed(batch, options.pooling, batch_size=options.batch_size)
        for text, vector in zip(batch, vectors.tolist(), strict=True):
            print(json.dumps({"text": text, "embedding": vector}, ensure_ascii=False, allow_nan=False))


def lines() -> Iterator[str]:
    """Lines of the standard input that are not blank."""
    yield from filter(None, (line.strip() for line in sys.stdin))


if __name__ == "__main__":
    run_entry(main, ValueError)  # a missing folder, a model of another shape, a text too long
