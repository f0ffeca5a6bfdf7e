"""What the preflight finds: by pure judgement of planted faults, and on a real cluster of two nodes."""

import ast
import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.nodes.facts import Limits, NodeFacts, judge, probe_storage, rounds, slow_nodes, touch, transports
from cluster.nodes.fitness import Network, PreflightConfig, judge_network
from cluster.sessions.session import PROJECT

GOOD = NodeFacts(
    node="a",
    versions={"python": "3.11.7", "torch": "2.13.0"},
    device="NVIDIA H100",
    num_devices=8,
    wanted_devices=8,
    shm_bytes=1 << 38,
    open_files=65_536,
    disk_bytes=1 << 40,
    clock_offset=0.01,
)
NODES = [GOOD, replace(GOOD, node="b"), replace(GOOD, node="c")]
FAULTS = {
    "another-version": ({"versions": {"python": "3.11.7", "torch": "2.12.0"}}, "torch 2.12.0"),
    "a-missing-gpu": ({"num_devices": 7}, "7 of 8 GPUs"),
    "another-gpu": ({"device": "NVIDIA A100"}, "A100"),
    "small-shm": ({"shm_bytes": 64 << 20}, "shared memory"),
    "a-dead-gpu": ({"device_problems": ("cuda:3 cannot be used: ECC error",)}, "cuda:3"),
    "memory-that-may-not-be-locked": ({"locked_bytes": 8 << 20}, "8 MiB of memory may be locked"),
    "few-files": ({"open_files": 1024}, "1,024 open files"),
    "full-disk": ({"disk_bytes": 1 << 30}, "free disk"),
    "wrong-clock": ({"clock_offset": 60.0}, "clock"),
    "slow-store": ({"storage_rates": {"s3://b": (1e6, 1e6)}}, "s3://b"),
    "no-store": ({"storage_problems": ("s3://b: 403",)}, "403"),
}


def test_equal_healthy_nodes_have_no_fault() -> None:
    assert list(judge(NODES, Limits())) == []


def test_no_node_that_answered_is_no_fault_of_any() -> None:
    assert list(judge([], Limits())) == [], "each that did not answer has a finding already"


@pytest.mark.parametrize("what", FAULTS)
def test_a_faulty_node_is_named_with_its_fault_and_advice(what: str) -> None:
    changes, words = FAULTS[what]
    findings = list(judge([*NODES, replace(GOOD, node="bad", **changes)], Limits()))
    assert [finding.node for finding in findings] == ["bad"]
    assert words in findings[0].what
    assert findings[0].advice


def test_locked_memory_matters_only_where_gpus_span_nodes() -> None:
    little = replace(GOOD, locked_bytes=8 << 20)
    assert not list(judge([little], Limits()))
    assert not list(judge([replace(f, num_devices=0, wanted_devices=0) for f in (little, GOOD)], Limits()))


def test_a_device_that_is_seen_and_cannot_be_used_is_named() -> None:
    assert touch(["cpu"]) == []
    (problem,) = touch(["cpu", "cuda:99"])
    assert problem.startswith("cuda:99 cannot be used")


def test_a_clock_read_slowly_is_not_called_wrong() -> None:
    assert not list(
        judge([*NODES, replace(GOOD, node="far", clock_offset=3.0, clock_uncertainty=2.0)], Limits())
    )


@given(st.integers(3, 12), st.integers(0, 11))
def test_the_slow_node_is_named_and_no_other(number: int, slow: int) -> None:
    nodes = [f"n{index:02}" for index in range(number)]
    bad = nodes[slow % number]
    rates = {pair: 1e9 if bad in pair else 1e10 for pair in combinations(nodes, 2)}
    assert [finding.node for finding in slow_nodes(rates, Limits())] == [bad]


@given(st.integers(2, 40))
def test_every_pair_meets_once_and_nobody_plays_twice_in_a_round(number: int) -> None:
    played = list(rounds(number))
    assert sorted(pair for each in played for pair in each) == list(combinations(range(number), 2))
    for each in played:
        busy = [player for pair in each for player in pair]
        assert len(busy) == len(set(busy))


def test_nccls_network_is_read_from_its_log() -> None:
    # Lines as NCCL 2.2x writes them; its documentation names the first for a check of the fabric.
    assert transports("host:1:9 [0] NCCL INFO Using network Socket\n") == {"Socket"}
    assert transports("x NCCL INFO Using network AWS Libfabric") == {"AWS Libfabric"}
    assert transports("x NCCL INFO Channel 00/0 : 1[0] -> 0[0] [receive] via NET/IB/0/GDRDMA") == {"IB"}
    assert transports("nothing") == set()


@pytest.mark.parametrize(
    ("used", "by_nccl", "words"),
    [
        ({"Socket"}, True, "by plain sockets"),
        ({"IB", "Socket"}, True, "by plain sockets"),
        (set(), True, "does not say by which network"),
        ({"IB"}, True, None),
        (set(), False, None),
    ],
)
def test_gpus_joined_by_sockets_or_by_who_knows_what_are_a_fault_unless_that_is_accepted(
    used: set[str], by_nccl: bool, words: str | None
) -> None:
    network = Network({("a", "b"): 1e9}, 1e9, frozenset(used), by_nccl)
    found = list(judge_network(network, PreflightConfig()))
    assert [words in finding.what for finding in found if words] == [True] * bool(words)
    assert bool(found) == bool(words)
    assert not list(judge_network(network, PreflightConfig(allow_sockets=True)))


def test_probing_a_store_leaves_nothing_behind(tmp_path: Path) -> None:
    assert min(probe_storage(str(tmp_path), 1 << 16)) > 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


CLUSTER = """
import os, sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "object_store_memory": 100 << 20}
cluster = Cluster(initialize_head=True, head_node_args=node | {"num_gpus": int(os.environ["GPUS"])})
cluster.add_node(**node)
"""
MEASURE = """
from cluster.preflight import main
main(["--cluster.address", cluster.address, *sys.argv[1:]])
"""
# Ray's workers have another working folder than the driver: a path below it is what an unshared disk is.
BUSY = """
import os, ray, time
from cluster.nodes.fitness import problems_of_nodes
from cluster.sessions.session import ray_session
from cluster.sessions.workers import ClusterConfig

class Training:
    def steps(self):
        return 1

    def asks(self):
        return os.environ["RAY_API_SERVER_ADDRESS"]

with ray_session(ClusterConfig(address=cluster.address)):
    training = ray.remote(num_cpus=1, num_gpus=2)(Training).remote()
    assert ray.get(training.steps.remote()) == 1
    assert ray.get(training.asks.remote()) == cluster.address, "and not another Ray of this machine"
    places = ["/proc/self/cwd/unshared", sys.argv[1]]
    print(*problems_of_nodes(ClusterConfig(address=cluster.address), places), sep="\\n")
"""
CUT = """
import ray, time
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from cluster.nodes.nodes import witnesses
from cluster.nodes.fitness import PreflightConfig, judge_network, measure_network
from cluster.sessions.session import ray_session
from cluster.sessions.workers import ClusterConfig
from cluster.nodes.witness import Witness

class Deaf(Witness):
    def exchange(self, *arguments):
        time.sleep(3600)

cluster.add_node(**node)
config = PreflightConfig(bandwidth_bytes=1 << 20, pair_seconds=25)
with ray_session(ClusterConfig(address=cluster.address)), witnesses() as nodes:
    nodes[0].leave()
    here = NodeAffinitySchedulingStrategy(nodes[0].node_id, soft=False)
    nodes[0].witness = ray.remote(num_cpus=0)(Deaf).options(scheduling_strategy=here).remote(False)
    network = measure_network(nodes, config)
    print("NODES", *(node.name for node in nodes))
    print("MEASURED", len(network.pairs))
    print(*judge_network(network, config), sep="\\n")
"""
GOING = """
import signal
from dataclasses import replace
import ray
from ray._raylet import GcsClient
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from cluster.nodes import nodes
from cluster.nodes.fitness import problems_of_nodes
from cluster.sessions.session import draining_nodes, ray_session
from cluster.sessions.workers import ClusterConfig
from cluster.nodes.witness import Witness

class Dying(Witness):
    def gather(self, name, *arguments):
        if name.endswith(doomed[:6]):
            os.kill(os.getppid(), signal.SIGKILL)  # the node's raylet
        return super().gather(name, *arguments)

class Broken(Witness):
    def __init__(self, on_gpu):
        raise ImportError("no torch on this node")

drained, doomed = (cluster.add_node(**node).node_id for _ in range(2))
elastic = ClusterConfig(address=cluster.address, num_workers=4, min_workers=2)
with ray_session(elastic):
    there = NodeAffinitySchedulingStrategy(drained, soft=False)
    busy = ray.remote(num_cpus=1)(Witness).options(scheduling_strategy=there).remote(False)
    ray.get(busy.now.remote())  # else the node would be gone at once
    reason, no_end = 2, 0  # preemption, and no time at which the node is gone
    assert GcsClient(cluster.address).drain_node(drained, reason, "told to go", no_end)[0]
    assert draining_nodes() == {drained}
    nodes.Witness = Dying
    print("ELASTIC", problems_of_nodes(elastic, []))
    nodes.Witness = Witness
    print("FIXED", problems_of_nodes(replace(elastic, min_workers=0), []))
    nodes.Witness = Broken
    print("BROKEN", problems_of_nodes(elastic, []))
"""


def on_two_nodes(script: str, *arguments: str, gpus: int = 0) -> subprocess.CompletedProcess[str]:
    pretended = ",".join(str(number) for number in range(90, 90 + gpus))  # no machine of ours has these
    own = {"PYTHONPATH": str(PROJECT), "GPUS": str(gpus)}
    environment = os.environ | own | {"CUDA_VISIBLE_DEVICES": pretended}
    command = [sys.executable, "-c", CLUSTER + script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.cluster
def test_two_real_nodes_are_measured_and_a_store_that_cannot_be_written_is_a_fault(tmp_path: Path) -> None:
    relaxed = ["--limits.shm_bytes", "1", "--limits.open_files", "1", "--limits.disk_bytes", "1"]
    relaxed += ["--limits.storage_bytes_per_second", "1", "--bandwidth_bytes", str(1 << 20)]
    unusable = tmp_path / "file"
    unusable.write_text("not a folder")
    good = on_two_nodes(MEASURE, *relaxed, "--storage", f'["{tmp_path / "store"}"]')
    assert good.returncode == 0, good.stdout + good.stderr
    assert "2 nodes are fit" in good.stdout
    assert "all-reduce over all" in good.stdout
    bad = on_two_nodes(MEASURE, *relaxed, "--storage", f'["{unusable / "inside"}"]')
    assert bad.returncode == 1, bad.stdout + bad.stderr
    assert "FAULT the driver" in bad.stdout


@pytest.mark.cluster
def test_each_node_below_a_limit_is_a_fault_and_a_cluster_without_all_its_workers_is_not_fit(
    tmp_path: Path,
) -> None:
    absurd = [f"--limits.{name}" for name in ("shm_bytes", "open_files", "disk_bytes")]
    arguments = [word for key in absurd for word in (key, str(1 << 50))]
    arguments += ["--limits.storage_bytes_per_second", "1e15", "--bandwidth_bytes", "0"]
    arguments += ["--cluster.num_workers", "3", "--cluster.join_seconds", "0"]
    found = on_two_nodes(MEASURE, *arguments, "--storage", f'["{tmp_path}"]')
    assert found.returncode == 1, found.stdout + found.stderr
    assert "node " in found.stdout, found.stdout + found.stderr
    header, *lines = found.stdout[found.stdout.index("node ") :].splitlines()
    rows = [line.split() for line in lines if "MB/s" in line and not line.startswith("FAULT")]
    assert len(rows) == 2 and all(len(row) == len(header.split()) for row in rows), found.stdout
    for name, *_ in rows:
        mine = [line for line in lines if line.startswith(f"FAULT {name}: ")]
        words = ("of shared memory, less than", "open files allowed", "of free disk", "MB/s written")
        assert [sum(word in line for line in mine) for word in words] == [1] * 4, found.stdout
    (lacking,) = [line for line in lines if line.startswith("FAULT the cluster: ")]
    assert "cluster.num_workers=3 x cluster.cpus_per_worker=1 = 3 CPUs, but the cluster has 2" in lacking
    assert lines[-1] == "9 faults on 2 nodes"


@pytest.mark.cluster
def test_nodes_that_drain_or_die_are_no_faults_where_enough_stay_and_a_broken_image_is_named() -> None:
    result = on_two_nodes(GOING)
    assert result.returncode == 0, result.stdout + result.stderr
    said = dict(line.split(" ", 1) for line in result.stdout.splitlines() if " " in line)
    assert said["ELASTIC"] == "[]"
    (lacking,) = ast.literal_eval(said["FIXED"])
    assert "cluster.num_workers=4" in lacking and "the cluster has 2" in lacking
    broken = ast.literal_eval(said["BROKEN"])
    assert len(broken) == 2 and all("no torch on this node" in line for line in broken)


@pytest.mark.cluster
def test_nodes_with_busy_gpus_are_looked_at_all_gpus_counted_and_an_unshared_store_is_a_fault(
    tmp_path: Path,
) -> None:
    result = on_two_nodes(BUSY, str(tmp_path / "shared"), gpus=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("torch sees 0 of 2 GPUs") == 1
    assert result.stdout.count("/proc/self/cwd/unshared is not shared") == 2
    assert "does not answer" not in result.stdout
    assert str(tmp_path / "shared") not in result.stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.cluster
def test_a_cut_link_ends_as_a_finding_that_names_the_pair_and_the_others_are_measured() -> None:
    result = on_two_nodes(CUT)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    names = next(line for line in lines if line.startswith("NODES")).split()[1:]
    assert "MEASURED 2" in lines
    (finding,) = [line for line in lines if "did not exchange data" in line]
    assert names[0] in finding
    assert sum(name in finding for name in names) == 2
