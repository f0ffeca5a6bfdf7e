"""A Ray session: the cluster that the driver finds itself in, or a single-node one of its own."""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil

from cluster.console.errors import ConfigError
from cluster.console.printable import print_only_printable
from cluster.sessions.loopback import close_token_file, is_loopback, set_local_variables
from cluster.sessions.workers import ClusterConfig, Resources, shortages
from cluster.storage.store import PATIENCE

PROJECT = Path(__file__).resolve().parents[2]

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
    # A bar that is closed before it was shown is made once more, with a thread of tqdm's. While the interpreter
    # ends, as after Ctrl-C, that thread never starts, and is waited for.
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing about a run leaves the machine unasked
}


@contextmanager
def ray_session(config: ClusterConfig) -> Iterator[Sequence[Resources]]:
    """Join or start Ray for the length of a with-block; yields what each of the cluster's nodes has.

    Nodes of a cluster that has just started are waited for, `join_seconds` at most, until the workers fit.

    Raises:
        ConfigError: `config.address` names a cluster that does not answer, or that asks for another token.
    """
    for name, value in (RAY_ENVIRONMENT if config.is_local else RAY_ENVIRONMENT | FEW_TRIES).items():
        os.environ.setdefault(name, value)
    close_token_file()
    if config.is_local:
        set_local_variables()
    else:
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
        # No dashboard to open: a local session is this process's alone.
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
        with giving_way() if config.is_local else nullcontext():
            ray.init(log_to_driver=True, logging_level=logging.WARNING, runtime_env=runtime_env, **arguments)
    except (ConnectionError, RuntimeError, AuthenticationError) as error:
        why = " ".join(str(error).partition("Traceback (")[0].split())
        raise ConfigError([no_head(config.address, why)]) from None
    try:
        yield resources_now() if config.is_local else joined_resources(config, resources_now)
    finally:
        ray.shutdown()


@contextmanager
def giving_way() -> Iterator[None]:
    """Processes started in this with-block, and theirs, are in Linux's batch class, where who wakes preempts nobody.

    A local Ray shares its cores with the training, and each of its dozen processes wakes a hundred times a second: that
    interrupted a training worker 830 times a second, and 320 times in the batch class.
    """
    changed = set_policy("SCHED_OTHER", "SCHED_BATCH")
    try:
        yield
    finally:
        if changed:
            set_policy("SCHED_BATCH", "SCHED_OTHER")


def set_policy(before: str, after: str) -> bool:
    """Schedule this thread otherwise, if it is scheduled as `before`; False where it is not, or the kernel refuses:
    Linux alone has these classes, and gVisor knows one of them."""
    try:
        if os.sched_getscheduler(0) != getattr(os, before):
            return False
        os.sched_setscheduler(0, getattr(os, after), os.sched_param(0))
    except (AttributeError, OSError):
        return False
    return True


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
            [
                no_head(
                    given, f"{address} is no address of a Ray head: give it as head:6379 or ray://head:10001"
                )
            ]
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


def prepare_process() -> None:
    """What each of Ray's processes does first."""
    import ray.util

    print_only_printable()
    quiet_ray()
    # Else Ray Train asks any Ray of this machine whether its controller lives, and another one knows no such actor.
    os.environ.setdefault("RAY_API_SERVER_ADDRESS", ray.get_runtime_context().gcs_address)
    # Else gloo takes the address that the host's name stands for: 127.0.1.1 on a Debian, which no other host reaches.
    address = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            if is_loopback(address):  # what the user set is for clusters
                os.environ |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}


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
