"""A process on each node that answers the preflight: its facts, its clock, and how fast it reaches the others.

No Ray here: cluster/preflight.py makes an actor of it.
"""

import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.node_facts import NodeFacts, gather

FLOAT32 = 4


class Witness:
    """Stands on one node. With `on_gpu` it speaks NCCL from the first GPU that Ray gave it, else gloo."""

    def __init__(self, on_gpu: bool) -> None:
        self._device = "cuda" if on_gpu else "cpu"
        self._log = Path(tempfile.mkdtemp()) / "nccl.log"
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

    def join(self, address: str, rank: int, size: int) -> None:
        """Meet the others at the first one's address (host:port); all nodes at once."""
        import torch
        import torch.distributed as dist

        backend = "nccl" if self._device == "cuda" else "gloo"
        dist.init_process_group(backend, f"tcp://{address}", rank=rank, world_size=size)
        dist.all_reduce(torch.ones(1, device=self._device))

    def exchange(self, peer: int, num_bytes: int, sends: bool) -> float:
        """Seconds for `num_bytes` to another node, and as many back."""
        import torch
        import torch.distributed as dist

        data = torch.zeros(num_bytes // FLOAT32, device=self._device)
        first, second = (dist.send, dist.recv) if sends else (dist.recv, dist.send)
        first(data[:1], peer)  # opens the connection
        second(data[:1], peer)
        self._wait()
        start = time.perf_counter()
        first(data, peer)
        second(data, peer)
        self._wait()
        return time.perf_counter() - start

    def all_reduce(self, num_bytes: int) -> float:
        """Seconds to sum `num_bytes` over all nodes."""
        import torch
        import torch.distributed as dist

        data = torch.zeros(num_bytes // FLOAT32, device=self._device)
        dist.all_reduce(data)
        dist.barrier()
        self._wait()
        start = time.perf_counter()
        dist.all_reduce(data)
        self._wait()
        return time.perf_counter() - start

    def nccl_log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def _wait(self) -> None:
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
