"""A process on each node that answers the preflight: its facts, its clock, and how fast it reaches the others.

No Ray here: cluster/nodes/nodes.py makes an actor of it.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from cluster.nodes.facts import NodeFacts, gather
from cluster.storage.scratch import scratch_folder

FLOAT32 = 4


class Witness:
    """Stands on one node. With `on_gpu` it speaks NCCL from the first GPU of the node, else gloo."""

    def __init__(self, on_gpu: bool) -> None:
        # It holds no GPU, so that it stands beside a run that holds them all, and Ray hides them from it then.
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            del os.environ["CUDA_VISIBLE_DEVICES"]
        self._device = "cuda" if on_gpu else "cpu"
        self._scratch = contextlib.ExitStack()  # swept by a later process: this one is ended from outside
        self._log = self._scratch.enter_context(scratch_folder()) / "nccl.log"
        os.environ.update(
            {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": str(self._log)}
        )

    def gather(self, *arguments: Any) -> NodeFacts:
        """See `node_facts.gather`."""
        return gather(*arguments)

    def now(self) -> float:
        return time.time()

    def free_port(self) -> int:
        """A port of this node that nobody listens on."""
        with socket.socket() as free:
            free.bind(("", 0))
            port: int = free.getsockname()[1]
            return port

    def exchange(self, host: str, port: int, rank: int, num_bytes: int, within: float) -> float:
        """Seconds for `num_bytes` to another node, and as many back; the node of rank 0 is at host:port."""
        import torch
        import torch.distributed as dist

        with self._group(host, port, rank, 2, within):
            data, peer = torch.zeros(num_bytes // FLOAT32, device=self._device), 1 - rank
            first, second = (dist.send, dist.recv) if rank == 0 else (dist.recv, dist.send)
            first(data[:1], peer)  # opens the connection
            second(data[:1], peer)
            self._wait()
            start = time.perf_counter()
            first(data, peer)
            second(data, peer)
            self._wait()
            return time.perf_counter() - start

    def all_reduce(
        self, host: str, port: int, rank: int, size: int, num_bytes: int, within: float
    ) -> tuple[float, str]:
        """Seconds to sum `num_bytes` over all nodes, and what NCCL logged."""
        import torch
        import torch.distributed as dist

        with self._group(host, port, rank, size, within):
            data = torch.zeros(num_bytes // FLOAT32, device=self._device)
            dist.all_reduce(data)
            dist.barrier()
            self._wait()
            start = time.perf_counter()
            dist.all_reduce(data)
            self._wait()
            return time.perf_counter() - start, self.nccl_log()

    @contextlib.contextmanager
    def _group(self, host: str, port: int, rank: int, size: int, within: float) -> Iterator[None]:
        """A process group of its own. After an error its end is not waited for: this process is then replaced."""
        import torch.distributed as dist

        dist.init_process_group(
            "nccl" if self._device == "cuda" else "gloo",
            f"tcp://{host}:{port}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=within),
        )
        yield
        dist.destroy_process_group()

    def nccl_log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def _wait(self) -> None:
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
