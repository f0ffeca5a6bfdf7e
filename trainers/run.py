"""A run on Ray Train: start the workers, start them anew when one fails, stop them when asked."""

import signal
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from trainers.config import PretrainConfig, run_store
from trainers.stopping import STOP
from trainers.worker import Task, work


def run_workers(config: PretrainConfig, manifest_digest: str) -> None:
    """Train, judge and export on Ray's workers; returns when they are done or have saved and stopped.

    A failed worker group is started anew from the newest checkpoint, `run.max_failures` times.

    Raises:
        ray.train.TrainingFailedError: it failed once more than that.
    """
    cluster = config.cluster
    use_gpu = cluster.gpus_per_worker > 0
    # Nothing goes through ray.train.report: its sync mode costs seconds a call, and what it says is committed is
    # only uploaded. Our own commit records decide where a restarted group goes on, so Ray's folder is scratch space,
    # with a new name each time: a torn file of Ray's in an old one would make the name unusable.
    trainer = TorchTrainer(
        work,
        train_loop_config={"task": Task(config, manifest_digest)},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=run_store(config).child("ray").uri.removeprefix("file://"),
            failure_config=FailureConfig(max_failures=config.run.max_failures),
        ),
    )
    # In a thread of its own, for in the main thread Ray Train would take Ctrl-C for itself.
    with stop_on_signal(config), ThreadPoolExecutor(1, thread_name_prefix="fit") as thread:
        thread.submit(trainer.fit).result()


@contextmanager
def stop_on_signal(config: PretrainConfig) -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into a request to save and end; the second one ends at once."""
    store = run_store(config)
    store.delete(STOP)

    def request(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        print(
            f"\n{signal.Signals(number).name}: the run saves after this step and ends; again: ends at once",
            flush=True,
        )
        store.put(STOP, b"")

    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        store.delete(STOP)
