"""A run on Ray Train: start the workers, start them anew when one fails, stop them when asked."""

import math
import signal
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.session import ClusterConfig
from cluster.storage import Store
from trainers.config import PretrainConfig, run_store
from trainers.stopping import STOP
from trainers.worker import Task, work

# For workers on CPUs. By default glibc returns each large activation to the kernel, and the kernel zeroes its pages
# at the next allocation: a fourth of a step. Here freed memory stays with the process, in huge pages where it can.
CPU_ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=0x1000000000:glibc.malloc.hugetlb=1"
}

# What the object STOP holds where the run is to go on with more workers.
GROW = b"grow"
GROW_POLL_SECONDS = 5.0


def run_workers(config: PretrainConfig, manifest_digest: str) -> None:
    """Train, judge and export on Ray's workers; returns when they are done or have saved and stopped.

    A failed worker group is started anew from the newest checkpoint, `run.max_failures` times. An elastic one is
    then as large as the nodes that are left allow; when nodes come, it saves, ends, and starts anew with more
    workers, so that no step is done twice for it.

    Raises:
        ray.train.TrainingFailedError: it failed once more than that.
    """
    store = run_store(config)
    group = partial(
        trainer, work, Task(config, manifest_digest), config.cluster, store, config.run.max_failures
    )
    # In a thread of its own, for in the main thread Ray Train would take Ctrl-C for itself.
    with stop_on_signal(config), ThreadPoolExecutor(1, thread_name_prefix="fit") as thread:
        while True:
            with grow(config.cluster, store):
                thread.submit(group().fit).result()
            if not store.exists(STOP) or store.read(STOP) != GROW:
                return
            store.delete(STOP)


def run_group(
    work: Callable[[dict[str, Any]], None],
    task: object,
    cluster: ClusterConfig,
    run: Store,
    max_failures: int,
) -> None:
    """Call `work({"task": task})` on every worker of a group, torch.distributed up; starts a failed one anew.

    Raises:
        ray.train.TrainingFailedError: it failed more than `max_failures` times.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="fit") as thread:
        thread.submit(trainer(work, task, cluster, run, max_failures).fit).result()


def trainer(
    work: Callable[[dict[str, Any]], None],
    task: object,
    cluster: ClusterConfig,
    run: Store,
    max_failures: int,
) -> TorchTrainer:
    """The worker group as Ray Train is to start it, under a name of its own each time."""
    use_gpu = cluster.gpus_per_worker > 0
    size = (cluster.min_workers, cluster.num_workers) if cluster.min_workers else cluster.num_workers
    # Nothing goes through ray.train.report: its sync mode costs seconds a call, and what it says is committed is
    # only uploaded. Our own commit records decide where a restarted group goes on, so Ray's folder is scratch space,
    # with a new name each time: a torn file of Ray's in an old one would make the name unusable.
    return TorchTrainer(
        work,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=size,  # type: ignore[arg-type]  # Ray annotates its first version of this class
            use_gpu=use_gpu,
            resources_per_worker=worker_resources(cluster),
            # Ray Train would resize by killing the workers: all since the last checkpoint would be done again.
            elastic_resize_monitor_interval_s=math.inf,  # type: ignore[call-arg]
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=run.child("ray").uri.removeprefix("file://"),
            failure_config=FailureConfig(max_failures=max_failures),
            worker_runtime_env={} if use_gpu else {"env_vars": CPU_ALLOCATOR},  # type: ignore[call-arg]
        ),
    )


def worker_resources(cluster: ClusterConfig) -> dict[str, float]:
    """What Ray reserves for a training worker."""
    return {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if cluster.gpus_per_worker else {})


def fitting_workers(cluster: ClusterConfig, nodes: Iterable[Mapping[str, Any]]) -> int:
    """Training workers that fit on the nodes (as `ray.nodes()` lists them), at most those configured."""
    wanted = worker_resources(cluster)
    fitting = sum(
        min(int(node["Resources"].get(name, 0) / amount) for name, amount in wanted.items())
        for node in nodes
        if node["Alive"]
    )
    return min(fitting, cluster.num_workers)


@contextmanager
def grow(cluster: ClusterConfig, store: Store) -> Iterator[None]:
    """Meanwhile, ask the workers of an elastic run to save and end once there is room for more of them."""
    ended = threading.Event()

    def watch() -> None:
        fewest = fitting_workers(cluster, ray.nodes())
        while not ended.wait(GROW_POLL_SECONDS):
            found = fitting_workers(cluster, ray.nodes())
            if found > fewest and store.put_if_absent(STOP, GROW):
                return
            fewest = min(fewest, found)

    watcher = threading.Thread(target=watch, name="growth", daemon=True)
    if cluster.min_workers:
        watcher.start()
    try:
        yield
    finally:
        ended.set()
        if cluster.min_workers:
            watcher.join()


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
