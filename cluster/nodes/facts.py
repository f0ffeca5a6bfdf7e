"""What a node says of itself before a run, and what is wrong with a set of such nodes. No Ray here.

Facts are gathered on the node; judging them is a pure function, so that a cluster's faults can be tested without one.
"""

import contextlib
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

from cluster.hardware.machine import this_host
from cluster.storage.uris import RetryPolicy, StorageError, open_store

PACKAGES = ("ray", "torch", "deepspeed", "pyarrow", "numpy", "safetensors", "tokenizers")
PROBE_BYTES = 8 << 20
# Long enough for a store that is busy, and short enough that a node without a way to it still says so in time.
STORE_POLICY = RetryPolicy(give_up_seconds=30)
STORE_ADVICE = "check address, keys or role, bucket and network policy of this node"
UNSHARED_ADVICE = "use s3:// or gs://, or a folder that every node mounts"
CAP_IPC_LOCK = 14


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Below or beyond which a node is not fit."""

    shm_bytes: int = 2 << 30
    """Of /dev/shm: Ray's object store and the data loaders' buffers lie there; a container's default is 64 MiB."""
    open_files: int = 65_536
    """Files and sockets of one process; a node's raylet has one for each of its workers and neighbours."""
    disk_bytes: int = 20 << 30
    """Free where Ray keeps logs and spills objects."""
    locked_bytes: int = 1 << 30
    """Memory that a process may lock, where GPUs span nodes: adapters for RDMA need theirs locked."""
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
    locked_bytes: int = 1 << 62
    """That a process of this user may lock (RLIMIT_MEMLOCK, or the capability that lifts it)."""
    device_problems: Sequence[str] = ()
    """GPUs that do not compute."""
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
    node: str, wanted_devices: int, session_folder: str, tokens: Mapping[str, str], num_bytes: int
) -> NodeFacts:
    """Look at the node that this runs on; writes and deletes `num_bytes` in each store.

    Args:
        tokens: For each store's URI the name of an object there that the driver put, which this node must see.
    """
    host = this_host()
    rates: dict[str, tuple[float, float]] = {}
    problems = []
    for uri, token in tokens.items():
        try:
            rates[uri] = probe_storage(uri, num_bytes)
            if not open_store(uri, STORE_POLICY).exists(token):
                problems.append(f"{uri} is not shared: what the driver put there is not seen")
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
        locked_bytes=_locked_bytes(),
        device_problems=touch([f"cuda:{index}" for index in range(host.num_devices)]),
        clock_offset=0.0,  # the one who asks knows when it asked
        storage_rates=rates,
        storage_problems=problems,
    )


def touch(devices: Sequence[str]) -> list[str]:
    """A line for each device that cannot be computed on: seeing one does not say that it works."""
    import torch

    problems = []
    for device in devices:
        try:
            found = float(torch.ones(1_024, device=device).sum())
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            problems.append(f"{device} cannot be used: {str(error).splitlines()[0]}")
        else:
            if found != 1_024:
                problems.append(f"{device} adds 1,024 ones up to {found:g}")
    return problems


def put_tokens(uris: Sequence[str]) -> tuple[dict[str, str], list[Finding]]:
    """An object in each store, for the nodes to look for: URI -> its name, and what could not be written."""
    tokens, findings = {}, []
    for uri in uris:
        name = f".preflight-{uuid.uuid4().hex}"
        try:
            open_store(uri, STORE_POLICY).put(name, b"written by the driver")
            tokens[uri] = name
        except OSError as error:
            findings.append(Finding("the driver", f"{uri}: {error}", STORE_ADVICE))
    return tokens, findings


def delete_tokens(tokens: Mapping[str, str]) -> None:
    for uri, name in tokens.items():
        with contextlib.suppress(OSError):  # a store that is out of reach was reported already
            open_store(uri, STORE_POLICY).delete(name)


def probe_storage(uri: str, num_bytes: int) -> tuple[float, float]:
    """Bytes/s of writing and of reading one object. Raises `StorageError` where either fails or differs."""
    store, path = open_store(uri, STORE_POLICY), f".preflight-{uuid.uuid4().hex}"
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
            Finding(fact.node, problem, UNSHARED_ADVICE if "not shared" in problem else STORE_ADVICE)
            for problem in fact.storage_problems
        )
        yield from (Finding(fact.node, problem, "look at dmesg for Xid") for problem in fact.device_problems)
    yield from _locked(facts, limits)
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


def _locked(facts: Sequence[NodeFacts], limits: Limits) -> Iterator[Finding]:
    with_gpus = [fact for fact in facts if fact.wanted_devices]
    for fact in with_gpus if len(with_gpus) > 1 else ():
        if fact.locked_bytes < limits.locked_bytes:
            yield Finding(
                fact.node,
                f"{fact.locked_bytes / 2**20:,.0f} MiB of memory may be locked, less than "
                f"{limits.locked_bytes / 2**20:,.0f}: RDMA between nodes fails or falls back to sockets",
                "set LimitMEMLOCK=infinity for containerd on the host; IPC_LOCK does not reach a user but root",
            )


def _clocks(facts: Sequence[NodeFacts], limits: Limits) -> Iterator[Finding]:
    middle = statistics.median([fact.clock_offset for fact in facts] or [0.0])
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
                f"{found / 1e9:.3g} GB/s to others, which have {usual / 1e9:.3g}",
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


def _locked_bytes() -> int:
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        found = next((line for line in status if line.startswith("CapEff:")), "CapEff: 0")
        if int(found.split()[1], 16) >> CAP_IPC_LOCK & 1:
            return 1 << 62
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return (1 << 62) if soft == resource.RLIM_INFINITY else soft
