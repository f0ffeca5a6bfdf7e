"""Score an exported model on a split of a prepared corpus: loss, perplexity, bits per byte.

    python trainers/evaluate.py --model runs/NAME/export --corpus corpora/prepared --split validation

In one process, on a GPU where there is one. The test split is refused: it judges a run once, at its end.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from cluster.storage import open_store
from data.evaluation_rows import evaluation_batches
from data.manifest import read_manifest
from data.tokens import fingerprint_of
from trainers.evaluation import Evaluation, evaluation_of, sums_over
from trainers.export import load_exported
from trainers.verdict import TestSplitError

SPLITS = ("train", "validation")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="URI", help="folder of an exported model")
    parser.add_argument("--corpus", required=True, metavar="URI", help="prepared corpus")
    parser.add_argument(
        "--manifest", default="latest", metavar="DIGEST", help="of the corpus (default: latest)"
    )
    parser.add_argument("--split", default="validation", help=f"{' or '.join(SPLITS)} (default: validation)")
    parser.add_argument(
        "--max-rows", type=int, default=0, metavar="N", help="rows at most; 0, the default: all"
    )
    parser.add_argument(
        "--seq-len", type=int, metavar="N", help="target tokens per row (default: the model's)"
    )
    parser.add_argument("--rows-per-batch", type=int, default=8, metavar="N", help="default: 8")
    options = parser.parse_args(argv)
    try:
        found = score(options)
    except (TestSplitError, ValueError, FileNotFoundError) as error:
        raise SystemExit(f"{Path(__file__).name}: {error}") from error
    print(json.dumps({"split": options.split, **found.as_json()}, indent=2))


def score(options: argparse.Namespace) -> Evaluation:
    """Evaluate what the options name.

    Raises:
        TestSplitError: for the test split.
        ValueError: an unknown split, or a model with another tokenizer than the corpus.
    """
    if options.split == "test":
        raise TestSplitError(
            "the test split judges a run once, at its end, into the run's test.json; "
            "compare models with --split validation"
        )
    if options.split not in SPLITS:
        raise ValueError(f"--split {options.split} is none of {', '.join(SPLITS)}")
    store = open_store(options.corpus)
    manifest = read_manifest(store, options.manifest)
    folder = open_store(options.model)
    exported, fingerprint = load_exported(folder), fingerprint_of(folder.read("tokenizer.json"))
    if fingerprint != manifest.tokenizer:
        raise ValueError(
            f"the model's tokenizer {fingerprint} is not the corpus's {manifest.tokenizer}; "
            f"prepare the corpus with corpus.tokenizer.path={options.model}/tokenizer.json"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = exported.model.to(device).eval()
    batches = evaluation_batches(
        manifest,
        store,
        options.split,
        seq_len=options.seq_len or model.config.max_positions,
        rows_per_batch=options.rows_per_batch,
        rank=0,
        world_size=1,
        max_rows=options.max_rows,
    )
    started = time.perf_counter()
    with torch.inference_mode():
        nats, tokens, num_bytes = sums_over(
            model, device, batches, manifest.boundary_id, model.config.document_mask
        )
    return evaluation_of(nats, round(tokens), num_bytes, time.perf_counter() - started)


if __name__ == "__main__":
    main()
