"""Small experiments for tests of trials: each does one thing that a trial may do, without training."""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.storage import Store
from tune.experiment import Report, Score
from tune.search_space import Point

Training = Callable[[Store, Point, int, Report], Score]


@dataclass(frozen=True)
class Doing:
    """An experiment whose trials call a function."""

    training: Training
    cpus: float = 0.5

    @property
    def resources(self) -> Mapping[str, float]:
        return {"cpu": self.cpus, "gpu": 0}

    def train(self, folder: Store, point: Point, seed: int, report: Report) -> Score:
        return self.training(folder, point, seed, report)


def scored_by_rate(folder: Store, point: Point, seed: int, report: Report) -> Score:
    report(0.5, point["rate"] / 2, {"accuracy": point["rate"] / 2})
    return Score(point["rate"], {"accuracy": point["rate"]})


def scored_step_by_step(folder: Store, point: Point, seed: int, report: Report) -> Score:
    """As training does: validations on the way, and a checkpoint to go on from."""
    folder.put("seed-0/checkpoints/step-1/weights", b"")
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
    """Fails alike each time; counts how often it was tried."""
    tries = len(folder.list("try-"))
    folder.put(f"try-{tries}", b"")
    report(0.2, 0.9, {})
    raise ValueError(f"no finite gradient at rate {point['rate']}")


def telling_its_gpus(folder: Store, point: Point, seed: int, report: Report) -> Score:
    folder.put("cuda", os.environ.get("CUDA_VISIBLE_DEVICES", "not set").encode())
    return Score(0.0, {})


def registered() -> None:
    """Let Ray send this module to its workers, whose path does not have the folder of the tests."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
