"""Ranges of parameters inside the float32 masters that an optimiser updates."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A range of one flattened parameter, inside a master tensor."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """First element, in the flattened parameter."""
    length: int
    offset: int
    """First element, in the flattened master."""

    def of(self, flat: Tensor) -> Tensor:
        """View this range of the master, or of a moment that lies like it."""
        return flat.view(-1).narrow(0, self.offset, self.length)


@dataclass(frozen=True)
class Master:
    """A float32 tensor that the optimiser updates on this worker, and what lies in it; the rest is
    padding."""

    tensor: Tensor
    pieces: tuple[Piece, ...]
