"""Whether training workers fit on the nodes, and what is said where they do not."""

import re
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.sessions.workers import ClusterConfig, fitting_workers, piece_shortages, shortages


@pytest.mark.parametrize(
    ("cluster", "nodes", "fitting"),
    [
        (ClusterConfig(num_workers=2, cpus_per_worker=8), [{"CPU": 4.0}] * 4, 0),
        (ClusterConfig(num_workers=4, cpus_per_worker=3), [{"CPU": 4.0}] * 3, 3),
        (
            ClusterConfig(num_workers=8, cpus_per_worker=8, gpus_per_worker=1),
            [{"CPU": 32.0, "GPU": 8.0}, {"CPU": 96.0}],
            4,
        ),
    ],
)
def test_workers_that_fit_into_the_sum_of_the_nodes_and_on_no_node_are_refused_with_what_fits(
    cluster: ClusterConfig, nodes: list[dict[str, float]], fitting: int
) -> None:
    (line,) = shortages(cluster, nodes)
    assert f"{fitting} fit, for a worker lies on one node" in line
    found = re.search(r"at most cluster\.cpus_per_worker=(\S+) fits", line)
    assert found and not list(shortages(replace(cluster, cpus_per_worker=float(found[1])), nodes))


def placements(workers: int, num_nodes: int):
    """Every way to lay workers on nodes, as how many each gets."""
    return (each for each in product(range(workers + 1), repeat=num_nodes) if sum(each) == workers)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=3),
    st.integers(1, 4),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([0.0, 0.25]),
)
def test_workers_fit_where_there_is_a_way_to_lay_them_on_the_nodes_with_room_to_read_and_nowhere_else(
    sizes: list[tuple[int, int]], workers: int, cpus: float, gpus: float, read_cpus: float
) -> None:
    nodes = [{"CPU": float(cpu), "GPU": float(gpu)} for cpu, gpu in sizes]

    def holds(each: tuple[int, ...]) -> bool:
        left = [node["CPU"] - n * cpus for node, n in zip(nodes, each, strict=True)]
        enough = all(n * gpus <= node["GPU"] for node, n in zip(nodes, each, strict=True))
        return enough and min(left) >= 0 and max(left) >= read_cpus

    config = ClusterConfig(num_workers=workers, cpus_per_worker=cpus, gpus_per_worker=gpus)
    fits = any(map(holds, placements(workers, len(nodes))))
    assert (fitting_workers(config, nodes, read_cpus) >= workers) == fits
    assert bool(list(shortages(config, nodes, read_cpus))) != fits


def test_workers_that_leave_no_cpu_for_reads_are_refused_with_what_fits():
    cluster = ClusterConfig(num_workers=2, cpus_per_worker=1.0)
    (problem,) = shortages(cluster, [{"CPU": 2.0}], read_cpus=0.25)
    assert "cluster.cpus_per_worker=0.87" in problem
    fitting = replace(cluster, cpus_per_worker=0.87)
    assert not list(shortages(fitting, [{"CPU": 2.0}], read_cpus=0.25))


def test_more_gpus_than_the_cluster_has_are_refused():
    cluster = ClusterConfig(num_workers=3, gpus_per_worker=1.0)
    (line,) = shortages(cluster, [{"CPU": 8.0, "GPU": 2.0}])
    assert "cluster.gpus_per_worker=1 = 3 GPUs, but the cluster has 2" in line
    assert not list(shortages(cluster, [{"CPU": 3.0, "GPU": 3.0}]))


@pytest.mark.parametrize(
    "wrong",
    [{"threads_per_worker": -2}, {"object_store_bytes": -1}, {"join_seconds": -1.0}, {"num_workers": 0}],
)
def test_numbers_that_no_cluster_has_are_named(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    (line,) = ClusterConfig(**wrong).problems("cluster")  # type: ignore[arg-type]
    assert line.startswith(f"cluster.{name}={value:g} must ")


@given(st.lists(st.integers(1, 64), min_size=1, max_size=4), st.sampled_from([0.3, 1.0, 2.0, 64.0]))
def test_a_piece_of_the_corpus_that_no_node_can_hold_is_refused_with_what_fits(cpus, each):
    nodes = [{"CPU": float(cpu)} for cpu in cpus]
    found = list(piece_shortages(each, nodes))
    assert bool(found) == all(cpu < each for cpu in cpus)  # also where their sum would do
    for line in found:
        assert f"corpus.cpus_per_piece={each:g}" in line
        assert not list(piece_shortages(float(re.search(r"give (\S+):", line)[1]), nodes))
