"""The configuration of a sweep."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainers.finetune_config import FinetuneConfig
from tune.proposals import Search
from tune.search_space import SearchSpace


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
        for key in ("trials", "best", "seeds"):
            if getattr(self, key) < 1:
                yield f"{at}.{key}={getattr(self, key)} must be at least 1"
        if not 0 < self.grace <= 1:
            yield f"{at}.grace={self.grace} must be above 0 and at most 1"
        if self.max_concurrent < 0:
            yield f"{at}.max_concurrent={self.max_concurrent} must be 0 (as many as fit) or more"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep over fine-tuning runs."""

    sweep: SweepRunConfig = field(default_factory=SweepRunConfig)
    base: FinetuneConfig = field(default_factory=FinetuneConfig)
    space: dict[str, Any] = field(default_factory=dict)
    """What is varied: see tune/search_space.py."""


def grid_problem(config: SweepRunConfig, space: SearchSpace) -> str | None:
    """Why the grid would not be searched whole, if so."""
    points = len(space.grid())
    if config.search != "grid" or points <= config.trials:
        return None
    return (
        f"sweep.trials={config.trials} would leave out {points - config.trials} of the grid's {points} points; set "
        f"sweep.trials={points}, narrow space, or set sweep.search=random"
    )


def room_for_trials(config: SweepConfig, resources: Mapping[str, float]) -> tuple[int, str | None]:
    """How many trials run at a time, and why not even one could, if so: a half-started trial would wait for ever."""
    cluster = config.base.cluster
    wanted = {
        "CPU": cluster.num_workers * cluster.cpus_per_worker,
        "GPU": cluster.num_workers * cluster.gpus_per_worker,
    }
    room = {name: int(resources.get(name, 0.0) / number) for name, number in wanted.items() if number}
    scarce = min(room, key=lambda name: room[name])
    if not room[scarce]:
        return 0, (
            f"a trial needs {wanted[scarce]:g} {scarce}s (base.cluster.num_workers={cluster.num_workers} x "
            f"{scarce.lower()}s_per_worker), the cluster has {resources.get(scarce, 0.0):g}; ask for less per trial"
        )
    return min(room[scarce], config.sweep.max_concurrent or room[scarce]), None
