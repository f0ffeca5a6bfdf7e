"""Fine-tuning that is killed, hangs, is asked to stop, or meets numbers that are none (law L5: it ends as unbroken)."""

import json
import math
import os
import signal
import time

import pytest
import torch
import yaml
from task_files import SHAPE, put_lines, put_task, sentences, small_tokenizer
from tokenizers import Tokenizer

from cluster.console.errors import ConfigError
from cluster.storage.uris import open_store
from tests.small_finetune import SHORT, command, config, losses_of, put_place, run_of, start
from tests.small_run import training_workers
from trainers.checkpoints.commit import parse_folder_name
from trainers.checkpoints.keeping import committed
from trainers.exported.folder import export, load_exported
from trainers.finetune import main
from trainers.finetuning.backbone import make_encoder
from trainers.finetuning.end import answer
from trainers.finetuning.job import FinetuneOrder
from trainers.finetuning.loop import beating
from trainers.finetuning.run import finetune
from trainers.model.backbone import build
from trainers.recovery.guard import TrainingDiverged
from trainers.recovery.heartbeat import Heartbeat
from trainers.recovery.stopping import STOP, RunFailed, RunStopped
from trainers.reporting.metrics import events_of, read_attempts, read_metrics, steps_of
from trainers.tasks.heads import TaskModel
from trainers.tasks.splits import prepare_task
from trainers.tasks.task import load_task

REDUCTION_NOISE = 1e-5
"""Relative: two workers and ZeRO sum in another order. At a rate that overfits, Adam makes more of it each step."""
LONG = {"rows_per_step": 16, "min_steps": 300, "max_steps": 300, "epochs": 1.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return put_place(tmp_path_factory.mktemp("faults"))


def wait_for(driver, condition, seconds=300.0):
    ends = time.monotonic() + seconds
    while not (found := condition()):
        assert driver.poll() is None, "the run ended before"
        assert time.monotonic() < ends
        time.sleep(0.02)
    return found


def commits(run, attempt=0):
    """(step, workers, attempt) of each checkpoint that a later attempt committed, newest first."""
    found = [parse_folder_name(name) for name in committed(run)]
    return [each for each in found if each[2] > attempt]


@pytest.mark.cluster
def test_two_workers_killed_hung_and_stopped_and_one_that_goes_on_learn_what_an_unbroken_run_learns(place):
    changes = {
        "batch": LONG, "adapt": {"dropout": 0.0}, "optimizer": {"learning_rate": 0.0002},
        "checkpoint": {"every_steps": 8}, "validation": {"times": 6, "patience": 0},
    }  # fmt: skip
    unbroken = finetune(config(place, "unbroken", **changes), keep_model=False).seeds[0]
    run, wide = run_of(place, "broken"), {
        "cluster": {"num_workers": 2, "cpus_per_worker": 0.75, "threads_per_worker": 1},
        "engine": {"zero_stage": 2}, "run": {"max_failures": -1},
        "heartbeat": {"timeout_seconds": 8, "linger_seconds": 1},
    }  # fmt: skip
    driver = start(place, "broken", changes | wide)
    *_, reached = wait_for(driver, lambda: commits(run))[0]
    os.kill(training_workers(driver.pid)[-1].pid, signal.SIGKILL)
    *_, reached = wait_for(driver, lambda: commits(run, reached))[0]
    # It neither ends nor answers: the other worker waits for it in a collective, for five minutes if nobody looks.
    os.kill(training_workers(driver.pid)[-1].pid, signal.SIGSTOP)
    hung = time.monotonic()
    wait_for(driver, lambda: commits(run, reached))
    assert time.monotonic() - hung < 150
    assert any("finetuning/loop.py" in run.read(info.path).decode() for info in run.list("stacks/"))
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(120) == 0, (place / "broken.txt").read_text()[-4000:]
    assert not run.exists("result.json") and not run.exists(STOP)
    stopped_at, *_ = commits(run)[0]
    assert stopped_at == max(record["step"] for record in steps_of(read_metrics(run))) < 300
    finetune(config(place, "broken", **changes), keep_model=False)
    starts = events_of(read_attempts(run), "start")
    assert (starts[-1]["step"], starts[-1]["world_size"]) == (stopped_at, 1), "a stop lost a step"
    assert [record["step"] for record in steps_of(read_metrics(run))] == list(range(1, 301))
    expected = losses_of(run_of(place, "unbroken"))
    assert losses_of(run) == pytest.approx(expected, rel=REDUCTION_NOISE)
    found = json.loads(run.read("result.json"))
    assert found["best_step"] == unbroken["best_step"]
    assert found["test"]["metrics"]["loss"] == pytest.approx(
        unbroken["test"]["metrics"]["loss"], rel=REDUCTION_NOISE
    )


@pytest.mark.slow
def test_sigterm_ends_a_run_of_one_process_with_status_0_and_the_same_command_goes_on(place):
    changes = {"batch": LONG, "checkpoint": {"every_steps": 8}, "adapt": {"dropout": 0.2}}
    run, second = run_of(place, "signalled"), run_of(place, "signalled", seed=1)
    driver = start(place, "signalled", changes | {"run": {"seeds": [0, 1]}})
    wait_for(driver, lambda: committed(run))
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(120) == 0, (place / "signalled.txt").read_text()[-4000:]
    assert "the same command goes on" in (place / "signalled.txt").read_text()
    assert not run.exists("result.json") and not second.list("checkpoints/"), "it went on"
    assert not run.exists(STOP) and not second.exists(STOP), "the next start would stop at once"
    assert commits(run)[0][0] == len(steps_of(read_metrics(run))) < 300
    found = finetune(config(place, "signalled", **changes), keep_model=False)
    assert found == finetune(config(place, "unsignalled", **changes), keep_model=False)
    assert losses_of(run) == losses_of(run_of(place, "unsignalled"))


def test_an_object_named_stop_ends_a_run_with_all_saved_and_the_seeds_after_it_are_not_begun(place):
    run = run_of(place, "object")
    changes = {"batch": LONG | {"rows_per_step": 8}, "validation": {"times": 30, "patience": 0}}
    seeds = config(place, "object", **changes, run={"seeds": (0, 1)})
    with pytest.raises(RunStopped, match="seed-0"):
        finetune(seeds, on_validation=lambda step, score: run.put(STOP, b""))
    saved, *_ = commits(run)[0]
    assert saved == len(steps_of(read_metrics(run))) < 300
    assert not run_of(place, "object", seed=1).list()
    with pytest.raises(RunStopped):  # until somebody takes it away, as the command does when it starts
        finetune(seeds)
    assert commits(run)[0][0] == saved


@pytest.fixture(scope="module")
def poisoned(place):
    """A backbone for which one letter is no number, and records of which one has that letter."""
    letter, tokenizer = "\u00ff", small_tokenizer()
    state = dict(build(SHAPE, seed=1).named_parameters())
    *_, number = Tokenizer.from_str(tokenizer.json).encode(letter, add_special_tokens=False).ids
    with torch.no_grad():
        state["embed_tokens.weight"][number] = torch.nan
    target = open_store(str(place / "poisoned"))
    export(state, SHAPE, tokenizer.json.encode(), tokenizer.boundary_id, target)
    odd = {"id": "odd one", "text": f"a fine film {letter}", "label": "good"}
    files = {
        "train": put_lines(place / "train.jsonl", [*sentences(239), odd]),
        "validation": put_lines(place / "validation.jsonl", sentences(40, seed=3)),
        "test": put_lines(place / "test.jsonl", sentences(40, seed=4)),
    }
    task = put_task(place / "p.yaml", name="p", kind="classification", data=files, split={"similarity": 1.0})
    return {"backbone": {"uri": target.uri}, "run": {"task": task}}


def test_a_step_that_is_no_number_is_skipped_names_its_records_and_the_others_are_learnt(place, poisoned):
    found = finetune(config(place, "skips", **poisoned)).seeds[0]
    run = run_of(place, "skips")
    skipped = events_of(read_metrics(run), "skipped")
    assert len(skipped) == 120 * 16 / 240, "once an epoch"
    assert all("odd one" in event["records"] for event in skipped)
    assert all(len(event["records"]) == 16 and "loss is nan" in event["reason"] for event in skipped)
    steps = {record["step"]: record["loss"] for record in steps_of(read_metrics(run))}
    assert {event["step"] for event in skipped} == {step for step, loss in steps.items() if loss is None}
    assert found["test"]["metrics"]["accuracy"] > 0.8


IMPATIENT = {"guard": {"max_skipped": 2}}


def test_a_run_of_steps_that_are_no_numbers_ends_and_names_their_records(place, poisoned):
    changes = poisoned | IMPATIENT
    with pytest.raises(
        TrainingDiverged, match="guard.max_skipped=2 .*; records: .*odd one.*Look at these records"
    ):
        finetune(config(place, "diverges", **changes))
    with pytest.raises(SystemExit, match="the run cannot go on: .*odd one"):
        main(command(place, "diverges", changes)[2:])


def test_an_error_that_no_restart_helps_ends_a_group_at_once_with_its_reason(place, poisoned, ray_session):
    changes = poisoned | IMPATIENT | {"cluster": {"cpus_per_worker": 0.5}}
    with pytest.raises(RunFailed, match="records: .*odd one"):
        finetune(config(place, "group", **changes), alone=False)
    assert len(events_of(read_attempts(run_of(place, "group")), "start")) == 1, "it was started anew"


def test_answers_to_many_records_are_no_hang_each_batch_of_them_beats(place):
    class Recording(Heartbeat):
        def beat(self, step, phase="step"):
            beats.append((step, phase))

    beats = []
    made = config(place, "beats")
    backbone = load_exported(open_store(made.backbone.uri))
    task = prepare_task(load_task(made.run.task), open_store(made.run.prepared))
    model = TaskModel(backbone.model, task.task, made.adapt, seed=0).eval()
    recording = Recording(made.heartbeat, run_of(place, "beats"), rank=0, attempt=1)
    order = FinetuneOrder(made, task, 0, "digest")
    examples = task.read("validation")
    with beating(model.backbone, recording, 7):
        answer(order, model, make_encoder(made, task.task, backbone), examples)
    batches = math.ceil(len(examples) / (2 * made.engine.micro_batch_rows))
    assert beats == [(7, "validate")] * batches and batches > 1
    answer(order, model, make_encoder(made, task.task, backbone), examples)
    assert len(beats) == batches, "it beats when it is over"


def test_a_run_from_before_there_was_a_guard_is_the_same_run(place):
    changes = {"batch": SHORT}
    finished = finetune(config(place, "old", **changes), keep_model=False, judge=False)
    run = run_of(place, "old")
    stored = yaml.safe_load(run.read("config.yaml"))
    del stored["guard"], stored["heartbeat"]
    run.put("config.yaml", yaml.safe_dump(stored).encode())
    assert finetune(config(place, "old", **changes), keep_model=False, judge=False) == finished
    with pytest.raises(ConfigError, match="optimizer.learning_rate"):
        finetune(config(place, "old", **changes, optimizer={"learning_rate": 0.02}))
