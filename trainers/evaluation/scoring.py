"""An exported model scored on a split, or asked a task by prompts."""

import argparse
import math
import sys
import time
from functools import cache
from typing import Any

import torch

from cluster.configuration.config import from_dict
from cluster.hardware.machine import device_here
from cluster.storage.uris import Store, open_store
from data.rows.evaluation_rows import evaluation_batches
from data.rows.framing import framing_of
from data.shards.manifest import Manifest, read_manifest
from data.tokens.tokenizer import fingerprint_of, fix_tokenizer, read_tokenizer
from data.tokens.tokenizer_file import parse_tokenizer
from trainers.evaluation.loss import Evaluation, evaluation_of, sums_over
from trainers.evaluation.verdict import TestSplitError
from trainers.exported.folder import load_exported
from trainers.exported.formats import pretraining_of, read_stored
from trainers.exported.growing import grown
from trainers.model.diverged import DivergedModelError
from trainers.objectives.kinds import ObjectiveConfig, objective_of
from trainers.tasks.few_shot import FewShotConfig, evaluate_few_shot
from trainers.tasks.splits import prepare_task
from trainers.tasks.task import load_task

SPLITS = ("train", "validation")


LEAST = {"shots": 0, "max_rows": 0, "rows_per_batch": 1, "seq_len": 1}
"""Numbers of the command line, each with the least that it can be."""


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


PRECISION_HELP = (
    "of weights and activations on a corpus (default: fp32; a run measures in its engine.precision)"
)


WORDS_HELP = "what is hidden as a whole from an encoder (default: as in training)"


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
