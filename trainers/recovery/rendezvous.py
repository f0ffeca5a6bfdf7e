"""How the processes of a worker group find each other: on one machine through a file, else through a TCP store."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import (
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)

from cluster.sessions.loopback import is_loopback


@dataclass
class RendezvousConfig(TorchConfig):
    """Ray Train's setting up of torch.distributed, but for sessions of one machine: `Rendezvous`."""

    @property
    def backend_cls(self) -> type["Rendezvous"]:
        return Rendezvous


class Rendezvous(_TorchBackend):
    """Lets the workers of a local session meet in a file.

    torch's TCP store listens on all addresses, takes no address to bind to, and serves whoever connects (torch 2.13).
    """

    _folder: tempfile.TemporaryDirectory[str] | None = None  # of mode 0700

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if not is_loopback(ray.util.get_node_ip_address()):
            return super().on_start(worker_group, backend_config)
        self._folder = tempfile.TemporaryDirectory(prefix="rendezvous-")
        worker_group.execute(_set_torch_distributed_env_vars)
        size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    _setup_torch_process_group,
                    backend=backend_config.backend,
                    world_rank=rank,
                    world_size=size,
                    init_method=(Path(self._folder.name) / "store").as_uri(),
                    timeout_s=backend_config.timeout_s,
                )
                for rank in range(size)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        super().on_shutdown(worker_group, backend_config)
        if self._folder:
            self._folder.cleanup()
