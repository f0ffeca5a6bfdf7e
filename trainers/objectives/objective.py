"""What an objective is to the loop: rows in, a loss of one or more terms out.

A term is a mean over its own targets of the *global* batch, so the number of all workers' targets must be known before
the backward pass. Where it follows from the batch's shape it is not asked for. With masks and pairs it depends on what
the rows hold; it is a function of the order then, too, but one that no worker can compute without reading the others'
rows, so each worker counts its own and they add up: one all-reduce of a few numbers a step.

Legend: B rows, T target tokens a row, K terms.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.order.epochs import Rows
from data.rows.masking import Masking

Inputs = dict[str, NDArray[Any]]
"""Arrays with one entry for each row, as a forward pass takes them."""


class RowBatch(Protocol):
    """One worker's rows: `data.rows.stream.StepRows` or `data.rows.evaluation_rows.EvaluationBatch`."""

    @property
    def tokens(self) -> NDArray[np.unsignedinteger]:
        """[B, T + 1], or [B, T] where framed."""

    @property
    def labels(self) -> NDArray[np.int8]:
        """[B]: of sentence pairs; -1: none."""

    @property
    def weights(self) -> NDArray[np.float32]:
        """[B], or [B, T] for each target: 0 for fillers and padding."""

    @property
    def rows(self) -> Rows:
        """[B]"""


@dataclass(frozen=True)
class Term:
    """A part of a loss."""

    name: str
    share: float = 1.0
    """What its mean is multiplied with."""


class StepLoss(NamedTuple):
    """Of one micro-batch."""

    total: Tensor
    """float32 scalar: its part of the global batch's loss. The gradient flows through this one."""
    sums_K: Tensor
    """float32, detached: each term's sum over its targets, in nats."""


@runtime_checkable
class Objective(Protocol):
    """What the loop, an evaluation and the report ask of an objective."""

    hides_tokens: ClassVar[bool]
    """Whether it is a `Masks`, which the report compares with what counting alone reaches."""

    @property
    def terms(self) -> tuple[Term, ...]:
        """Never empty."""

    def inputs(self, batch: RowBatch) -> Inputs:
        """What the model is given of these rows, and what its answers are compared with."""

    def targets(self, inputs: Inputs) -> list[float]:
        """Targets of these rows, by term."""

    def global_targets(self, rows_per_step: int, seq_len: int) -> list[float] | None:
        """Targets of all workers' rows, by term, where the batch's shape says how many there are."""

    def target_share(self, seq_len: int) -> float:
        """Share of the positions that the output head is computed for."""

    def loss(
        self, model: Callable[..., Any], inputs: Mapping[str, Tensor], counts: Sequence[float]
    ) -> StepLoss:
        """Run the model on a micro-batch. `counts`: targets of the global batch, by term."""

    def measure(self, model: Any, batch: RowBatch, device: torch.device) -> NDArray[np.float64]:
        """Run the model, without gradients, on rows that are not trained on.

        Returns:
            [K, 3]: nats, targets, and how many of them got the highest score (NaN: not looked at), by term.
        """


@runtime_checkable
class Masks(Objective, Protocol):
    """An objective that hides tokens."""

    @property
    def masking(self) -> Masking:
        """How."""

    def evaluation_inputs(self, batch: RowBatch) -> Inputs:
        """Masked rows that are not trained on, with `targets` and `weights` [B, P], and `labels` and `label_weights`
        [B] where there are pairs; the same ones for every seed."""


def on_device(inputs: Inputs, device: torch.device) -> dict[str, Tensor]:
    """The inputs as tensors."""
    return {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}


def micro_batches(inputs: Mapping[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    """Cut inputs into parts of so many rows."""
    parts = [tensor.split(rows) for tensor in inputs.values()]
    return [dict(zip(inputs, part, strict=True)) for part in zip(*parts, strict=True)]


def step_numbers(terms: Sequence[Term], sums: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
    """What a step's record says of the loss: `loss`, and each term's mean where there are several."""
    means = {
        term.name: total / count if count else 0.0
        for term, total, count in zip(terms, sums, counts, strict=True)
    }
    loss = sum(term.share * means[term.name] for term in terms)
    return {"loss": loss} | ({f"{name}_loss": mean for name, mean in means.items()} if len(means) > 1 else {})
