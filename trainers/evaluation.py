"""Loss on rows that are not trained on, computed by all workers together."""

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from data.evaluation_rows import EvaluationBatch
from trainers.collectives import Workers
from trainers.engine import Engine
from trainers.objectives import causal_lm


@dataclass(frozen=True)
class Evaluation:
    """The loss on a fixed set of rows, each without any context but its own."""

    loss: float
    """Nats per target token."""
    bits_per_byte: float
    """Bits of all target tokens over the UTF-8 bytes of the text behind them."""
    perplexity: float
    """exp(loss), per token: comparable only where the tokenizer is the same."""
    tokens: int
    """Target tokens."""
    bytes: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluation_of(nats: float, tokens: int, num_bytes: float, seconds: float) -> Evaluation:
    """The metrics that follow from a sum of losses in nats. A loss beyond float64's exp has infinite perplexity."""
    loss = nats / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Evaluation(loss, nats / math.log(2) / num_bytes, perplexity, tokens, round(num_bytes), seconds)


def sums_over(
    model: nn.Module,
    device: torch.device,
    batches: Iterable[EvaluationBatch],
    boundary_id: int,
    document_mask: bool,
) -> list[float]:
    """Run a model in evaluation mode over batches; returns [nats, target tokens, bytes]."""
    nats, tokens, num_bytes = torch.zeros((), device=device), 0.0, 0.0
    for batch in batches:
        rows = torch.from_numpy(batch.tokens.astype(np.int64)).to(device)
        weights = torch.from_numpy(batch.weights).to(device)
        nats += causal_lm(model, rows, weights, boundary_id, document_mask).total
        tokens += float(batch.weights.sum())
        num_bytes += batch.num_bytes
    return [nats.item(), tokens, num_bytes]


def evaluate(
    engine: Engine,
    batches: Iterable[EvaluationBatch],
    workers: Workers,
    boundary_id: int,
    document_mask: bool,
) -> Evaluation:
    """Evaluate a model under training on this worker's batches, of which every worker has equally many; the
    result is that of all workers' together.
    """
    started = time.perf_counter()
    with engine.evaluating() as model:
        sums = sums_over(model, engine.device, batches, boundary_id, document_mask)
    nats, tokens, num_bytes = workers.sum(sums)
    return evaluation_of(nats, round(tokens), num_bytes, time.perf_counter() - started)
