"""What the workers of a run tell each other besides gradients: sums of a few numbers, and small objects.

They go through a group of their own on gloo, so that no number has to visit a GPU, and waiting for it does not wait
for kernels. Objects travel pickled between the processes of one job, which trust each other; storage never holds any.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


def limit_collectives(seconds: float) -> None:
    """How long a collective of any group that there is now may take; NCCL ends a process at its limit, without a word.

    torch's own (10 minutes for NCCL) lies below the time that one worker may take to save or validate while others
    wait: with a limit above the heartbeat's longest it is the heartbeat that ends a hung worker, after it wrote where
    it stood. torch (2.13) offers no public way to set it once a group is up.
    """
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


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

    def apart(self, value: float) -> list[float]:
        """A place for each worker, with this worker's value in its own: their sum keeps all values apart."""
        return [value if rank == self.rank else 0.0 for rank in range(self.world_size)]

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
