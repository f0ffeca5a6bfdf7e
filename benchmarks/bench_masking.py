"""What masks and pairs cost beside the step that they are for, on one CPU thread.

    python benchmarks/bench_masking.py [--turns 5] [--rows 32]

The step is a compiled forward and backward pass in bf16 of the sample encoder on masked rows, without an optimiser.
Pairs are made by the readers, in another process than the step; masks are made on the worker, between two steps. The
parts take turns; the times are the best of all, in CPU seconds.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.configuration.config import load_config
from cluster.sessions.session import PROJECT
from data.order.epochs import Rows
from data.rows.framing import Framing
from data.tokens.tokenizer import Encoder, TokenizerConfig, train_tokenizer
from trainers.model.backbone import Backbone, build
from trainers.objectives.kinds import objective_of
from trainers.objectives.objective import Objective, on_device
from trainers.pretraining.config import PretrainConfig

PRESET = PROJECT / "trainers" / "configs" / "sample-mlm.yaml"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Framed:
    """Rows as the stream yields them."""

    tokens: NDArray[np.unsignedinteger]
    labels: NDArray[np.int8]
    weights: NDArray[np.float32]
    rows: Rows


def step(model: Backbone, objective: Objective, batch: Framed) -> None:
    inputs = objective.inputs(batch)
    objective.loss(model, on_device(inputs, CPU), objective.targets(inputs)).total.backward()
    model.zero_grad()


def seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    given = ["--config", str(PRESET), "--corpus.uri", "raw", "--corpus.prepared", "prepared"]
    config = load_config(PretrainConfig, given, description="").config
    texts, seq_len = sorted(topics.values()), config.batch.seq_len
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=config.corpus.tokenizer.vocab_size))
    whole = np.concatenate(Encoder(tokenizer).encode(texts)).astype(np.uint16)
    number = np.arange(arguments.rows)
    rows = Rows(number * 0, number * 0, number * 0, number, number * seq_len)
    print("| words | step, ms | pairs, ms | share | masks, ms | share |\n|---|---|---|---|---|---|")
    model = build(replace(config.model, vocab_size=tokenizer.vocab_size), seed=0, dtype=torch.bfloat16)
    model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
    for words in ("token", "word", "chinese"):
        settings = replace(config.objective, words=words)
        assert settings.framing, "the preset is one of an encoder"
        serialised, boundary = tokenizer.json.encode(), tokenizer.boundary_id
        framing = Framing(settings.framing, serialised, boundary_id=boundary, seq_len=seq_len)
        objective = objective_of(settings, serialised, boundary_id=boundary, document_mask=False)
        batch = Framed(*framing.frame(whole, rows), np.ones(arguments.rows, np.float32), rows)
        parts = (
            partial(step, model, objective, batch),
            partial(framing.frame, whole, rows),
            partial(objective.inputs, batch),
        )
        for part in parts:  # compiles, and fills caches
            part()
        times: tuple[list[float], ...] = ([], [], [])
        for _ in range(arguments.turns):
            for part, found in zip(parts, times, strict=True):
                found.append(seconds(part))
        whole_step, pairs, masks = map(min, times)
        shares = [f"{1e3 * part:.1f} | {part / whole_step:.2%}" for part in (pairs, masks)]
        print(f"| {words} | {1e3 * whole_step:.0f} | {shares[0]} | {shares[1]} |", flush=True)


if __name__ == "__main__":
    main()
