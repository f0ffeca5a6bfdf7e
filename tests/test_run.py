"""How many workers an elastic run may have on the nodes that are there."""

from cluster.sessions.workers import ClusterConfig
from trainers.pretraining.driver import workers_on


def node(alive: bool = True, **resources: float) -> dict:
    return {"Alive": alive, "Resources": resources}


def test_workers_fit_node_by_node_on_living_nodes_and_up_to_those_configured():
    cluster = ClusterConfig(num_workers=6, min_workers=1, cpus_per_worker=2)
    assert workers_on(cluster, [node(CPU=3), node(CPU=3)]) == 2, "a worker was laid over two nodes"
    assert workers_on(cluster, [node(CPU=4), node(CPU=4, alive=False)]) == 2
    assert workers_on(cluster, [node(CPU=64)]) == 6
    assert workers_on(cluster, []) == 0


def test_with_gpus_the_scarcer_resource_of_a_node_decides():
    cluster = ClusterConfig(num_workers=64, min_workers=1, cpus_per_worker=8, gpus_per_worker=1)
    assert workers_on(cluster, [node(CPU=96, GPU=8), node(CPU=32, GPU=8), node(CPU=32)]) == 8 + 4
