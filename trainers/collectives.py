"""What the workers of a run tell each other besides gradients: sums of a few numbers, and small objects.

They go through a group of their own on gloo, so that no number has to visit a GPU, and waiting for it does not wait
for kernels. Objects travel pickled between the processes of one job, which trust each other; storage never holds any.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class Workers:
    """This worker's place in the group, and the collectives of the loop. Every worker calls each one equally often."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._group = dist.new_group(backend="gloo")

    @property
    def leads(self) -> bool:
        """Whether this is the worker that writes what a run has only one of."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the workers, in float64: exact for integers below 2**53."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._group)
        return tensor.tolist()

    def broadcast(self, value: Any) -> Any:
        """Worker 0's value, on every worker."""
        holder = [value]
        dist.broadcast_object_list(holder, src=0, group=self._group)
        return holder[0]

    def gather(self, value: Any) -> list[Any]:
        """All workers' values in the order of their ranks, on every worker."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values
