"""Is this cluster fit for a run? Every node looked at, every pair of nodes measured, before GPUs are paid for days.

    ray job submit --working-dir . -- python cluster/preflight.py --storage s3://bucket/runs

Prints a table and what to do about each fault; exits 1 if there is one. A run looks at its nodes in the same way when
it starts on a cluster, without measuring the network.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster.configuration.config import load_config, run_entry
from cluster.nodes.facts import PROBE_BYTES, judge
from cluster.nodes.fitness import PreflightConfig, judge_network, measure, table
from cluster.nodes.nodes import look_at, staying, witnesses
from cluster.sessions.session import ray_session
from cluster.sessions.workers import shortages


def main(argv: Sequence[str] | None = None) -> None:
    """Check the cluster from the command line."""
    arguments = sys.argv[1:] if argv is None else argv
    config = load_config(PreflightConfig, arguments, description=__doc__ or "").config
    with ray_session(config.cluster), witnesses() as nodes:
        facts, silent = look_at(nodes, config.storage, PROBE_BYTES)
        answered = {fact.node for fact in facts}
        network, left = measure([node for node in nodes if node.name in answered], config)
        lacking = list(shortages(config.cluster, [node.resources for node in staying(nodes)]))
    names = {node.name for node in left}
    facts = [fact for fact in facts if fact.node in names]
    findings = [f"the cluster: {line}" for line in lacking]
    findings += map(str, [*silent, *judge(facts, config.limits), *judge_network(network, config)])
    print(table(facts, network))
    print(*(f"FAULT {finding}" for finding in findings), sep="\n", end="\n" if findings else "")
    print(f"{len(findings)} faults on {len(facts)} nodes" if findings else f"{len(facts)} nodes are fit")
    raise SystemExit(bool(findings))


if __name__ == "__main__":
    run_entry(main)
