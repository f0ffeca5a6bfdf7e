"""The autoregressive objective: predict each token from those before it.

Legend: B rows, T target tokens a row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainers.objectives.objective import Inputs, RowBatch, StepLoss, Term, on_device

CAUSAL = Term("causal")


@dataclass(frozen=True)
class Causal:
    """Predict each token from those before it."""

    hides_tokens: ClassVar[bool] = False

    boundary_id: int
    document_mask: bool
    terms: tuple[Term, ...] = (CAUSAL,)

    def inputs(self, batch: RowBatch) -> Inputs:
        # torch computes with few unsigned types
        return {"tokens": batch.tokens.astype(np.int64), "weights": batch.weights}

    def targets(self, inputs: Inputs) -> list[float]:
        per_weight = inputs["tokens"].shape[1] - 1 if inputs["weights"].ndim == 1 else 1
        return [float(inputs["weights"].sum()) * per_weight]

    def global_targets(self, rows_per_step: int, seq_len: int) -> list[float] | None:
        return [rows_per_step * seq_len]

    def target_share(self, seq_len: int) -> float:
        return 1.0

    def loss(
        self, model: Callable[..., Any], inputs: Mapping[str, Tensor], counts: Sequence[float]
    ) -> StepLoss:
        total = self._total(model, inputs)
        return StepLoss(total / counts[0], total.detach()[None])

    def measure(self, model: Any, batch: RowBatch, device: torch.device) -> NDArray[np.float64]:
        inputs = self.inputs(batch)
        nats = self._total(model, on_device(inputs, device)).item()
        return np.array([[nats, *self.targets(inputs), np.nan]])

    def _total(self, model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
        tokens, weights = inputs["tokens"], inputs["weights"]
        return causal_lm(model, tokens, weights, self.boundary_id, self.document_mask).total


class LossSum(NamedTuple):
    """Sums, not means: the caller divides by the target tokens of the global batch."""

    total: Tensor
    """float32 scalar, in nats; the gradient flows through this one."""
    num_targets: Tensor
    """float32 scalar: the sum of the targets' weights."""
    per_row_B: Tensor
    """float32, detached: the sum of each row in nats, so that a guard can name the documents of a bad step.
    """


def causal_lm(
    model: Callable[..., Any],
    rows_BT1: Tensor,
    weights: Tensor,
    boundary_id: int,
    document_mask: bool = False,
) -> LossSum:
    """Predict each token from those before it.

    `rows_BT1` holds T + 1 tokens a row (any integer type). `weights` is float32, of shape [B], or [B, T] for
    each target: 0 leaves out filler rows and padding. With `document_mask` no token attends to an earlier
    document; a document starts at each `boundary_id`.
    """
    rows_BT1 = rows_BT1.long()
    tokens_BT, targets_BT = rows_BT1[:, :-1], rows_BT1[:, 1:]
    weights_BT = (weights if weights.dim() == 2 else weights[:, None]).float().expand_as(targets_BT)
    segments_BT = document_segments(tokens_BT, boundary_id) if document_mask else None
    total, per_row_B = model(tokens_BT, segments_BT, targets_BP=targets_BT, weights_BP=weights_BT)
    return LossSum(total, weights_BT.sum(), per_row_B)


def document_segments(tokens_BT: Tensor, boundary_id: int) -> Tensor:
    """Number the documents of each row; a boundary token opens its document."""
    return (tokens_BT == boundary_id).cumsum(dim=1)
