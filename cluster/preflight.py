"""Is this cluster fit for a run? Every node looked at, every pair of nodes measured, before GPUs are paid for days.

    ray job submit --working-dir . -- python cluster/preflight.py --storage s3://bucket/runs

Prints a table and what to do about each fault; exits 1 if there is one. A run looks at its nodes in the same way when
it starts on a cluster, without measuring the network.
"""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster.config import load_config, run_entry
from cluster.node_facts import (
    PROBE_BYTES,
    Finding,
    Limits,
    NodeFacts,
    delete_tokens,
    judge,
    put_tokens,
    rounds,
    slow_nodes,
    transports,
)
from cluster.session import ClusterConfig, ray_session
from cluster.storage import open_store
from cluster.witness import Witness

SESSION_FOLDER = "/tmp/ray"
"""Where Ray keeps logs and spills, unless it was told otherwise."""
QUICK_BYTES = 1 << 16
CLOCK_READINGS = 5
ENOUGH_TO_START = Limits(
    shm_bytes=256 << 20,  # a container's default is 64 MiB
    open_files=4_096,
    disk_bytes=1 << 30,
    locked_bytes=0,  # a small run does well on sockets
    storage_bytes_per_second=0.0,  # so little data says nothing of a store's speed
)
"""What a run insists on: less than the preflight, for a small run on small nodes is none of its business."""
NODE_SECONDS = 120.0
"""After which a node that does not answer is reported as such."""


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


@dataclass(frozen=True)
class Network:
    """What the nodes measured among themselves, bytes/s."""

    pairs: dict[tuple[str, str], float]
    all_reduce: float
    """Of its bus: 2 (N - 1) / N of the data over the time, as nccl-tests counts; 0: it did not end."""
    transports: frozenset[str]
    broken: tuple[Finding, ...] = ()
    """Pairs that did not reach each other."""


def main(argv: Sequence[str] | None = None) -> None:
    """Check the cluster from the command line."""
    arguments = sys.argv[1:] if argv is None else argv
    config = load_config(PreflightConfig, arguments, description=__doc__ or "").config
    with ray_session(config.cluster), witnesses() as nodes:
        facts, silent = look_at(nodes, config.storage, PROBE_BYTES)
        network = measure_network([node for node in nodes if node.name in {f.node for f in facts}], config)
    findings = [*silent, *judge(facts, config.limits), *judge_network(network, config)]
    print(table(facts, network))
    print(*(f"FAULT {finding}" for finding in findings), sep="\n", end="\n" if findings else "")
    print(f"{len(findings)} faults on {len(facts)} nodes" if findings else f"{len(facts)} nodes are fit")
    raise SystemExit(bool(findings))


def problems_of_nodes(uris: Sequence[str], limits: Limits | None = None) -> list[str]:
    """The short form, for a run's start: a line for each fault of a node. A Ray session must be up.

    Every node must read and write each of `uris`, and see there what this process puts.
    """
    limits = limits or ENOUGH_TO_START
    with witnesses() as nodes:
        facts, silent = look_at(nodes, uris, QUICK_BYTES)
    return [str(finding) for finding in [*silent, *judge(facts, limits)]]


@dataclass(eq=False)
class Node:
    """A living node of the cluster, and the actor that stands on it."""

    name: str
    address: str
    gpus: int
    node_id: str
    witness: Any = None

    def stand(self) -> None:
        """A new witness, instead of one that may hang in a call. It takes no CPU and no GPU: all may be in use."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self.leave()
        here = NodeAffinitySchedulingStrategy(self.node_id, soft=False)
        actor = ray.remote(num_cpus=0, num_gpus=0)(Witness)
        self.witness = actor.options(scheduling_strategy=here).remote(self.gpus > 0)

    def leave(self) -> None:
        import ray

        if self.witness is not None:
            ray.kill(self.witness)


@contextlib.contextmanager
def witnesses() -> Iterator[list[Node]]:
    """An actor on each node for the length of a with-block."""
    import ray

    nodes = []
    for found in (each for each in ray.nodes() if each["Alive"]):
        gpus, address = int(found["Resources"].get("GPU", 0)), found["NodeManagerAddress"]
        nodes.append(Node(f"{address}/{found['NodeID'][:6]}", address, gpus, found["NodeID"]))
    for node in nodes:
        node.stand()
    try:
        yield sorted(nodes, key=lambda node: node.name)
    finally:
        for node in nodes:
            node.leave()


def look_at(
    nodes: Sequence[Node], uris: Sequence[str], num_bytes: int
) -> tuple[list[NodeFacts], list[Finding]]:
    """The facts of every node, and a finding for each that does not answer or that this process could not ask."""
    import ray

    tokens, silent = put_tokens([open_store(uri).uri for uri in uris])
    asked = {
        node.witness.gather.remote(node.name, node.gpus, SESSION_FOLDER, tokens, num_bytes): node
        for node in nodes
    }
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_SECONDS)
    facts = []
    silent += [Finding(asked[each].name, "does not answer", "look at its raylet's log") for each in late]
    for each in done:
        node = asked[each]
        try:
            offset, uncertainty = clock_offset(node)
            facts.append(replace(ray.get(each), clock_offset=offset, clock_uncertainty=uncertainty))
        except ray.exceptions.RayError as error:
            silent.append(Finding(node.name, str(error).splitlines()[-1], "look at its raylet's log"))
    delete_tokens(tokens)
    return sorted(facts, key=lambda fact: fact.node), silent


def clock_offset(node: Node) -> tuple[float, float]:
    """Seconds that a node's clock is ahead of this one's, and how far that may be wrong (Cristian's algorithm)."""
    import ray

    best = (0.0, float("inf"))
    for _ in range(CLOCK_READINGS):
        before = time.time()
        there = ray.get(node.witness.now.remote(), timeout=NODE_SECONDS)
        after = time.time()
        best = min(best, (there - (before + after) / 2, (after - before) / 2), key=lambda reading: reading[1])
    return best


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
        return Network(pairs, 0.0, frozenset(), tuple(broken))
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
        return Network(pairs, 0.0, frozenset(), (broken,))
    share = 2 * (size - 1) / size * config.bandwidth_bytes
    return Network(pairs, share / max(seconds), frozenset(set().union(*map(transports, logs))))


def cut_off(who: str, what: str, error: Exception, config: PreflightConfig) -> Finding:
    late = isinstance(error, TimeoutError)
    why = f"within {config.pair_seconds:g} s" if late else str(error).strip().splitlines()[-1]
    return Finding(
        who,
        f"did not {what}{' ' if late else ': '}{why}",
        "look for a cut link, a security group or a network policy between them; or raise --pair_seconds",
    )


def judge_network(network: Network | None, config: PreflightConfig) -> Iterator[Finding]:
    """Slow nodes, and GPUs joined by plain sockets."""
    if network is None:
        return
    yield from network.broken
    yield from slow_nodes(network.pairs, config.limits)
    if "Socket" in network.transports and not config.allow_sockets:
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


if __name__ == "__main__":
    run_entry(main)
