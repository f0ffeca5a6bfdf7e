"""Score an exported model on a split of a prepared corpus (loss, bits per byte), or ask it a task by prompt.

    python trainers/evaluate.py --model runs/NAME/export --corpus corpora/prepared --split validation
    python trainers/evaluate.py --model runs/NAME/export --task trainers/tasks/movies.yaml --shots 0 4

In one process, on a GPU where there is one. The test split is refused: it judges a run once, at its end.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from cluster.bounds import whole_number
from cluster.config import from_dict, run_entry
from cluster.hardware import device_here
from cluster.storage import Store, open_store
from data.evaluation_rows import evaluation_batches
from data.framing import framing_of
from data.manifest import Manifest, read_manifest
from data.tokenizer_file import parse_tokenizer
from data.tokens import fingerprint_of, fix_tokenizer, read_tokenizer
from data.words import WordKind
from trainers.diverged import DivergedModelError
from trainers.evaluation import Evaluation, evaluation_of, sums_over
from trainers.export import load_exported
from trainers.few_shot import FewShotConfig, evaluate_few_shot
from trainers.formats import pretraining_of, read_stored
from trainers.initial import grown
from trainers.metrics import finite
from trainers.objectives import ObjectiveConfig, objective_of
from trainers.task import load_task
from trainers.task_data import prepare_task
from trainers.verdict import TestSplitError

SPLITS = ("train", "validation")
LEAST = {"shots": 0, "max_rows": 0, "rows_per_batch": 1, "seq_len": 1}
"""Numbers of the command line, each with the least that it can be."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRECISION_HELP = (
    "of weights and activations on a corpus (default: fp32; a run measures in its engine.precision)"
)
WORDS_HELP = "what is hidden as a whole from an encoder (default: as in training)"


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


def number_problems(options: argparse.Namespace) -> list[str]:
    """What is wrong with the numbers that a command line gives; of those that it has."""
    problems = []
    for key, least in LEAST.items():
        given = getattr(options, key, None)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < least:
                problems.append(f"--{key.replace('_', '-')} {number} must be {least} or more")
    return problems


def ask(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Put a task to the model by prompt, with each number of solved records.

    Raises:
        TestSplitError: for the test split.
        ValueError: for the training split, which the solved records are from.
        ConfigError: a task, a model or a number of records that does not fit.
    """
    refuse_test_split(options.split)
    if options.split != "validation":
        raise ValueError(f"--split {options.split} is for --corpus: a task is asked on its validation split")
    prepared = prepare_task(load_task(options.task), open_store(options.prepared))
    exported = load_exported(open_store(options.model))
    exported.model.to(device_here())
    settings = {key: getattr(options, key) for key in ("seed", "max_rows", "rows_per_batch", "calibrate")}
    return [evaluate_few_shot(exported, prepared, FewShotConfig(shots=n, **settings)) for n in options.shots]


def refuse_test_split(split: str) -> None:
    if split == "test":
        raise TestSplitError(
            "the test split judges a run once, at its end, into the run's test.json; "
            "compare models with --split validation"
        )


def score(options: argparse.Namespace) -> Evaluation:
    """Evaluate what the options name.

    Raises:
        TestSplitError: for the test split.
        ValueError: an unknown split, a model with another tokenizer than the corpus, or one without positions for
            such rows.
        DivergedModelError: a loss that is not finite.
    """
    refuse_test_split(options.split)
    if options.split not in SPLITS:
        raise ValueError(f"--split {options.split} is none of {', '.join(SPLITS)}")
    store = open_store(options.corpus)
    manifest = read_manifest(store, options.manifest)
    if manifest.weakness:
        _tell_once(manifest.weakness)
    folder = open_store(options.model)
    if options.source not in (None, *manifest.sources):
        raise ValueError(f"--source {options.source} is none of {', '.join(manifest.sources)}")
    check_tokenizer(folder, store, manifest)
    device = device_here()
    stored = read_stored(folder)
    model = grown(stored, manifest.vocab_size).to(device, PRECISIONS[options.precision])
    room = model.config.max_positions
    seq_len = options.seq_len or room
    if seq_len > room and model.config.positions == "learned":
        raise ValueError(
            f"--seq-len {seq_len:,} is more than the {room:,} positions that the model has learned"
        )
    # Of an encoder only the hidden tokens: an export does not say which kind of pairs it was trained on.
    causal = model.config.attention == "causal"
    words = options.words or pretraining_of(stored.fields).get("words", "word")
    config = from_dict(ObjectiveConfig, {} if causal else {"kind": "masked", "words": words})
    objective = objective_of(
        config,
        read_tokenizer(store, manifest.tokenizer),
        boundary_id=manifest.boundary_id,
        document_mask=model.config.document_mask,
    )
    framing = framing_of(config.framing, store.uri, manifest, seq_len) if config.framing else None
    batches = evaluation_batches(
        manifest,
        store,
        options.split,
        seq_len=seq_len,
        rows_per_batch=options.rows_per_batch,
        rank=0,
        world_size=1,
        max_rows=options.max_rows,
        source=options.source,
        framing=framing,
    )
    started = time.perf_counter()
    with torch.inference_mode():
        sums, num_bytes = sums_over(model, device, batches, objective)
    found = evaluation_of(objective.terms, sums, num_bytes, time.perf_counter() - started)
    if not math.isfinite(found.loss):
        raise DivergedModelError(
            f"the loss of {folder.uri} on {options.split} is {found.loss}: the model has diverged; take another"
        )
    return found


@cache
def _tell_once(line: str) -> None:
    """Print a line beside the answer, however many models are compared in this process."""
    print(line, file=sys.stderr)


def check_tokenizer(folder: Store, corpus: Store, manifest: Manifest) -> None:
    """Raise ValueError where a model's tokenizer is not the one that the corpus was prepared with.

    One without the corpus's boundary of documents is the same, since preparing adds it.
    """
    prepared = parse_tokenizer(read_tokenizer(corpus, manifest.tokenizer), "the corpus's tokenizer.json")
    serialised = folder.read("tokenizer.json")
    boundary = prepared.id_to_token(manifest.boundary_id)
    assert boundary is not None, "preparing puts the boundary into the tokenizer"
    found = fix_tokenizer(serialised, f"{folder.uri}/tokenizer.json", boundary).fingerprint
    if manifest.tokenizer not in (found, fingerprint_of(serialised)):
        raise ValueError(
            f"the model's tokenizer {found} is not the corpus's {manifest.tokenizer}; "
            f"prepare the corpus with corpus.tokenizer.path={folder.uri}/tokenizer.json"
        )


if __name__ == "__main__":
    run_entry(main, ValueError)  # a split, source or model that does not fit
