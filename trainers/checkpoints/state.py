"""What passes between engine and checkpoint: float32 ranges of flattened tensors, whatever the ZeRO stage.

A parameter's value and each of its optimiser moments is a tensor of the parameter's shape. Whoever holds a
part of it, holds a range of its row-major flattening; the ranges of all workers together cover every tensor
exactly once. A checkpoint in these terms has no world size and no stage in it, so it loads at any other.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

VALUE = "value"
"""Kind of the parameter itself; every other kind is a moment of the optimiser, by its name there."""


@dataclass(frozen=True)
class StateSlice:
    """Elements [start, start + len(data)) of one flattened tensor, as one worker holds them."""

    name: str
    """Name of the parameter, as in `model.named_parameters()`."""
    kind: str
    """`value`, or the moment's name in the optimiser's state."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """First element, in the row-major flattening of the whole."""
    data: torch.Tensor
    """1-D float32, on any device. The receiver must not keep it: it may be a view of live training state."""


class StateSource(Protocol):
    """Where an engine loads from: any range of any tensor, at the cost of that range alone."""

    @property
    def step(self) -> int:
        """Finished steps that the state stands after."""

    def kinds(self, name: str) -> tuple[str, ...]:
        """The kinds held for a parameter, `value` first. KeyError for an unknown parameter."""

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor: 1-D float32 on the CPU, owned by the caller."""
