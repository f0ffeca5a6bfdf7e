"""Answer records without labels with a fine-tuned model, as a Ray Data job; goes on where it was interrupted.

python trainers/predict.py --model runs/NAME/seed-0/export --input s3://bucket/texts --output s3://bucket/answers
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster.config import ConfigError
from cluster.session import ClusterConfig, ray_session
from cluster.storage import open_store
from trainers.prediction import Piece, Predictor, pieces_of


class PieceAnswers:
    """What an actor of Ray Data runs."""

    def __init__(self, model_uri: str, output_uri: str, rows_per_batch: int, threads: int) -> None:
        self._predictor = Predictor(model_uri, output_uri, rows_per_batch, threads)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return self._predictor.answer(Piece(**row))


def predict(options: argparse.Namespace) -> dict[str, int]:
    """Answer every piece that has no answers yet; the numbers of records of this start, by how they ended."""
    # Workers have another working directory.
    model, output = open_store(options.model).uri, open_store(options.output)
    pieces = pieces_of(options.input)
    there = {info.path for info in output.list()}
    left = [piece for piece in pieces if piece.output not in there]
    print(f"{len(pieces):,} pieces, {len(pieces) - len(left):,} of them answered before")
    totals = {"answered": 0, "refused": 0}
    if not left:
        return totals
    cluster = ClusterConfig(
        address=options.address, num_workers=options.workers, cpus_per_worker=options.cpus_per_worker
    )
    with ray_session(cluster):
        import ray.data

        threads = max(1, round(options.cpus_per_worker))
        answers = ray.data.from_items([asdict(piece) for piece in left], override_num_blocks=len(left)).map(
            PieceAnswers,  # type: ignore[arg-type]
            fn_constructor_args=(model, output.uri, options.rows_per_batch, threads),
            compute=ray.data.ActorPoolStrategy(size=min(options.workers, len(left))),
            num_cpus=options.cpus_per_worker,
            num_gpus=options.gpus_per_worker or None,
        )
        started = time.monotonic()
        for done, row in enumerate(answers.iter_rows(), start=1):
            totals = {name: totals[name] + row[name] for name in totals}
            seconds = time.monotonic() - started
            left_seconds = seconds / done * (len(left) - done)
            print(
                f"{done:,} of {len(left):,} pieces, {totals['answered']:,} records, {totals['refused']:,} refused, "
                f"{totals['answered'] / seconds:,.0f} records/s, about {left_seconds:,.0f} s left"
            )
    return totals


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
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="models at a time (default 1)")
    parser.add_argument("--cpus-per-worker", type=float, default=1.0, metavar="N", help="default 1")
    parser.add_argument("--gpus-per-worker", type=float, default=0.0, metavar="N", help="default 0")
    parser.add_argument("--rows-per-batch", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument("--address", default="auto", help="as cluster.address of a run (default auto)")
    try:
        totals = predict(parser.parse_args(argv))
    except (ConfigError, FileNotFoundError) as error:
        raise SystemExit(f"predict: {error}") from error
    print(f"answered {totals['answered']:,} records, refused {totals['refused']:,}")


if __name__ == "__main__":
    main()
