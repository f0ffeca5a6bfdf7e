"""What may stand for each [MASK] of a text, by an exported encoder.

python trainers/fill_mask.py --model runs/NAME/export --text "今天天气真[MASK]，我们去公园吧。" --word 好
"""

import argparse
import sys
from collections.abc import Sequence
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
    """Print the likeliest tokens of each place, and the ranks of the words that were asked for."""
    parser = argparse.ArgumentParser(description="Say what may stand for each [MASK] of a text.")
    parser.add_argument(
        "--model", required=True, metavar="URI", help="exported folder: a path, file://, s3://, gs://"
    )
    parser.add_argument("--text", required=True, action="append", help="with one or more [MASK]; repeatable")
    parser.add_argument("--word", action="append", default=[], help="show this word's rank; repeatable")
    parser.add_argument(
        "--top", type=whole_number, default=5, metavar="N", help="likeliest tokens to show (default 5)"
    )
    options = parser.parse_args(argv)
    if options.top < 1:
        parser.error(f"--top {options.top} must be at least 1")
    reader = Reader(load_exported(open_store(options.model)), device_here())
    for text in options.text:
        print(text)
        for number, filled in enumerate(reader.fill(text, top=options.top, words=options.word), start=1):
            shown = "  ".join(f"{each.token} {each.probability:.4f}" for each in filled.candidates)
            print(f"  [MASK] {number}: {shown}")
            for word, place in filled.words.items():
                found = f"rank {place.rank:,}, probability {place.probability:.2g}" if place else "no token"
                print(f"    {word}: {found}")


if __name__ == "__main__":
    run_entry(main, ValueError)  # a missing folder, a model of another shape, a text without [MASK]
