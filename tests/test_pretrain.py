"""The main job through its entry, with real processes, and what kill -9 may not change (laws L1, L2, L4, L6)."""

import json
import os
import shutil
import signal
import threading
import time
import uuid

import pytest
import yaml

from cluster.console.printable import printable
from cluster.local_s3 import LocalS3
from cluster.sessions.loopback import is_loopback
from cluster.storage.uris import open_store
from tests.small_run import (
    STEPS,
    SmallRun,
    kill_tree,
    listening,
    put_corpus,
    steps_by_number,
    tell_costs,
    training_workers,
    wait_for_step,
)
from tests.unbroken import LOSS_TOLERANCE, assert_as_unbroken
from trainers import evaluate
from trainers.evaluation.verdict import TestSplitError, claim_test_split
from trainers.recovery.stopping import FAILURE
from trainers.reporting.metrics import events_of, read_attempts, read_metrics, validations_of

OUTAGE_SECONDS = 4.0
HANG_SECONDS = 8.0

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run by one worker that nothing disturbs, and its store."""
    folder = tmp_path_factory.mktemp("unbroken")
    run = SmallRun(str(folder), folder / "log.txt")
    put_corpus(open_store(f"{run.root}/raw"))
    assert run.finish(run.start()) == 0, run.output()
    return run, open_store(f"{run.root}/runs/pretrain")


def test_one_command_goes_from_raw_text_to_a_judged_exported_and_reported_model(unbroken):
    run, store = unbroken
    names = {info.path.partition("/")[0] for info in store.list()}
    expected = {
        "config.yaml",
        "manifest.json",
        "environment.json",
        "plan.txt",
        "metrics.jsonl",
        "checkpoints",
    }
    assert (
        expected
        | {"best.json", "test.json", "floor.json", "report.html", "export", "samples.json", "tensorboard"}
        <= names
    )
    assert sorted(steps_by_number(store)) == list(range(1, STEPS + 1))
    test = json.loads(store.read("test.json"))
    best = json.loads(store.read("best.json"))
    assert test["checkpoint"] == best["checkpoint"]
    assert 0 < test["bits_per_byte"] < 8
    told = run.output()
    in_order = (
        "survey: 100%",  # preparing
        f"tokens       {STEPS} steps x 8 rows x 64 tokens",  # the plan
        "step 0: starting with 1 worker",
        f"step {STEPS}/{STEPS}  loss ",
        f"byte {json.loads(store.read('floor.json'))['order']}-gram",
        f"test (step {test['step']})",
        "waited for data",
        "of a measured peak of",
        printable(json.loads(store.read("samples.json"))[0]["continuation"].splitlines()[0]),
        f"report: {run.root}/runs/pretrain/report.html",
    )
    assert sorted(map(told.index, in_order)) == [told.index(line) for line in in_order]


def test_the_run_says_which_peak_its_utilization_counts_against_and_keeps_it(unbroken):
    _, store = unbroken
    [kept] = json.loads(store.read("environment.json"))["measured"].values()
    [start] = events_of(read_attempts(store), "start")
    assert start["peak_is_measured"] and start["peak_flops_per_second"] == kept["peak_flops_per_second"]
    assert kept["product"] in start["peak_source"]
    assert "of a measured peak of" in store.read("report.html").decode()


def test_the_exported_model_has_the_validation_loss_that_chose_it(unbroken, capsys):
    run, store = unbroken
    best = json.loads(store.read("best.json"))
    evaluate.main(["--model", f"{store.uri}/export", "--corpus", f"{run.root}/prepared", "--max-rows", "16"])
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(best["loss"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(best["bits_per_byte"], rel=1e-5)


def test_a_finished_run_says_so_and_reads_the_test_split_no_more(unbroken):
    run, store = unbroken
    verdict, attempts = store.read("test.json"), len(store.list("attempts/"))
    assert run.finish(run.start()) == 0
    assert "the run is finished" in run.output()
    assert store.read("test.json") == verdict
    assert len(store.list("attempts/")) == attempts, "workers were started for nothing"
    with pytest.raises(TestSplitError):
        claim_test_split(store, "step-00000200-w1-a1")


def test_changed_keys_are_refused_before_anything_starts(unbroken):
    run, _ = unbroken
    assert run.finish(run.start(model__hidden_size=64, order__seed=7)) == 2
    refused = [line for line in run.output().splitlines() if "but the run was started with" in line]
    assert [line.split("=")[0].split()[-1] for line in refused] == ["model.hidden_size", "order.seed"]


def test_rows_and_losses_are_those_of_the_unbroken_run_after_kill_9_of_worker_store_and_driver(
    unbroken, tmp_path
):
    """On S3: kill -9 of the one worker at stage 3; of two at stage 1 the store for seconds, then all; one ends it."""
    _, reference = unbroken
    with LocalS3(tmp_path / "s3") as server:
        run = SmallRun(f"s3://corpus/{uuid.uuid4().hex}", tmp_path / "log.txt")
        put_corpus(open_store(f"{run.root}/raw"))
        store = open_store(f"{run.root}/runs/pretrain")
        alone = {"cluster__num_workers": 1, "engine__zero_stage": 3, "run__max_failures": 0}

        driver = run.start(**alone)
        wait_for_step(store, 30, driver)
        os.kill(training_workers(driver.pid)[-1].pid, signal.SIGKILL)
        assert run.finish(driver) == 1, run.output()
        assert "run.max_failures=0" in run.output() and "trainers/pretrain.py" not in run.output(), (
            "a traceback"
        )
        driver = run.start(cluster__num_workers=2, engine__zero_stage=1)
        wait_for_step(store, 60, driver)
        server.kill()
        threading.Event().wait(OUTAGE_SECONDS)
        server.start()
        wait_for_step(store, 110, driver)
        kill_tree(driver.pid)
        driver.wait()

        assert run.finish(run.start(**alone)) == 0, run.output()
        starts = events_of(read_attempts(store), "start")
        assert [start["world_size"] for start in starts] == [1, 2, 1], run.output()
        gone_on_from = [int(start["checkpoint"].split("-")[1]) for start in starts[1:]]
        assert gone_on_from == [start["step"] for start in starts[1:]] and min(gone_on_from) >= 10
        found, expected = steps_by_number(store), steps_by_number(reference)
        assert sorted(found) == sorted(expected)
        assert [found[s]["digest"] for s in found] == [expected[s]["digest"] for s in found]
        # float32, other orders of summation: workers and stages differ.
        for step in expected:
            assert found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=LOSS_TOLERANCE)
        verdicts = [json.loads(each.read("test.json"))["loss"] for each in (store, reference)]
        assert verdicts[0] == pytest.approx(verdicts[1], rel=1e-3)


def test_a_begun_run_goes_on_with_what_may_change_alone_and_without_its_raw_corpus(tmp_path):
    run = SmallRun(str(tmp_path), tmp_path / "log.txt")
    put_corpus(open_store(f"{run.root}/raw"))
    store = open_store(f"{run.root}/runs/pretrain")
    driver = run.start(run__steps=60)
    wait_for_step(store, 30, driver)
    kill_tree(driver.pid)
    driver.wait()
    begun = store.read("config.yaml")
    shutil.move(f"{run.root}/raw", f"{run.root}/moved")

    pinned = {
        "corpus.uri": f"{run.root}/moved",
        "engine.deepspeed": "{wall_clock_breakdown: true}",
        "engine.gradient_clip": 3.0,
        "engine.precision": "bf16",
        "run.seed": 5,
        "validation.every_steps": 20,
    }
    assert run.finish(run.start(run__steps=60, **pinned)) == 2
    refused = [line for line in run.output().splitlines() if "but the run was started with" in line]
    assert [line.split("=")[0].split()[-1] for line in refused] == list(pinned)
    assert store.read("config.yaml") == begun

    free = {"cluster__num_workers": 2, "engine__zero_stage": 2, "engine__micro_batch_rows": 1}
    free |= {"checkpoint__every_steps": 30, "run__prompts": '["A "]', "energy__overhead": 1.0}
    assert run.finish(run.start(run__steps=60, **free)) == 0, run.output()
    assert_as_unbroken(store, run, run__steps=60)
    assert max(steps_by_number(store)) == 60
    assert json.loads(store.read("samples.json"))[0]["prompt"] == "A "
    says = [yaml.safe_load(content) for content in (begun, store.read("config.yaml"))]
    for key, value in free.items():
        section, name = key.split("__")
        says[0][section][name] = yaml.safe_load(str(value))
    assert says[0] == says[1]


def test_sigterm_and_ctrl_c_save_and_exit_0_and_the_same_command_goes_on(unbroken, tmp_path):
    _, reference = unbroken
    run = SmallRun(str(tmp_path), tmp_path / "log.txt")
    put_corpus(open_store(f"{run.root}/raw"))
    store = open_store(f"{run.root}/runs/pretrain")
    stopped_at = [0]
    # A terminal sends Ctrl-C to the driver and to all that it started.
    for ask in (
        lambda driver: driver.send_signal(signal.SIGTERM),
        lambda driver: os.killpg(driver.pid, signal.SIGINT),
    ):
        driver = run.start(cluster__num_workers=2)
        wait_for_step(store, stopped_at[-1] + 10, driver)
        listened = listening(driver.pid)
        ask(driver)
        assert run.finish(driver) == 0, run.output()
        stopped_at.append(max(steps_by_number(store)))
        assert listened and all(map(is_loopback, listened)), "a run on one machine can be reached from others"
    assert stopped_at[-1] < STEPS
    assert run.finish(run.start(cluster__num_workers=2)) == 0, run.output()
    tell_costs(store)
    found, expected = steps_by_number(store), steps_by_number(reference)
    assert [found[step]["digest"] for step in sorted(found)] == [
        expected[s]["digest"] for s in sorted(expected)
    ]
    starts = events_of(read_attempts(store), "start")
    assert [start["step"] for start in starts] == stopped_at, "a step was done twice"
    # A stop validates nothing by itself: what validation sees and chooses is that of the unbroken run.
    validated = [[r["step"] for r in validations_of(read_metrics(each))] for each in (store, reference)]
    assert validated[0] == validated[1]
    best = [json.loads(each.read("best.json"))["step"] for each in (store, reference)]
    assert best[0] == best[1]


def test_an_error_that_no_restart_cures_ends_the_run_with_its_reason(unbroken, tmp_path):
    run = SmallRun(str(tmp_path), tmp_path / "log.txt")
    put_corpus(open_store(f"{run.root}/raw"))
    store = open_store(f"{run.root}/runs/pretrain")
    # No loss is finite after the first update: every step is refused.
    changes = {"optimizer__learning_rate": 1e30, "guard__max_skipped_in_a_row": 2, "run__max_failures": -1}
    changes["cluster__num_workers"] = 2
    assert run.finish(run.start(**changes)) == 1, run.output()
    assert "the run cannot go on: 3 steps refused, guard.max_skipped_in_a_row=2" in run.output()
    told = store.read(FAILURE).decode()
    assert "documents: " in told and "not resolved" not in told, "the other worker has not read them"
    assert len(store.list("attempts/")) == 1, "it was tried again"


def test_a_worker_that_hangs_is_found_leaves_stacks_and_the_run_goes_on(unbroken, tmp_path):
    _, reference = unbroken
    run = SmallRun(str(tmp_path), tmp_path / "log.txt")
    put_corpus(open_store(f"{run.root}/raw"))
    store = open_store(f"{run.root}/runs/pretrain")
    hasty = {"heartbeat.timeout_seconds": HANG_SECONDS, "heartbeat.linger_seconds": 1}
    changes = {key.replace(".", "__"): value for key, value in hasty.items()}
    driver = run.start(cluster__num_workers=2, run__max_failures=1, **changes)
    wait_for_step(store, 20, driver)
    # It neither ends nor answers: the other worker waits for it in a collective.
    os.kill(training_workers(driver.pid)[-1].pid, signal.SIGSTOP)
    hung = time.time()
    assert run.finish(driver) == 0, run.output()
    starts = events_of(read_attempts(store), "start")
    assert len(starts) == 2, run.output()
    assert starts[1]["began"] - hung < HANG_SECONDS + 60, "the limit of ten minutes was waited for"
    assert "loop.py" in run.output(), "no stack is in the log"
    stacks = [store.read(info.path).decode() for info in store.list("stacks/")]
    assert any("loop.py" in text for text in stacks), "no stack says where the run hung"
    found, expected = steps_by_number(store), steps_by_number(reference)
    assert [found[s]["digest"] for s in sorted(found)] == [expected[s]["digest"] for s in sorted(expected)]
    assert [found[s]["loss"] for s in sorted(found)] == pytest.approx(
        [expected[s]["loss"] for s in sorted(expected)], rel=LOSS_TOLERANCE
    )
