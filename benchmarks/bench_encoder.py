"""An encoder's step in the engine against a bare loop of the same shape, on one thread.

    python benchmarks/bench_encoder.py [--turns 6] [--rows 32]

Model, precision, compilation and batch are those of sample-mlm.yaml, AdamW in both. The bare loop is a forward and
backward pass on inputs made once, and an optimiser over float32 masters. The engine's step also makes masks and pairs'
labels of its rows, and cuts them into micro-batches. They take turns; the times are the best of all, in seconds.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.bare import BareLoop
from benchmarks.bench_masking import CPU, PRESET, Framed
from cluster.configuration.config import load_config
from data.order.epochs import Rows
from data.rows.framing import Framing
from data.tokens.tokenizer import Encoder, TokenizerConfig, train_tokenizer
from trainers.engine.engine import Engine
from trainers.model.backbone import build
from trainers.objectives.kinds import objective_of
from trainers.objectives.objective import Objective, micro_batches, on_device
from trainers.pretraining.config import PretrainConfig


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--rows", type=int, default=32)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = "0"
    given = ["--config", str(PRESET), "--corpus.uri", "raw", "--corpus.prepared", "prepared"]
    config = load_config(PretrainConfig, given, description="").config
    config = replace(config, optimizer=replace(config.optimizer, kind="adamw"))
    objective, batch, entries = rows_of(config, arguments.rows)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", f"file://{folder}/init", rank=0, world_size=1)
        steps = (
            bare_step(config, objective, batch, entries),
            engine_step(config, objective, batch, entries),
        )
        for step in steps:  # compiles
            step()
            step()
        times: tuple[list[float], ...] = ([], [])
        for _ in range(arguments.turns):
            for step, found in zip(steps, times, strict=True):
                started = time.perf_counter()
                step()
                found.append(time.perf_counter() - started)
        dist.destroy_process_group()
    bare, engine = map(min, times)
    print("| rows | bare step, ms | engine's step, ms | ratio |\n|---|---|---|---|")
    print(f"| {arguments.rows} | {1e3 * bare:.0f} | {1e3 * engine:.0f} | {bare / engine:.2f} |", flush=True)


def rows_of(config: PretrainConfig, num_rows: int) -> tuple[Objective, Framed, int]:
    """Rows of pairs, what is asked of them, and the entries of their tokenizer."""
    texts, seq_len = sorted(topics.values()), config.batch.seq_len
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=config.corpus.tokenizer.vocab_size))
    serialised, boundary = tokenizer.json.encode(), tokenizer.boundary_id
    whole = np.concatenate(Encoder(tokenizer).encode(texts)).astype(np.uint16)
    number = np.arange(num_rows)
    rows = Rows(number * 0, number * 0, number * 0, number, number * seq_len)
    assert config.objective.framing, "the preset is one of an encoder"
    framing = Framing(config.objective.framing, serialised, boundary_id=boundary, seq_len=seq_len)
    batch = Framed(*framing.frame(whole, rows), np.ones(num_rows, np.float32), rows)
    objective = objective_of(config.objective, serialised, boundary_id=boundary, document_mask=False)
    return objective, batch, tokenizer.vocab_size


def bare_step(
    config: PretrainConfig, objective: Objective, batch: Framed, entries: int
) -> Callable[[], None]:
    model = build(replace(config.model, vocab_size=entries), seed=0, dtype=torch.bfloat16)
    loop = BareLoop(model, config.optimizer, config.engine.gradient_clip)
    arrays = objective.inputs(batch)
    counts = objective.targets(arrays)
    parts = micro_batches(on_device(arrays, CPU), config.engine.micro_batch_rows)
    return lambda: loop.step(lambda model: (objective.loss(model, part, counts).total for part in parts))


def engine_step(
    config: PretrainConfig, objective: Objective, batch: Framed, entries: int
) -> Callable[[], None]:
    model = build(replace(config.model, vocab_size=entries), seed=0)
    rows = config.engine.micro_batch_rows
    parts = -(-len(batch.tokens) // rows)
    engine = Engine(model, config.engine, config.optimizer, lambda step: 1.0, micro_batches=parts)

    def step() -> None:
        inputs = objective.inputs(batch)
        counts = objective.targets(inputs)
        for part in micro_batches(on_device(inputs, CPU), rows):
            engine.backward(objective.loss(engine, part, counts).total)
        engine.step()

    return step


if __name__ == "__main__":
    main()
