"""Loss on rows that are not trained on, computed by all workers together.

Legend: K terms of the objective.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data.rows.evaluation_rows import EvaluationBatch
from trainers.engine.collectives import Workers
from trainers.engine.engine import Engine
from trainers.model.compiling import seconds_compiled
from trainers.objectives.causal import CAUSAL
from trainers.objectives.objective import Objective, Term


@dataclass(frozen=True)
class Evaluation:
    """The loss on a fixed set of rows, each without any context but its own."""

    loss: float
    """Nats per target, summed over the terms with their shares: what selection goes by."""
    tokens: int
    """Targets of the first term."""
    seconds: float
    compile_seconds: float | None = None
    """Of these seconds, those in which this worker compiled."""
    bits_per_byte: float | None = None
    """Bits of all tokens over the UTF-8 bytes of the text behind them; none where not every token is predicted
    from those before it: the loss of masked tokens says nothing about the length of a text's code."""
    perplexity: float | None = None
    """exp of the causal loss, per token: comparable only where the tokenizer is the same."""
    bytes: int | None = None
    measures: dict[str, float] = field(default_factory=dict)
    """Each term's loss and accuracy, as `masked_loss` and `masked_accuracy`."""

    def as_json(self) -> dict[str, Any]:
        """What is known, flat."""
        known = {
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "tokens": self.tokens,
            "bytes": self.bytes,
            **self.measures,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
        }
        return {key: value for key, value in known.items() if value is not None}


def evaluation_of(
    terms: Sequence[Term], sums_K3: NDArray[np.float64], num_bytes: float, seconds: float
) -> Evaluation:
    """The metrics that follow from sums of nats, targets and hits. A term without targets is left out; a loss
    beyond float64's exp has infinite perplexity.
    """
    found = {
        term.name: (nats, targets, hits)
        for term, (nats, targets, hits) in zip(terms, sums_K3.tolist(), strict=True)
        if targets
    }
    means = {name: nats / targets for name, (nats, targets, _) in found.items()}
    measures: dict[str, float] = {}
    for name, (_, targets, hits) in found.items():
        if len(terms) > 1 or not math.isnan(hits):
            measures[f"{name}_loss"] = means[name]
        if not math.isnan(hits):
            measures[f"{name}_accuracy"] = hits / targets
    loss = sum(term.share * means[term.name] for term in terms if term.name in means)
    evaluation = Evaluation(loss, round(sums_K3[0, 1]), seconds, measures=measures)
    if CAUSAL.name not in means:
        return evaluation
    nats, mean = found[CAUSAL.name][0], means[CAUSAL.name]
    return Evaluation(
        loss,
        evaluation.tokens,
        seconds,
        bits_per_byte=nats / math.log(2) / num_bytes,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        bytes=round(num_bytes),
        measures=measures,
    )


def sums_over(
    model: nn.Module, device: torch.device, batches: Iterable[EvaluationBatch], objective: Objective
) -> tuple[NDArray[np.float64], float]:
    """Run a model in evaluation mode over batches; returns the sums [K, 3] of nats, targets and hits, and the
    bytes of the text."""
    sums_K3, num_bytes = np.zeros((len(objective.terms), 3)), 0.0
    for batch in batches:
        sums_K3 += objective.measure(model, batch, device)
        num_bytes += batch.num_bytes
    return sums_K3, num_bytes


def evaluate(
    engine: Engine, batches: Iterable[EvaluationBatch], workers: Workers, objective: Objective
) -> Evaluation:
    """Evaluate a model under training on this worker's batches, of which every worker has equally many; the
    result is that of all workers' together.
    """
    started, compiled = time.perf_counter(), seconds_compiled()
    with engine.evaluating() as model:
        sums_K3, num_bytes = sums_over(model, engine.device, batches, objective)
    *sums, num_bytes = workers.sum([*sums_K3.flat, num_bytes])
    found = evaluation_of(
        objective.terms, np.reshape(sums, sums_K3.shape), num_bytes, time.perf_counter() - started
    )
    return replace(found, compile_seconds=seconds_compiled() - compiled)
