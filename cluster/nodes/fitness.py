"""Whether a cluster's nodes and network are fit for a run: measured and judged."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cluster.nodes.facts import Finding, Limits, NodeFacts, judge, rounds, slow_nodes, transports
from cluster.nodes.nodes import Node, last_line, look_at, staying, witnesses
from cluster.sessions.workers import ClusterConfig, shortages
from cluster.storage.uris import open_store

QUICK_BYTES = 1 << 16


ENOUGH_TO_START = Limits(
    shm_bytes=256 << 20,  # a container's default is 64 MiB
    open_files=4_096,
    disk_bytes=1 << 30,
    locked_bytes=0,  # a small run does well on sockets
    storage_bytes_per_second=0.0,  # so little data says nothing of a store's speed
)
"""What a run insists on: less than the preflight, for a small run on small nodes is none of its business."""


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """What is asked of the cluster."""

    storage: tuple[str, ...] = ()
    """URIs that every node must read and write."""
    bandwidth_bytes: int = 256 << 20
    """Sent between each pair of nodes, and reduced over all; 0: no measurement of the network."""
    pair_seconds: float = 60.0
    """After which a pair of nodes that has not exchanged that is reported as cut off."""
    allow_sockets: bool = False
    """Accept GPUs of several nodes that NCCL joins by plain sockets."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    limits: Limits = field(default_factory=Limits)

    def problems(self, at: str) -> Iterator[str]:
        if self.bandwidth_bytes < 0:
            yield f"bandwidth_bytes={self.bandwidth_bytes} must not be negative; 0 measures no network"
        if self.pair_seconds <= 0:
            yield f"pair_seconds={self.pair_seconds:g} must be positive"
        for uri in self.storage:
            try:
                open_store(uri)
            except ValueError as unusable:
                yield f"storage: {unusable}"


@dataclass(frozen=True)
class Network:
    """What the nodes measured among themselves, bytes/s."""

    pairs: dict[tuple[str, str], float]
    all_reduce: float
    """Of its bus: 2 (N - 1) / N of the data over the time, as nccl-tests counts; 0: it did not end."""
    transports: frozenset[str]
    """By which NCCL says that it joins them."""
    by_nccl: bool = False
    broken: tuple[Finding, ...] = ()
    """Pairs that did not reach each other."""


def problems_of_nodes(cluster: ClusterConfig, uris: Sequence[str], read_cpus: float = 0.0) -> list[str]:
    """The short form, for a run's start: a line for each fault of a node, and for what the nodes that stay lack.

    Every node must read and write each of `uris`, and see there what this process puts. A Ray session must be up.
    """
    with witnesses() as nodes:
        facts, silent = look_at(nodes, uris, QUICK_BYTES)
        lacking = list(shortages(cluster, [node.resources for node in staying(nodes)], read_cpus))
    return [*lacking, *map(str, [*silent, *judge(facts, ENOUGH_TO_START)])]


def measure(nodes: Sequence[Node], config: PreflightConfig) -> tuple[Network | None, Sequence[Node]]:
    """The network among the nodes that stay, and those: where one goes meanwhile, it is measured anew without it."""
    while True:
        network = measure_network(nodes, config)
        left = staying(nodes, nodes if network and network.broken else (), all)
        if len(left) == len(nodes):
            return network, left
        nodes = left


def measure_network(nodes: Sequence[Node], config: PreflightConfig) -> Network | None:
    """Bandwidth between every pair of nodes and over all; among the GPU nodes alone where there are any."""
    members = [node for node in nodes if node.gpus] or list(nodes)
    if len(members) < 2 or not config.bandwidth_bytes:
        return None
    pairs: dict[tuple[str, str], float] = {}
    broken: list[Finding] = []
    failed: Counter[str] = Counter()
    for played in rounds(len(members)):
        both = [(members[a], members[b]) for a, b in played]
        # A node that two others did not reach is out: each further try would cost `pair_seconds`.
        both = [(a, b) for a, b in both if max(failed[a.name], failed[b.name]) < 2]
        for (a, b), found in measure_pairs(both, config).items():
            if isinstance(found, Finding):
                broken.append(found)
                failed.update([a.name, b.name])
            else:
                pairs[a.name, b.name] = found
    if broken:
        return Network(pairs, 0.0, frozenset(), broken=tuple(broken))
    return measure_all(members, pairs, config)


def measure_pairs(
    pairs: Sequence[tuple[Node, Node]], config: PreflightConfig
) -> dict[tuple[Node, Node], float | Finding]:
    """Bytes/s of each pair, all pairs at once, or that it did not reach each other in time."""
    import ray

    calls = {}
    for a, b in pairs:
        port = a.witness.free_port.remote()
        calls[a, b] = [
            node.witness.exchange.remote(a.address, port, rank, config.bandwidth_bytes, config.pair_seconds)
            for rank, node in enumerate((a, b))
        ]
    ends = time.monotonic() + config.pair_seconds
    found: dict[tuple[Node, Node], float | Finding] = {}
    for (a, b), both in calls.items():
        try:
            seconds = max(ray.get(both, timeout=max(0.0, ends - time.monotonic())))
            found[a, b] = 2 * config.bandwidth_bytes / seconds
        except ray.exceptions.RayError as error:
            found[a, b] = cut_off(f"{a.name} and {b.name}", "exchange data", error, config)
            a.stand()
            b.stand()
    return found


def measure_all(
    members: Sequence[Node], pairs: dict[tuple[str, str], float], config: PreflightConfig
) -> Network:
    """The all-reduce over all nodes, beside what the pairs measured."""
    import ray

    first, size = members[0], len(members)
    port = first.witness.free_port.remote()
    asked = (first.address, port), (size, config.bandwidth_bytes, config.pair_seconds)
    calls = [node.witness.all_reduce.remote(*asked[0], rank, *asked[1]) for rank, node in enumerate(members)]
    try:
        seconds, logs = zip(*ray.get(calls, timeout=config.pair_seconds), strict=True)
    except ray.exceptions.RayError as error:
        broken = cut_off("all nodes", "end an all-reduce", error, config)
        return Network(pairs, 0.0, frozenset(), broken=(broken,))
    share = 2 * (size - 1) / size * config.bandwidth_bytes
    used = frozenset(set().union(*map(transports, logs)))
    return Network(pairs, share / max(seconds), used, by_nccl=first.gpus > 0)


def cut_off(who: str, what: str, error: Exception, config: PreflightConfig) -> Finding:
    late = isinstance(error, TimeoutError)
    why = f"within {config.pair_seconds:g} s" if late else last_line(error)
    return Finding(
        who,
        f"did not {what}{' ' if late else ': '}{why}",
        "look for a cut link, a security group or a network policy between them; or raise --pair_seconds",
    )


def judge_network(network: Network | None, config: PreflightConfig) -> Iterator[Finding]:
    """Slow nodes, and GPUs joined by plain sockets, or by what NCCL does not say."""
    if network is None:
        return
    yield from network.broken
    yield from slow_nodes(network.pairs, config.limits)
    if config.allow_sockets:
        return
    if network.by_nccl and not network.transports:
        yield Finding(
            "all nodes",
            "NCCL's log does not say by which network it joins GPUs of several nodes: it may be plain sockets",
            'look at it with NCCL_DEBUG=INFO, "Using network"; if it is the fabric, --allow-sockets true',
        )
    if "Socket" in network.transports:
        yield Finding(
            "all nodes",
            "NCCL joins GPUs of several nodes by plain sockets",
            "add the fabric's component to the overlay, its library to the image; or --allow-sockets true",
        )


def table(facts: Sequence[NodeFacts], network: Network | None) -> str:
    """One line a node."""
    lines = [
        f"{'node':24} {'GPUs':>4} {'shm':>8} {'files':>9} {'disk':>8} {'clock':>9} {'to others':>10}  write/read"
    ]
    for fact in facts:
        mine = sorted(rate for pair, rate in (network.pairs if network else {}).items() if fact.node in pair)
        rate = f"{mine[len(mine) // 2] / 1e9:.3g} GB/s" if mine else "-"
        stores = ", ".join(f"{w / 1e6:.0f}/{r / 1e6:.0f} MB/s" for w, r in fact.storage_rates.values()) or "-"
        lines.append(
            f"{fact.node:24} {fact.num_devices:4} {fact.shm_bytes / 2**30:7.1f}G {min(fact.open_files, 10**8):9,} "
            f"{fact.disk_bytes / 2**30:7.0f}G {fact.clock_offset:+8.3f}s {rate:>10}  {stores}"
        )
    if network:
        by = f" by {', '.join(sorted(network.transports))}" if network.transports else ""
        speed = f"{network.all_reduce / 1e9:.3g} GB/s of the bus" if network.all_reduce else "not measured"
        lines.append(f"all-reduce over all: {speed}{by}")
    return "\n".join(lines)
