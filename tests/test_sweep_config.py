"""Room for trials: none starts that would wait for ever for what another holds."""

import pytest
import yaml

from cluster.configuration.config import from_dict
from cluster.console.errors import ConfigError
from cluster.sessions.session import PROJECT
from tune.search.config import Room, SweepConfig, unshared_problem
from tune.search.space import parse_space, with_point


@pytest.mark.parametrize(
    ("room", "nodes", "most", "fitting"),
    [
        (Room(1, 2, 0), [{"CPU": 5}], 0, 2),
        (
            Room(1, 2, 0),
            [{"CPU": 3}, {"CPU": 3}, {"CPU": 3}],
            0,
            3,
        ),  # 9 CPUs in all hold four, no node holds two
        (Room(3, 2, 0), [{"CPU": 20}], 0, 3),
        (Room(2, 4, 0), [{"CPU": 7}, {"CPU": 7}, {"CPU": 7}], 0, 1),
        (Room(1, 2, 1), [{"CPU": 64, "GPU": 2}, {"CPU": 64}], 0, 2),
        (Room(2, 0.75, 0, reads=0.5), [{"CPU": 4}], 0, 2),
        (Room(2, 1, 0, reads=0.5), [{"CPU": 4}], 0, 1),
        (Room(1, 0.5, 0), [{"CPU": 4}], 3, 3),
    ],
)
def test_as_many_trials_run_at_a_time_as_have_room_on_single_nodes(room, nodes, most, fitting):
    assert room.on(nodes, most) == fitting


@pytest.mark.parametrize(
    ("room", "nodes", "named"),
    [
        (Room(1, 64, 0), [{"CPU": 4}], r"1 x \(64 CPUs\).*room for 0 such workers \(1 node: 4 CPUs in all\)"),
        (Room(1, 3, 0), [{"CPU": 2}, {"CPU": 2}], "2 nodes: 4 CPUs in all"),
        (Room(2, 1, 1), [{"CPU": 9, "GPU": 1}], r"2 x \(1 CPUs and 1 GPU\).*1 GPUs\)"),
    ],
)
def test_a_trial_that_no_node_has_room_for_is_refused(room, nodes, named):
    with pytest.raises(ConfigError, match=named):
        room.on(nodes)


def test_a_folder_of_one_machine_is_refused_on_several_nodes():
    uris = {"sweep.storage": "file:///sweeps", "base.backbone.uri": "s3://bucket/model"}
    problem = unshared_problem(uris, [{"CPU": 2.0}] * 2)
    assert problem and "sweep.storage=file:///sweeps" in problem and "bucket" not in problem
    assert unshared_problem(uris, [{"CPU": 2.0}]) is None
    assert unshared_problem({"sweep.storage": "s3://bucket"}, [{"CPU": 2.0}] * 2) is None


def test_a_trial_of_the_preset_has_a_checkpoint_to_go_on_from():
    content = yaml.safe_load((PROJECT / "tune" / "configs" / "movies.yaml").read_text())
    content["base"]["backbone"] = {"uri": "model"}
    config = from_dict(SweepConfig, content)
    for _, _, point in parse_space(config.space, config.base).corners():
        trial = with_point(config.base, point)
        assert trial.checkpoint.every_steps < 0.6 * trial.batch.steps(trial.batch.label_budget)
