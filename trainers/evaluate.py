"""Score an exported model on a split of a prepared corpus (loss, bits per byte), or ask it a task by prompt.

    python trainers/evaluate.py --model runs/NAME/export --corpus corpora/prepared --split validation
    python trainers/evaluate.py --model runs/NAME/export --task trainers/tasks/movies.yaml --shots 0 4

In one process, on a GPU where there is one. The test split is refused: it judges a run once, at its end.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])


from cluster.configuration.config import run_entry
from cluster.limits.bounds import whole_number
from data.tokens.words import WordKind
from trainers.evaluation.scoring import (
    PRECISION_HELP,
    PRECISIONS,
    SPLITS,
    WORDS_HELP,
    ask,
    number_problems,
    score,
)
from trainers.reporting.metrics import finite


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="URI", help="folder of an exported model")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--corpus", metavar="URI", help="prepared corpus")
    what.add_argument("--task", metavar="FILE", help="task file, asked by its prompt on its validation split")
    parser.add_argument(
        "--shots",
        type=whole_number,
        nargs="+",
        default=[0],
        metavar="N",
        help="of a task: solved records (default: 0)",
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="of a task with labels: choose by calibrated scores too"
    )
    parser.add_argument(
        "--seed", type=whole_number, default=0, help="of the choice of solved records (default: 0)"
    )
    parser.add_argument(
        "--prepared", default="corpora/tasks/prepared", metavar="URI", help="folder of split tasks"
    )
    parser.add_argument(
        "--manifest", default="latest", metavar="DIGEST", help="of the corpus (default: latest)"
    )
    parser.add_argument("--split", default="validation", help=f"{' or '.join(SPLITS)} (default: validation)")
    parser.add_argument("--source", metavar="NAME", help="of the corpus (default: all)")
    parser.add_argument(
        "--max-rows", type=whole_number, default=0, metavar="N", help="rows at most; 0, the default: all"
    )
    parser.add_argument(
        "--seq-len", type=whole_number, metavar="N", help="target tokens per row (default: the model's)"
    )
    parser.add_argument("--words", choices=get_args(WordKind), help=WORDS_HELP)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help=PRECISION_HELP)
    parser.add_argument("--rows-per-batch", type=whole_number, default=8, metavar="N", help="default: 8")
    options = parser.parse_args(argv)
    if problems := number_problems(options):
        parser.error("; ".join(problems))
    found = ask(options) if options.task else {"split": options.split, **score(options).as_json()}
    print(json.dumps(finite(found), indent=2, allow_nan=False))


if __name__ == "__main__":
    run_entry(main, ValueError)  # a split, source or model that does not fit
