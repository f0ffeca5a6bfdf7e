"""A Ray session: the cluster that the driver finds itself in, or a single-node one of its own."""

import bisect
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from cluster.config import ConfigError
from cluster.store import PATIENCE

PROJECT = Path(__file__).resolve().parents[1]

# A session without a dashboard has no address for what asks one. Ray Train's watcher of its own controller would look
# for it for 40 s, and the end of a worker group waits for the watcher, for up to 12 s. A closed port refuses at once.
NO_DASHBOARD = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}

# In workers and reads. The driver has reached the store before they start, so one that is away then will come back, and
# giving up costs all since the last commit. Below heartbeat.timeout_seconds: who waits for a store is not hung.
WORKERS_PATIENCE = "540"

CONNECT_SECONDS = 30.0
"""For a head to listen: one that has just been started is up by then."""
# Ray asks one that does not answer 20 times, for half a minute each: a wrong address would be named after 10 minutes.
FEW_TRIES = {"RAY_NUM_REDIS_GET_RETRIES": "5"}
CLIENT_PORT = 10_001
"""Of ray:// without a port."""
TELL_SECONDS = 30.0
"""Between two lines of a driver that waits for nodes."""

Resources = Mapping[str, float]
"""What one node has, by Ray's names: CPU, GPU."""

# Read by Ray when it is imported, in the driver; a value that the user set stays.
RAY_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else each print of a training worker appears twice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # else relative paths mean another folder in a worker
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the default 2 s is added to every start, end and restart
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # do not touch CUDA_VISIBLE_DEVICES of tasks without GPUs
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody asks it, and it logs an error at each start
    # A pipeline whose process was killed keeps its claim on CPUs until it expires: by default for 180 s, in which that
    # of the restarted worker group gets none. A living one renews it each time the gap has passed.
    "RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS": "2",
    "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "8",
    "RAY_DATA_LOG_LEVEL": "WARNING",  # it says of each burst that it was read
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing about a run leaves the machine unasked
}


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Which machines to use, and how much of them each training worker gets."""

    address: str = "auto"
    """`auto`: the cluster of the Ray job or of RAY_ADDRESS, else a local one for this run; `local`: always a
    local one; else the address of a running cluster (host:port or ray://…)."""
    num_workers: int = 1
    """Training workers; with GPUs, one for each."""
    min_workers: int = 0
    """Fewest training workers while nodes are missing: the run then starts with as many as fit, up to
    num_workers, and changes its size when nodes come or go. 0: always num_workers."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves for a training worker. Some must stay free for Ray Data's reads."""
    gpus_per_worker: float = 0.0
    """GPUs for a training worker: 1 uses NCCL, 0 uses gloo on CPUs."""
    join_seconds: float = 60.0
    """How long a driver that comes before its cluster's nodes waits for them. More where new nodes take minutes."""
    threads_per_worker: int = 0
    """Threads of a worker's matrix products; 0: its CPUs, rounded."""
    object_store_bytes: int = 0
    """Shared memory for Ray's object store on a local cluster; 0: a tenth of the memory, at most 2 GiB."""

    def problems(self, at: str) -> Iterator[str]:
        if self.num_workers < 1:
            yield f"{at}.num_workers={self.num_workers} must be at least 1"
        if not 0 <= self.min_workers <= self.num_workers:
            yield (
                f"{at}.min_workers={self.min_workers} must be between 0 (a fixed size) and "
                f"{at}.num_workers={self.num_workers}"
            )
        if self.cpus_per_worker <= 0:
            yield f"{at}.cpus_per_worker={self.cpus_per_worker} must be positive; on shared cores, try 0.75"
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


@contextmanager
def ray_session(config: ClusterConfig) -> Iterator[Sequence[Resources]]:
    """Join or start Ray for the length of a with-block; yields what each of the cluster's nodes has.

    Nodes of a cluster that has just started are waited for, `join_seconds` at most, until the workers fit.

    Raises:
        ConfigError: `config.address` names a cluster that does not answer, or that asks for another token.
    """
    for name, value in (RAY_ENVIRONMENT if config.is_local else RAY_ENVIRONMENT | FEW_TRIES).items():
        os.environ.setdefault(name, value)
    if not config.is_local:
        reach_head(config.address)
    import ray  # here, because it reads the variables above when imported
    from ray.exceptions import AuthenticationError

    variables = {name: os.environ[name] for name in RAY_ENVIRONMENT}
    variables[PATIENCE] = os.environ.get(PATIENCE, WORKERS_PATIENCE)
    if config.min_workers:
        # After a node is lost, Ray Train first tries the old size anew, for this long instead of 60 s.
        variables["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "15"
    runtime_env: dict[str, Any] = {"worker_process_setup_hook": prepare_process, "env_vars": variables}
    if config.is_local:
        # A local session is this user's alone: loopback, no dashboard to open.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        arguments: dict[str, Any] = {
            "address": "local",
            "object_store_memory": config.object_store_bytes or min(memory // 10, 2 << 30),
            "include_dashboard": False,
        }
        variables |= {"PYTHONPATH": str(PROJECT), **NO_DASHBOARD}
    else:
        arguments = {"address": None if config.address == "auto" else config.address}
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:  # a Ray job has uploaded its working directory
            runtime_env |= {"working_dir": str(PROJECT), "excludes": ["/.venv", "/runs", "/corpora"]}
    # What Ray itself logs at every start, though nothing is wrong, would bury the run's own lines.
    quiet_ray()
    try:
        ray.init(log_to_driver=True, logging_level=logging.WARNING, runtime_env=runtime_env, **arguments)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        why = " ".join(str(error).partition("Traceback (")[0].split())
        raise ConfigError([no_head(config.address, why)]) from None
    try:
        yield resources_now() if config.is_local else joined_resources(config, resources_now)
    finally:
        ray.shutdown()


def reach_head(given: str) -> None:
    """Wait until something listens at the cluster's address, `CONNECT_SECONDS` at most.

    Raises:
        ConfigError: nothing does, or it is no address.
    """
    address = os.environ["RAY_ADDRESS"] if given == "auto" else given
    if address == "auto":  # Ray looks for a head on this machine
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address.startswith("ray://") and not host:
        host, port = port, str(CLIENT_PORT)
    if not host or not port.isdigit():
        raise ConfigError(
            [no_head(given, f"{address} is no address of a Ray head: give host:port, or ray://host:port")]
        )
    ends = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > ends:
                raise ConfigError([no_head(given, f"{address} does not answer: {error}")]) from None
            time.sleep(1)


def no_head(given: str, why: str) -> str:
    return (
        f"cluster.address={given}: {why}; check that a Ray head runs there, RAY_ADDRESS, and RAY_AUTH_MODE and "
        "RAY_AUTH_TOKEN (or its file) where it asks for a token"
    )


def resources_now() -> list[Resources]:
    """Of each node that lives and stays. A Ray session must be up."""
    return [node["Resources"] for node in staying_nodes()]


def staying_nodes() -> list[dict[str, Any]]:
    """The nodes that live, as `ray.nodes()` lists them, without those that drain."""
    import ray

    leaving = draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def draining_nodes() -> set[str]:
    """Ids of the nodes that were told to go. A driver that came by ray:// cannot ask, and hears of none."""
    import ray
    from ray.util.client import ray as client

    if client.is_connected():
        return set()
    # The one way to ask; Ray Train and Ray Data ask so too (ray 2.60).
    return set(ray._private.state.state.get_draining_nodes())


def joined_resources(
    config: ClusterConfig, resources_now: Callable[[], Sequence[Resources]]
) -> Sequence[Resources]:
    """What each node has once the fewest workers fit on them, or as it is after `join_seconds`."""
    tells = now = time.monotonic()
    ends = now + config.join_seconds
    while (lacking := list(shortages(config, nodes := resources_now()))) and now < ends:
        if now >= tells:
            print(f"waiting for nodes, {ends - now:,.0f} s more: {'; '.join(lacking)}", flush=True)
            tells = now + TELL_SECONDS
        time.sleep(0.5)
        now = time.monotonic()
    return nodes


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


def _remedy(config: ClusterConfig, nodes: Sequence[Resources], read_cpus: float) -> str:
    """The most CPUs, in hundredths, with which the fewest workers fit."""
    hundredths = range(1, 1 + int(100 * max((node.get("CPU", 0.0) for node in nodes), default=0.0)))

    def is_too_much(each: int) -> bool:
        smaller = replace(config, cpus_per_worker=each / 100)
        return fitting_workers(smaller, nodes, read_cpus) < config.fewest_workers

    most = bisect.bisect_left(hundredths, True, key=is_too_much) / 100
    return f"at most cluster.cpus_per_worker={most:g} fits, or fewer workers" if most else "add nodes"


def prepare_process() -> None:
    """What each of Ray's processes does first."""
    import ray.util

    quiet_ray()
    # Else Ray Train asks any Ray of this machine whether its controller lives, and another one knows no such actor.
    os.environ.setdefault("RAY_API_SERVER_ADDRESS", ray.get_runtime_context().gcs_address)
    # Else gloo takes the address that the host's name stands for: 127.0.1.1 on a Debian, which no other host reaches.
    address = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def quiet_ray() -> None:
    """Keep Ray's routine messages out of the log of this process; its errors stay."""
    for name in ("ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in (
        # Without a dashboard it complains every second that it cannot ask it; it has nothing else to say.
        "ray.train.v2._internal.execution.controller.placement_group_cleaner",
        "ray.data._internal.progress",  # warns that there are no progress bars, as the stream wants it
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
