"""An encoder through the entry that users call: the same command, laws and report as for a decoder."""

import json

import pytest

from cluster.storage.uris import open_store
from tests.small_run import SmallRun, kill_tree, put_corpus, steps_by_number, wait_for_step

pytestmark = pytest.mark.cluster

STEPS = 40
SETTINGS = {
    "run.steps": STEPS,
    "objective.kind": "masked_next_sentence",
    "model.attention": "bidirectional",
    "model.positions": "learned",
    "model.num_token_types": 2,
    "model.norm": "layernorm",
    "model.norm_place": "post",
    "model.activation": "gelu",
    "model.biases": "true",
    "model.head": "transform",
    "model.pair_head": "true",
    "model.tie_embeddings": "true",
    "validation.every_steps": 20,
}


def started(run: SmallRun, name: str, **changes):
    settings = {key.replace(".", "__"): value for key, value in SETTINGS.items()}
    return run.start(run__name=name, **settings, **changes)


def finished(run: SmallRun, name: str, **changes):
    assert run.finish(started(run, name, **changes)) == 0, run.output()
    return open_store(f"{run.root}/runs/{name}")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    run = SmallRun(str(folder), folder / "log.txt")
    put_corpus(open_store(f"{run.root}/raw"))
    return run


@pytest.fixture(scope="module")
def alone(run):
    """A run by one worker."""
    return finished(run, "alone")


def test_one_command_goes_from_raw_text_to_a_judged_encoder(run, alone):
    test, baselines = json.loads(alone.read("test.json")), json.loads(alone.read("baselines.json"))
    measured = {"masked_loss", "masked_accuracy", "next_sentence_loss", "next_sentence_accuracy"}
    assert measured <= set(test) and "bits_per_byte" not in test
    assert 0 < test["masked_accuracy"] < 1 and 0.3 < test["next_sentence_accuracy"] < 1
    assert {"masked_loss", "masked_accuracy", "next_sentence_accuracy"} == set(baselines["test"])
    report = alone.read("report.html").decode()
    assert "masked accuracy" in report and "6-gram" not in report
    losses = [record["loss"] for _, record in sorted(steps_by_number(alone).items())]
    assert losses[-1] < losses[0]


def test_rows_pairs_and_losses_do_not_depend_on_the_number_of_workers(run, alone):
    """Laws L1 and L5: the digest covers the framed tokens, the loss the masks."""
    shared = steps_by_number(finished(run, "shared", cluster__num_workers=2))
    for step, record in steps_by_number(alone).items():
        assert shared[step]["digest"] == record["digest"]
        for key in ("loss", "masked_loss", "next_sentence_loss"):
            assert shared[step][key] == pytest.approx(record[key], rel=1e-3, abs=1e-3), (step, key)


def test_a_killed_encoder_goes_on_with_the_rows_and_losses_of_an_unbroken_run(run, alone):
    """Laws L2 and L3, of pairs and masks too."""
    killed = open_store(f"{run.root}/runs/killed")
    process = started(run, "killed")
    wait_for_step(killed, 12, process)
    kill_tree(process.pid)
    process.wait()
    resumed = steps_by_number(finished(run, "killed"))
    expected = steps_by_number(alone)
    assert resumed.keys() == expected.keys()
    for step, record in expected.items():
        assert resumed[step]["digest"] == record["digest"]
        for key in ("masked_loss", "next_sentence_loss"):
            assert resumed[step][key] == pytest.approx(record[key], rel=1e-3, abs=1e-3), (step, key)
