"""Answer records without labels with a fine-tuned model, as a Ray Data job; goes on where it was interrupted.

    python trainers/predict.py --model runs/NAME/seed-0/export --input s3://bucket/texts --output s3://bucket/answers

JSON lines and Parquet are read by many workers at a time, a CSV or a compressed file by one. A record that cannot be
answered has a line with its error. Answers of another model, or of inputs that have changed since, are refused, and so
is a folder that another such command is answering into.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])


from cluster.configuration.config import run_entry
from cluster.limits.bounds import finite_number, whole_number
from trainers.prediction.job import predict, told


def main(argv: Sequence[str] | None = None) -> None:
    """Answer records from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="URI", help="export/ of a fine-tuning run")
    parser.add_argument(
        "--input", required=True, metavar="URI", help="file or folder of JSONL, CSV or Parquet"
    )
    parser.add_argument("--output", required=True, metavar="URI", help="folder for the answers, as JSONL")
    parser.add_argument(
        "--workers", type=whole_number, default=1, metavar="N", help="models at a time (default 1)"
    )
    parser.add_argument("--cpus-per-worker", type=finite_number, default=1.0, metavar="N", help="default 1")
    parser.add_argument("--gpus-per-worker", type=finite_number, default=0.0, metavar="N", help="default 0")
    parser.add_argument("--rows-per-batch", type=whole_number, default=64, metavar="N", help="default 64")
    parser.add_argument(
        "--max-new-tokens",
        type=whole_number,
        default=64,
        metavar="N",
        help="of a generated answer (default 64)",
    )
    parser.add_argument("--address", default="auto", help="as cluster.address of a run (default auto)")
    print(told(predict(parser.parse_args(argv))))


if __name__ == "__main__":
    run_entry(main)
