"""What a node says of itself before a run, and what is wrong with a set of such nodes. No Ray here.

Facts are gathered on the node; judging them is a pure function, so that a cluster's faults can be tested without one.
"""

import os
import platform
import resource
import shutil
import statistics
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from cluster.hardware import this_host
from cluster.storage import StorageError, open_store

PACKAGES = ("ray", "torch", "deepspeed", "pyarrow", "numpy", "safetensors", "tokenizers")
PROBE_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Below or beyond which a node is not fit."""

    shm_bytes: int = 2 << 30
    """Of /dev/shm: Ray's object store and the data loaders' buffers lie there; a container's default is 64 MiB."""
    open_files: int = 65_536
    """Files and sockets of one process; a node's raylet has one for each of its workers and neighbours."""
    disk_bytes: int = 20 << 30
    """Free where Ray keeps logs and spills objects."""
    clock_seconds: float = 2.0
    """Between the clocks of two nodes: signatures of S3 allow minutes, logs and time-outs need seconds."""
    slow_share: float = 0.7
    """A node whose median bandwidth is below this share of all nodes' is slow."""
    storage_bytes_per_second: float = 20e6
    """Read and written by one process."""


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """One node as it sees itself."""

    node: str
    """Name or address."""
    versions: Mapping[str, str]
    device: str
    num_devices: int
    wanted_devices: int
    """GPUs that Ray counts on this node."""
    shm_bytes: int
    open_files: int
    disk_bytes: int
    clock_offset: float
    """Seconds ahead of the driver's clock."""
    clock_uncertainty: float = 0.0
    """Half of the time that asking took."""
    storage_rates: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """URI -> bytes/s written and read."""
    storage_problems: Sequence[str] = ()


@dataclass(frozen=True)
class Finding:
    """Something wrong, and what to do about it."""

    node: str
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.node}: {self.what}; {self.advice}"


def gather(
    node: str, wanted_devices: int, session_folder: str, uris: Sequence[str], num_bytes: int
) -> NodeFacts:
    """Look at the node that this runs on; writes and deletes `num_bytes` in each store."""
    host = this_host()
    rates: dict[str, tuple[float, float]] = {}
    problems = []
    for uri in uris:
        try:
            rates[uri] = probe_storage(uri, num_bytes)
        except (StorageError, OSError, ValueError) as error:
            problems.append(f"{uri}: {error}")
    return NodeFacts(
        node=node,
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        device=host.device_name,
        num_devices=host.num_devices,
        wanted_devices=wanted_devices,
        shm_bytes=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        open_files=_open_files(),
        disk_bytes=shutil.disk_usage(session_folder if os.path.isdir(session_folder) else "/").free,
        clock_offset=0.0,  # the one who asks knows when it asked
        storage_rates=rates,
        storage_problems=problems,
    )


def probe_storage(uri: str, num_bytes: int) -> tuple[float, float]:
    """Bytes/s of writing and of reading one object. Raises `StorageError` where either fails or differs."""
    store, path = open_store(uri), f".preflight-{uuid.uuid4().hex}"
    content = os.urandom(num_bytes)
    start = time.perf_counter()
    store.put(path, content)
    written = time.perf_counter()
    try:
        same = store.read(path) == content
        read = time.perf_counter()
    finally:
        store.delete(path)
    if not same:
        raise StorageError(f"{uri} gave back other bytes than were put")
    return num_bytes / (written - start), num_bytes / (read - written)


def judge(facts: Sequence[NodeFacts], limits: Limits) -> Iterator[Finding]:
    """Everything that is wrong with the nodes: each by itself, and between them."""
    yield from _differences(facts)
    for fact in facts:
        if fact.num_devices < fact.wanted_devices:
            yield Finding(
                fact.node,
                f"torch sees {fact.num_devices} of {fact.wanted_devices} GPUs",
                "look at nvidia-smi there, and for a driver older than torch's CUDA",
            )
        yield from _too_small(fact, limits)
        yield from (
            Finding(fact.node, problem, "check address, keys or role, bucket and network policy of this node")
            for problem in fact.storage_problems
        )
    yield from _clocks(facts, limits)


def _differences(facts: Sequence[NodeFacts]) -> Iterator[Finding]:
    for package in sorted({name for fact in facts for name in fact.versions}):
        found = [fact.versions.get(package, "none") for fact in facts]
        usual = statistics.mode(found)
        for fact, here in zip(facts, found, strict=True):
            if here != usual:
                yield Finding(fact.node, f"{package} {here}, elsewhere {usual}", "give all nodes one image")
    devices = [fact.device for fact in facts if fact.num_devices]
    for fact in facts:
        if fact.num_devices and fact.device != (usual := statistics.mode(devices)):
            yield Finding(
                fact.node, f"{fact.device}, elsewhere {usual}", "the slowest GPU sets the pace of all"
            )


def _too_small(fact: NodeFacts, limits: Limits) -> Iterator[Finding]:
    for what, found, least, advice in (
        (
            "shared memory",
            fact.shm_bytes,
            limits.shm_bytes,
            "mount a larger emptyDir of medium Memory at /dev/shm",
        ),
        ("free disk", fact.disk_bytes, limits.disk_bytes, "free some, or give Ray another folder"),
    ):
        if found < least:
            yield Finding(
                fact.node, f"{found / 2**30:.1f} GiB of {what}, less than {least / 2**30:g}", advice
            )
    if fact.open_files < limits.open_files:
        yield Finding(
            fact.node,
            f"{fact.open_files:,} open files allowed, less than {limits.open_files:,}",
            "raise RAY_START_ULIMIT_OPEN_FILES, or the container's limit",
        )
    for uri, (written, read) in fact.storage_rates.items():
        if min(written, read) < limits.storage_bytes_per_second:
            yield Finding(
                fact.node,
                f"{uri} at {written / 1e6:.0f} MB/s written, {read / 1e6:.0f} MB/s read",
                "is the bucket in another region, or throttled?",
            )


def _clocks(facts: Sequence[NodeFacts], limits: Limits) -> Iterator[Finding]:
    middle = statistics.median(fact.clock_offset for fact in facts)
    for fact in facts:
        offset = fact.clock_offset - middle
        if abs(offset) - fact.clock_uncertainty > limits.clock_seconds:
            yield Finding(fact.node, f"its clock is {offset:+.1f} s off", "start chrony or ntpd on the host")


def slow_nodes(rates: Mapping[tuple[str, str], float], limits: Limits) -> Iterator[Finding]:
    """Nodes whose links are slow, from bytes/s of each pair: one bad node makes all of its pairs slow."""
    nodes = sorted({node for pair in rates for node in pair})
    if len(nodes) < 3:  # of two, no one can say which
        return
    medians = {n: statistics.median(rate for pair, rate in rates.items() if n in pair) for n in nodes}
    usual = statistics.median(medians.values())
    for node, found in medians.items():
        if found < limits.slow_share * usual:
            yield Finding(
                node,
                f"{found / 1e9:.2f} GB/s to others, which have {usual / 1e9:.2f}",
                "cordon it: one slow link slows every step of all",
            )


def rounds(number: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of `number` players once, in rounds in which each plays at most once (circle method)."""
    players = list(range(number)) + [-1] * (number % 2)
    half = len(players) // 2
    for _ in range(len(players) - 1):
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in pairs if -1 not in pair]
        players[1:] = [players[-1], *players[1:-1]]


def transports(log: str) -> set[str]:
    """The networks that NCCL says it uses ("IB", "Socket", "AWS Libfabric", …), from its log at level INFO."""
    found = set()
    for line in log.splitlines():
        if "Using network " in line:
            found.add(line.partition("Using network ")[2].strip())
        elif "via NET/" in line:
            found.add(line.partition("via NET/")[2].split("/")[0].split()[0])
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _open_files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (1 << 62) if soft == resource.RLIM_INFINITY else soft
