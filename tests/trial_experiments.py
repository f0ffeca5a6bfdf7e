"""Small experiments for tests of trials: each does one thing that a trial may do, without training."""

import math
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from cluster.sessions.workers import ClusterConfig
from cluster.storage.uris import RetryPolicy, S3Store, Store
from tune.search.experiment import Report, Score
from tune.search.space import Point

Training = Callable[[Store, Point, int, Report], Score]


@dataclass(frozen=True)
class Doing:
    """An experiment whose trials call a function."""

    training: Training
    cpus: float = 0.5

    @property
    def resources(self) -> Mapping[str, float]:
        return {"cpu": self.cpus, "gpu": 0}

    def changed(self) -> str | None:
        return None

    def train(self, folder: Store, point: Point, seed: int, report: Report) -> Score:
        return self.training(folder, point, seed, report)


def scored_by_rate(folder: Store, point: Point, seed: int, report: Report) -> Score:
    report(0.5, point["rate"] / 2, {"accuracy": point["rate"] / 2})
    return Score(point["rate"], {"accuracy": point["rate"]})


def scored_step_by_step(folder: Store, point: Point, seed: int, report: Report) -> Score:
    """As training does: validations on the way, and a checkpoint to go on from."""
    folder.put("seed-0/checkpoints/step-00000001-w1-a1/worker-00000-000.safetensors", b"")
    for step in range(1, 10):
        report(step / 10, point["rate"] * step, {"loss": 1.0})
    return Score(point["rate"] * 10, {"loss": 1.0})


def going_on_for_long(folder: Store, point: Point, seed: int, report: Report) -> Score:
    folder.put("began", b"")
    time.sleep(600)
    return Score(0.0, {})


def killed_once(folder: Store, point: Point, seed: int, report: Report) -> Score:
    """As on a node that is lost, or out of memory: the process is gone without a word."""
    if folder.put_if_absent("began", b""):
        os.kill(os.getpid(), signal.SIGKILL)
    return Score(point["rate"], {})


def killed_always(folder: Store, point: Point, seed: int, report: Report) -> Score:
    os.kill(os.getpid(), signal.SIGKILL)
    return Score(0.0, {})


def failing(folder: Store, point: Point, seed: int, report: Report) -> Score:
    """Fails alike each time, the first rate before a validation; counts how often it was tried."""
    tries = len(folder.list("try-"))
    folder.put(f"try-{tries}", b"")
    if point["rate"] > 0.1:
        report(0.5, 0.9, {})
    raise ValueError(f"no finite gradient at rate {point['rate']}")


def telling_its_gpus(folder: Store, point: Point, seed: int, report: Report) -> Score:
    folder.put("cuda", os.environ.get("CUDA_VISIBLE_DEVICES", "not set").encode())
    return Score(0.0, {})


def score_near_hundredth(rate: float) -> float:
    return -abs(math.log10(rate) + 2)


def scored_near_hundredth(folder: Store, point: Point, seed: int, report: Report) -> Score:
    return Score(score_near_hundredth(point["rate"]), {})


def in_two_workers(folder: Store, point: Point, seed: int, report: Report) -> Score:
    """In workers of Ray Train's, of which the first start meets with what the rate stands for."""
    from trainers.pretraining.driver import run_group  # here: Ray reads its variables when it is imported

    cluster = ClusterConfig(num_workers=2, cpus_per_worker=0.5)
    run_group(meet_with, (folder, point["rate"]), cluster, folder, max_failures=0)
    return Score(point["rate"], {})


def meet_with(arguments: dict[str, Any]) -> None:
    folder, rate = arguments["task"]
    if dist.get_rank() != 1:
        return
    first = not folder.list("try-")
    folder.put(f"try-{uuid.uuid4().hex}", b"")
    if rate == 0.3:
        raise ValueError("no finite gradient")
    if first and rate == 0.2:
        os.kill(os.getpid(), signal.SIGKILL)
    if first:
        S3Store("s3://away/run", RetryPolicy(give_up_seconds=0), "http://127.0.0.1:9").read("object")


def registered() -> None:
    """Let Ray send this module to its workers, whose path does not have the folder of the tests."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
