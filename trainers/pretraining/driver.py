"""A run on Ray Train: start the workers, start them anew when one fails, stop them when asked."""

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import (
    ControllerError,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client

from cluster.configuration.stored_file import DamagedFileError
from cluster.hardware.machine import CPU_ALLOCATOR, CPU_ONLY
from cluster.sessions.session import draining_nodes
from cluster.sessions.workers import ClusterConfig, fitting_workers, worker_resources
from cluster.storage.store import StorageError
from cluster.storage.uris import Store
from trainers.checkpoints.keeping import latest_attempt, latest_world_size
from trainers.pretraining.config import PretrainConfig, run_store
from trainers.pretraining.run_folder import is_finished
from trainers.pretraining.worker import Task, work
from trainers.recovery.clock import RunClock
from trainers.recovery.rendezvous import RendezvousConfig
from trainers.recovery.stopping import (
    DRAIN,
    FAILURE,
    GROW,
    HEAD_DRAINS,
    STOP,
    RunFailed,
    raise_final,
    stop_on_signal,
)
from trainers.reporting.live_metrics import DriverLog, LiveGoodput

logger = logging.getLogger(__name__)

POLL_SECONDS = 5.0
GROW_AGAIN_SECONDS = (60.0, 600.0)
"""After growing did not help, until it is tried again: at first, then twice as long each time, at most."""
EXIT_HEAD_DRAINS = 75
"""Exit status where the driver's own node is going away: EX_TEMPFAIL of sysexits.h, "try again later"."""
# Between a group whose processes did not find each other and the next try.
RENDEZVOUS_PAUSE_SECONDS = 5.0
RENDEZVOUS_TIMEOUT_SECONDS = 300
"""For the processes of a group to find each other; the collectives after that have a limit of their own."""
# Until then what an ended pipeline of Ray Data has claimed counts as taken (cluster/sessions/session.py), and Ray,
# which looks
# at the nodes every 20 s, may not know one that joined 5 s before: an elastic group would start with fewer workers
# than fit.
NODES_KNOWN_SECONDS = 15.0
CLAIM_SECONDS = 30
"""How long what a killed driver's elastic run had claimed counts as taken. A living one renews its claim every 20 s.
Ray (2.60) has 180 s, and no setting."""


def run_workers(config: PretrainConfig, manifest_digest: str, init: str = "") -> None:
    """Train, judge and export on Ray's workers; returns when they are done or have saved and stopped.

    A failed worker group is started anew from the newest checkpoint, `run.max_failures` times. When a node with
    workers is about to go, or an elastic run could have more of them, the group saves, ends, and starts anew on the
    nodes that are left or have come, so that no step is done twice for it.

    Raises:
        trainers.recovery.stopping.RunFailed: an error that no restart cures.
        ray.train.TrainingFailedError: it failed once more than `run.max_failures`.
        SystemExit: with `EXIT_HEAD_DRAINS`, where the driver's own node goes away.
    """
    store, failures_left = run_store(config), config.run.max_failures
    store.delete(FAILURE)
    now = RunClock(store).now
    task = Task(config, manifest_digest, asked=now(), init=init)
    group = partial(trainer, work, task, config.cluster, store, config.run.max_failures)
    nodes, tell = NodeWatch(config.cluster, store), DriverLog(config.run.name, config.run.log_events, now)
    with (
        stop_on_signal(store) as asked,
        # In a thread of its own, for in the main thread Ray Train would take Ctrl-C for itself.
        ThreadPoolExecutor(1, thread_name_prefix="fit") as thread,
    ):
        while not asked.is_set():
            tell("group_start", attempt=latest_attempt(store) + 1)
            try:
                with nodes:
                    thread.submit(group().fit).result()
            except TrainingFailedError as error:
                raise_final(store)
                # Ray Train restarts workers that die, but no group whose processes did not find each other.
                if not isinstance(error, ControllerError) or failures_left == 0:
                    raise RunFailed(
                        f"it failed more often than run.max_failures={config.run.max_failures} allows; the same "
                        f"command goes on from the newest checkpoint. The last failure: {error}"
                    ) from error
                failures_left -= 1
                tell("group_failure", attempt=latest_attempt(store), error=str(error))
                print(f"the workers did not come together, trying again: {error}", flush=True)
                asked.wait(RENDEZVOUS_PAUSE_SECONDS)
                continue
            raise_final(store)
            reason = store.read(STOP) if store.exists(STOP) else None
            # Asked while it was judged, a run that is done has nothing to go on with.
            if reason is None or is_finished(store):
                return tell("finished", attempt=latest_attempt(store))
            if reason not in (GROW, DRAIN, HEAD_DRAINS):
                break
            tell(reason.decode().replace(" ", "_"), attempt=latest_attempt(store))
            if reason == HEAD_DRAINS:
                raise SystemExit(EXIT_HEAD_DRAINS)
            store.delete(STOP)
            if config.cluster.min_workers:
                asked.wait(NODES_KNOWN_SECONDS)
        tell("stopped", attempt=latest_attempt(store))


def live_goodput(config: PretrainConfig) -> LiveGoodput:
    """Shows where the run's time goes, from now on until the end of its with-block."""
    store = run_store(config)
    return LiveGoodput(config.run.name, store, RunClock(store).now, partial(lacks_nodes, config.cluster))


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
        torch_config=RendezvousConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=RENDEZVOUS_TIMEOUT_SECONDS
        ),
        scaling_config=ScalingConfig(
            num_workers=size,  # type: ignore[arg-type]  # Ray annotates its first version of this class
            use_gpu=use_gpu,
            resources_per_worker=worker_resources(cluster),
            # Ray Train would resize by killing the workers: all since the last checkpoint would be done again.
            elastic_resize_monitor_interval_s=math.inf,  # type: ignore[call-arg]
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=run.child("ray").storage_path(),
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[ShortClaim()],  # type: ignore[list-item]  # which Ray hands on as it is
            logging_config=LoggingConfig(log_level="WARNING"),  # what it says at each start, the run says too
            worker_runtime_env={} if use_gpu else {"env_vars": CPU_ONLY | CPU_ALLOCATOR},  # type: ignore[call-arg]
        ),
    )


def workers_on(cluster: ClusterConfig, nodes: Iterable[Mapping[str, Any]]) -> int:
    """Training workers that fit on the nodes (as `ray.nodes()` lists them), at most those configured."""
    living = [node["Resources"] for node in nodes if node["Alive"]]
    return min(fitting_workers(cluster, living), cluster.num_workers)


def lacks_nodes(cluster: ClusterConfig) -> bool:
    """Whether the fewest workers that the run cannot do without do not fit on the living nodes."""
    try:
        return workers_on(cluster, ray.nodes()) < cluster.fewest_workers
    except RayError as error:
        logger.warning("cannot look at the nodes: %s", error)
        return False


class ShortClaim(ControllerCallback):
    """Where the claim is made, in Ray Train's controller: each one after the first lasts for `CLAIM_SECONDS`."""

    def after_controller_start(self, train_run_context: object) -> None:
        autoscaling_coordinator_client.AUTOSCALING_REQUESTS_EXPIRE_TIME_S = CLAIM_SECONDS


class NodeWatch:
    """Looks at the nodes while a worker group runs, and asks it to save and end when it should start anew: a node
    that workers fit on drains, or an elastic run could have more workers. A context manager, entered once per group.
    """

    def __init__(self, cluster: ClusterConfig, store: Store) -> None:
        self._cluster, self._store = cluster, store
        self._driver_node = ray.get_runtime_context().get_node_id()
        self._left: set[str] = set()
        """Draining nodes that a group has been asked to leave already."""
        self._tried, self._again, self._pause = 0, 0.0, 0.0
        """Workers that a group was asked to grow to last, when as many may be asked for again, and how long that is."""

    def __enter__(self) -> None:
        self._ended, self._former = threading.Event(), latest_attempt(self._store)
        self._fitting = 0
        self._thread = threading.Thread(target=self._watch, name="nodes", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            try:
                if self._ask():
                    return
            except (StorageError, RayError, DamagedFileError) as error:
                logger.warning("cannot look at the nodes, training goes on: %s", error)

    def _ask(self) -> bool:
        """Ask the group to save and end if there is a reason; whether it was asked."""
        nodes = ray.nodes()
        draining = draining_nodes()
        leaving = [node for node in nodes if node["NodeID"] in draining - self._left]
        staying = [node for node in nodes if node["NodeID"] not in draining]
        if any(node["NodeID"] == self._driver_node for node in leaving):
            reason = HEAD_DRAINS
        elif workers_on(self._cluster, leaving):
            reason = DRAIN
        elif self._cluster.min_workers and self._could_grow(staying):
            reason = GROW
        else:
            return False
        if not self._store.put_if_absent(STOP, reason):
            return False
        self._left |= {node["NodeID"] for node in leaving}
        if reason == GROW:
            first, longest = GROW_AGAIN_SECONDS
            self._pause = min(2 * self._pause, longest) if self._fitting <= self._tried else first
            self._tried, self._again = self._fitting, time.monotonic() + self._pause
        return True

    def _could_grow(self, nodes: Sequence[Mapping[str, Any]]) -> bool:
        """Whether more workers fit than the group has. What fits is told by nodes as a whole: where something else
        holds their resources, growing did not help, and is not tried again soon."""
        if latest_attempt(self._store) == self._former:
            return False  # it has not started yet
        before, self._fitting = self._fitting, workers_on(self._cluster, nodes)
        size = latest_world_size(self._store)
        if self._fitting <= size:
            self._tried = 0  # what comes from now on is new
        if self._fitting <= self._tried and time.monotonic() < self._again:
            return False
        # Twice the same: of nodes that come together none is left behind.
        return before == self._fitting > size
