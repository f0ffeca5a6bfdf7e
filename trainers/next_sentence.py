"""How likely a text follows another, by an exported encoder with a pair head.

python trainers/next_sentence.py --model runs/NAME/export --first 猫在沙发上睡觉。 --second 它看起来很舒服。
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster.configuration.config import run_entry
from cluster.hardware.machine import device_here
from cluster.storage.uris import open_store
from trainers.exported.folder import load_exported
from trainers.exported.reading import Reader


def main(argv: Sequence[str] | None = None) -> None:
    """Print the probability of each second text to follow the first."""
    parser = argparse.ArgumentParser(description="Say how likely texts follow another.")
    parser.add_argument(
        "--model", required=True, metavar="URI", help="exported folder: a path, file://, s3://, gs://"
    )
    parser.add_argument("--first", required=True, help="the text that goes before")
    parser.add_argument("--second", required=True, action="append", help="a text that may follow; repeatable")
    options = parser.parse_args(argv)
    reader = Reader(load_exported(open_store(options.model)), device_here())
    found = reader.goes_on([(options.first, second) for second in options.second])
    for second, probability in zip(options.second, found, strict=True):
        print(f"{probability:.4f}  {options.first} {second}")


if __name__ == "__main__":
    run_entry(main, ValueError)  # a missing folder, a model without a pair head, a text too long
