"""Training workers: how many, what each gets of a node, and whether they fit. Needs no Ray."""

import bisect
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.configuration.keys import may_change

Resources = Mapping[str, float]
"""What one node has, by Ray's names: CPU, GPU."""


MOST_CPUS = 4_096
"""Of a host; the largest have some hundreds."""
LEAST_CPUS = 1e-4
"""Ray counts in ten thousandths."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Which machines to use, and how much of them each training worker gets."""

    address: str = may_change("auto")
    """`auto`: the cluster of the Ray job or of RAY_ADDRESS, else a local one for this run; `local`: always a
    local one; else the address of a running cluster (host:port or ray://…)."""
    num_workers: int = may_change(1)
    """Training workers; with GPUs, one for each."""
    min_workers: int = may_change(0)
    """Fewest training workers while nodes are missing: the run then starts with as many as fit, up to
    num_workers, and changes its size when nodes come or go. 0: always num_workers."""
    cpus_per_worker: float = may_change(1.0)
    """CPUs that Ray reserves for a training worker. Some must stay free for Ray Data's reads."""
    gpus_per_worker: float = may_change(0.0)
    """GPUs for a training worker: 1 uses NCCL, 0 uses gloo on CPUs."""
    join_seconds: float = may_change(60.0)
    """How long a driver that comes before its cluster's nodes waits for them. More where new nodes take minutes."""
    threads_per_worker: int = may_change(0)
    """Threads of a worker's matrix products; 0: its CPUs, rounded."""
    object_store_bytes: int = may_change(0)
    """Shared memory for Ray's object store on a local cluster; 0: a tenth of the memory, at most 2 GiB."""

    def problems(self, at: str) -> Iterator[str]:
        if self.num_workers < 1:
            yield f"{at}.num_workers={self.num_workers} must be at least 1"
        if not 0 <= self.min_workers <= self.num_workers:
            yield (
                f"{at}.min_workers={self.min_workers} must be between 0 (a fixed size) and "
                f"{at}.num_workers={self.num_workers}"
            )
        if self.cpus_per_worker < LEAST_CPUS:
            yield (
                f"{at}.cpus_per_worker={self.cpus_per_worker} must be {LEAST_CPUS:g} or more: Ray counts no less; on "
                "shared cores, try 0.75"
            )
        for key in ("cpus_per_worker", "threads_per_worker"):
            if getattr(self, key) > MOST_CPUS:
                yield f"{at}.{key}={getattr(self, key):g} is more than any host has; {MOST_CPUS:,} at most"
        if self.threads_per_worker < 0:
            yield f"{at}.threads_per_worker={self.threads_per_worker} must not be negative; 0 takes its CPUs"
        if self.object_store_bytes < 0:
            yield f"{at}.object_store_bytes={self.object_store_bytes} must not be negative; 0 takes a tenth"
        if self.join_seconds < 0:
            yield f"{at}.join_seconds={self.join_seconds:g} must not be negative; 0 waits for no node"
        if self.gpus_per_worker not in (0, 1):
            yield f"{at}.gpus_per_worker={self.gpus_per_worker} must be 0 or 1: a training worker drives one GPU"

    @property
    def is_local(self) -> bool:
        """Whether the session is a single-node Ray of this process's own."""
        return self.address == "local" or (self.address == "auto" and "RAY_ADDRESS" not in os.environ)

    @property
    def fewest_workers(self) -> int:
        """Training workers that the run cannot do without."""
        return self.min_workers or self.num_workers

    @property
    def threads(self) -> int:
        return self.threads_per_worker or max(1, round(self.cpus_per_worker))


def worker_resources(config: ClusterConfig) -> dict[str, float]:
    """What Ray reserves for a training worker."""
    return {"CPU": config.cpus_per_worker} | ({"GPU": 1} if config.gpus_per_worker else {})


def fitting_workers(config: ClusterConfig, nodes: Iterable[Resources], read_cpus: float = 0.0) -> int:
    """Training workers that fit on the nodes: a worker lies on one node. Beside them `read_cpus` stay free on one."""
    wanted = worker_resources(config)

    def on(node: Resources, taken: float = 0.0) -> int:
        left = {**node, "CPU": node.get("CPU", 0.0) - taken}
        # Ray counts in ten thousandths: 0.3 CPUs hold three workers of 0.1, though 0.3 / 0.1 is a little below 3.
        return max(0, min(math.floor(left.get(name, 0.0) / each + 1e-4) for name, each in wanted.items()))

    nodes = list(nodes)
    fitting = sum(map(on, nodes))
    if not read_cpus:
        return fitting
    lost = [on(node) - on(node, read_cpus) for node in nodes if node.get("CPU", 0.0) >= read_cpus]
    return fitting - min(lost, default=fitting)


def shortages(config: ClusterConfig, nodes: Sequence[Resources], read_cpus: float = 0.0) -> Iterator[str]:
    """A line for each resource of which the nodes lack what the fewest workers need: Ray would wait for it for ever.

    `read_cpus` is what must stay free beside them for Ray Data's reads.
    """
    fewest, key = config.fewest_workers, "min_workers" if config.min_workers else "num_workers"
    fitting = fitting_workers(config, nodes, read_cpus)
    if fitting >= fewest:
        return
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    workers = f"cluster.{key}={fewest} x cluster"
    wanted_cpus, wanted_gpus = fewest * config.cpus_per_worker, fewest * config.gpus_per_worker
    reads = f", and {read_cpus:g} for reads of Ray Data" if read_cpus else ""
    if wanted_cpus + read_cpus > cpus:
        yield (
            f"{workers}.cpus_per_worker={config.cpus_per_worker:g} = {wanted_cpus:g} CPUs{reads}, but the cluster has "
            f"{cpus:g}; {_remedy(replace(config, gpus_per_worker=0), nodes, read_cpus)}"
        )
    if wanted_gpus > gpus:
        yield (
            f"{workers}.gpus_per_worker={config.gpus_per_worker:g} = {wanted_gpus:g} GPUs, but the cluster has "
            f"{gpus:g}; take fewer workers, or add nodes"
        )
    elif wanted_cpus + read_cpus <= cpus:
        gpu = " and a GPU" if config.gpus_per_worker else ""
        yield (
            f"{workers}.cpus_per_worker={config.cpus_per_worker:g}{gpu}{reads}: {fitting} fit, for a worker lies on "
            f"one node, though the cluster has {cpus:g} CPUs in all; {_remedy(config, nodes, read_cpus)}"
        )


def piece_shortages(cpus_per_piece: float, nodes: Sequence[Resources]) -> Iterator[str]:
    """A line where no node can hold a piece of the work on a corpus: Ray Data would wait for such a node for ever."""
    most = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    if cpus_per_piece > most + LEAST_CPUS:
        yield (
            f"corpus.cpus_per_piece={cpus_per_piece:g}, but a piece lies on one node, and the largest has {most:g} "
            f"CPUs; give {min(1.0, most):g}: a piece works in one thread"
        )


def _remedy(config: ClusterConfig, nodes: Sequence[Resources], read_cpus: float) -> str:
    """The most CPUs, in hundredths, with which the fewest workers fit."""
    hundredths = range(1, 1 + int(100 * max((node.get("CPU", 0.0) for node in nodes), default=0.0)))

    def is_too_much(each: int) -> bool:
        smaller = replace(config, cpus_per_worker=each / 100)
        return fitting_workers(smaller, nodes, read_cpus) < config.fewest_workers

    most = bisect.bisect_left(hundredths, True, key=is_too_much) / 100
    return f"at most cluster.cpus_per_worker={most:g} fits, or fewer workers" if most else "add nodes"
