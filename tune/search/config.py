"""The configuration of a sweep."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from cluster.console.errors import ConfigError
from cluster.limits.bounds import folder_problems
from cluster.sessions.workers import ClusterConfig
from trainers.finetuning.config import FinetuneConfig
from tune.search.proposals import Search
from tune.search.space import SearchSpace

CHOOSES_NOTHING = ("name", "storage", "max_concurrent", "judge")
"""Keys of `sweep` that have no say in which point wins."""
BEST = "-best"
"""Follows a sweep's name in that of the run that trains its winner."""


@dataclass(frozen=True, kw_only=True)
class SweepRunConfig:
    """How many trials there are, which are cut short, and what is made of the best."""

    name: str = "sweep"
    """The sweep's folder under `sweep.storage`; the same name goes on where it was."""
    storage: str = "sweeps"
    """URI of the folder of sweeps; every node must reach it."""
    search: Search = "tpe"
    """Points at random, every point of a grid, or by Optuna's tree-structured Parzen estimator."""
    trials: int = 20
    """Points that are tried."""
    scheduler: Literal["none", "asha", "median"] = "asha"
    """Which trials are stopped early, by their validation score at equal shares of their steps: none, all but the best
    third at each rung (ASHA, Li et al. 2020), or those below the median of the others."""
    grace: float = 0.25
    """Share of a trial's steps before it may be stopped."""
    best: int = 3
    """Best points that are repeated with other seeds."""
    seeds: int = 3
    """Seeds of each of them, the trial's own included."""
    seed: int = 0
    """Of the search."""
    max_concurrent: int = 0
    """Trials at a time; 0: as many as the cluster has room for."""
    judge: bool = True
    """Train the winner once more in the end and judge it on the test split."""

    def problems(self, at: str) -> Iterator[str]:
        yield from folder_problems(f"{at}.name", self.name, self.storage, BEST)
        for key in ("trials", "best", "seeds"):
            if getattr(self, key) < 1:
                yield f"{at}.{key}={getattr(self, key)} must be at least 1"
        if not 0 < self.grace <= 1:
            yield f"{at}.grace={self.grace} must be above 0 and at most 1"
        if self.max_concurrent < 0:
            yield f"{at}.max_concurrent={self.max_concurrent} must be 0 (as many as fit) or more"

    def choosing(self) -> dict[str, Any]:
        """The keys that have a say in which point wins."""
        return {key: value for key, value in asdict(self).items() if key not in CHOOSES_NOTHING}


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep over fine-tuning runs."""

    sweep: SweepRunConfig = field(default_factory=SweepRunConfig)
    base: FinetuneConfig = field(default_factory=FinetuneConfig)
    space: dict[str, Any] = field(default_factory=dict)
    """What is varied: see tune/search/space.py."""


def grid_problem(config: SweepRunConfig, space: SearchSpace) -> str | None:
    """Why the grid would not be searched whole, if so."""
    if config.search != "grid" or (points := space.num_points()) <= config.trials:
        return None
    return (
        f"sweep.trials={config.trials} would leave out {points - config.trials:,} of the grid's {points:,} points; set "
        f"sweep.trials={points}, narrow space, or set sweep.search=random"
    )


@dataclass(frozen=True)
class Room:
    """What one trial takes of a cluster."""

    workers: int
    cpus: float
    """Of each worker; a worker lies on one node."""
    gpus: float
    reads: float = 0.0
    """CPUs beside the workers', on any node."""

    def on(self, nodes: Sequence[Mapping[str, float]], max_concurrent: int = 0) -> int:
        """How many trials run at a time on nodes of these resources: a half-started one would wait for ever.

        Raises:
            ConfigError: not even one does.
        """
        places = sum(self._places(node) for node in nodes)
        cpus = sum(node.get("CPU", 0.0) for node in nodes)
        fitting = places // self.workers
        if needed := self.workers * self.cpus + self.reads:
            fitting = min(fitting, int(cpus / needed))
        if not fitting:
            raise ConfigError([self._refusal(places, cpus, nodes)])
        return min(fitting, max_concurrent or fitting)

    def _places(self, node: Mapping[str, float]) -> int:
        """Workers that fit on one node."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus}
        return min(int(node.get(name, 0.0) / number) for name, number in wanted.items() if number)

    def _refusal(self, places: int, cpus: float, nodes: Sequence[Mapping[str, float]]) -> str:
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        reads = f" and {self.reads:g} CPUs for reads" if self.reads else ""
        have = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}: {cpus:g} CPUs in all"
        have += f", {sum(node.get('GPU', 0.0) for node in nodes):g} GPUs" if self.gpus else ""
        return (
            f"a trial needs {self.workers} x ({self.cpus:g} CPUs{gpus}){reads}, the cluster has room for {places} such "
            f"workers ({have}); lower base.cluster.num_workers, cpus_per_worker or gpus_per_worker"
        )


def room_of(cluster: ClusterConfig, reads: float = 0.0) -> Room:
    """What a trial with these workers takes."""
    return Room(cluster.num_workers, cluster.cpus_per_worker, cluster.gpus_per_worker, reads)


def unshared_problem(uris: Mapping[str, str], nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Why a trial on another node would not find what it needs, if so; `uris` by key."""
    local = [f"{key}={uri}" for key, uri in uris.items() if uri.startswith("file://")]
    if len(nodes) < 2 or not local:
        return None
    return (
        f"the cluster has {len(nodes)} nodes, and {', '.join(local)} may be another folder on each; give s3:// or "
        "gs:// URIs, or one node"
    )
