"""The nodes of a cluster, and a witness on each: who is asked, what they answer, and who is gone before the end."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.nodes.facts import Finding, NodeFacts, delete_tokens, put_tokens
from cluster.nodes.witness import Witness
from cluster.sessions.session import staying_nodes
from cluster.sessions.workers import Resources
from cluster.storage.uris import open_store

SESSION_FOLDER = "/tmp/ray"
"""Where Ray keeps logs and spills, unless it was told otherwise."""
CLOCK_READINGS = 5
NODE_SECONDS = 120.0
"""After which a node that does not answer is reported as such."""
GIVEN_UP_SECONDS = 60.0
"""Until then Ray has given up a node that lost its power: 30 s by default, and more while it is busy."""


@dataclass(eq=False)
class Node:
    """A node of the cluster that stays, and the actor that stands on it."""

    name: str
    address: str
    resources: Resources
    node_id: str
    witness: Any = None

    @property
    def gpus(self) -> int:
        return int(self.resources.get("GPU", 0))

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
    """An actor on each node that does not drain, for the length of a with-block."""
    nodes = []
    for found in staying_nodes():
        address = found["NodeManagerAddress"]
        nodes.append(Node(f"{address}/{found['NodeID'][:6]}", address, found["Resources"], found["NodeID"]))
    for node in nodes:
        node.stand()
    try:
        yield sorted(nodes, key=lambda node: node.name)
    finally:
        for node in nodes:
            node.leave()


def staying(
    nodes: Sequence[Node], lost: Sequence[Node] = (), while_: Callable[[Iterable[bool]], bool] = any
) -> list[Node]:
    """Those of the nodes that live and do not drain.

    A node that lost its power is listed until Ray gives it up: so long it is waited while any (or all) that may be
    `lost` are listed.
    """
    ends = time.monotonic() + GIVEN_UP_SECONDS
    while True:
        there = {node["NodeID"] for node in staying_nodes()}
        if not (lost and while_(node.node_id in there for node in lost)) or time.monotonic() > ends:
            return [node for node in nodes if node.node_id in there]
        time.sleep(0.5)


def look_at(
    nodes: Sequence[Node], uris: Sequence[str], num_bytes: int
) -> tuple[list[NodeFacts], list[Finding]]:
    """The facts of every node, and a finding for each that does not answer or that this process could not ask.

    A node that goes meanwhile is in neither: whether those that stay are enough is another question.
    """
    import ray

    tokens, silent = put_tokens([open_store(uri).uri for uri in uris])
    asked = {
        node.witness.gather.remote(node.name, node.gpus, SESSION_FOLDER, tokens, num_bytes): node
        for node in nodes
    }
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_SECONDS) if asked else ([], [])
    facts: dict[Node, NodeFacts] = {}
    failed = dict.fromkeys((asked[each] for each in late), "does not answer")
    lost = []
    for each in done:
        node = asked[each]
        try:
            offset, uncertainty = clock_offset(node)
            facts[node] = replace(ray.get(each), clock_offset=offset, clock_uncertainty=uncertainty)
        except ray.exceptions.RayError as error:
            failed[node] = last_line(error)
            if may_be_gone(error):
                lost.append(node)
    delete_tokens(tokens)
    stay = staying(nodes, lost)
    silent += [
        Finding(each.name, failed[each], "look at its raylet's log") for each in stay if each in failed
    ]
    return [facts[each] for each in stay if each in facts], silent


def may_be_gone(error: Exception) -> bool:
    """Whether an actor's error can mean that its node is gone: it is not one of making the actor."""
    from ray.exceptions import ActorUnschedulableError, NodeDiedError, RayActorError

    if isinstance(error, RayActorError):
        return not error.actor_init_failed
    return isinstance(error, ActorUnschedulableError | NodeDiedError)


def last_line(error: Exception) -> str:
    """Where Ray's errors, which hold a traceback, say what happened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


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
