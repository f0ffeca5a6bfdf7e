"""Loss on rows that are not trained on, computed by all workers together."""

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
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


def evaluate(
    engine: Engine,
    batches: Iterable[EvaluationBatch],
    workers: Workers,
    boundary_id: int,
    document_mask: bool,
) -> Evaluation:
    """Run the model over this worker's batches, of which every worker has equally many, and add up over the workers."""
    started = time.perf_counter()
    nats, tokens, num_bytes = torch.zeros((), device=engine.device), 0.0, 0.0
    with engine.evaluating() as model:
        for batch in batches:
            rows = torch.from_numpy(batch.tokens).to(engine.device)
            weights = torch.from_numpy(batch.weights).to(engine.device)
            nats += causal_lm(model, rows, weights, boundary_id, document_mask).total
            tokens += float(batch.weights.sum())
            num_bytes += batch.num_bytes
    total_nats, total_tokens, total_bytes = workers.sum([nats.item(), tokens, num_bytes])
    return evaluation_of(total_nats, round(total_tokens), total_bytes, time.perf_counter() - started)
