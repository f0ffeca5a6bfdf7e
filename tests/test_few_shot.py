"""Asking by prompt, against transformers' log-likelihoods."""

import json

import numpy as np
import pytest
import torch
from task_files import put_backbone, put_lines, put_task, sentences

from cluster.config import ConfigError
from cluster.storage import open_store
from trainers import evaluate
from trainers.export import load_exported
from trainers.few_shot import (
    FewShotConfig,
    choice_scores,
    choose_shots,
    evaluate_few_shot,
    full_prompt,
    log_likelihoods,
)
from trainers.task import load_task
from trainers.task_data import prepare_task
from trainers.task_encoding import prompt_of

PROMPT = {"template": "{text}\nThis is", "answers": {"good": "very fine", "bad": "bad"}, "separator": "\n\n"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few-shot")
    uri = put_lines(folder / "records.jsonl", sentences(200))
    put_task(folder / "task.yaml", name="t", kind="classification", data={"uri": uri}, prompt=PROMPT)
    put_backbone(folder / "model")
    return folder


def prepared(place):
    return prepare_task(load_task(str(place / "task.yaml")), open_store(str(place / "prepared")))


def test_log_likelihoods_are_transformers(place):
    from transformers import LlamaForCausalLM

    exported = load_exported(open_store(str(place / "model")))
    theirs = LlamaForCausalLM.from_pretrained(place / "model")
    prompts, answers = ["one two", "a much longer prompt than that one"], [" very fine", " bad"]
    found, lengths = log_likelihoods(exported, prompts, answers, rows_per_batch=3)
    encode = lambda text: exported.tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    for p, prompt in enumerate(prompts):
        for a, answer in enumerate(answers):
            head, tail = [exported.boundary_id, *encode(prompt)], encode(answer)
            with torch.no_grad():
                logits = theirs(torch.tensor([head + tail])).logits[0].log_softmax(-1)
            expected = sum(float(logits[len(head) - 1 + i, token]) for i, token in enumerate(tail))
            assert found[p, a] == pytest.approx(expected, abs=1e-3)
            assert lengths[a] == len(tail)


def test_calibration_takes_off_what_is_said_without_content(place):
    task = prepared(place)
    exported = load_exported(open_store(str(place / "model")))
    examples = task.read("validation")[:5]
    scores = choice_scores(exported, task.task, [], examples, 4)
    taken = scores["sum"] - scores["calibrated"]
    assert np.allclose(taken, taken[0]) and not np.allclose(taken[0], 0)


def test_shots_come_from_train_and_stand_solved_before_the_question(place):
    task = prepared(place)
    shots = choose_shots(task, FewShotConfig(shots=4, seed=1))
    assert {shot.id for shot in shots} <= {example.id for example in task.read("train")}
    assert sorted(shot.target for shot in shots) == ["bad", "bad", "good", "good"]
    assert shots != choose_shots(task, FewShotConfig(shots=4, seed=2))
    question = task.read("validation")[0]
    prompt = full_prompt(task.task, shots, prompt_of(task.task, question))
    solved, asked = prompt.split("\n\n")[:-1], prompt.split("\n\n")[-1]
    assert [line.rsplit("This is ", 1)[1] for line in solved] == [PROMPT["answers"][s.target] for s in shots]
    assert asked == f"{question.text}\nThis is"


def test_the_command_tells_each_number_of_shots_with_an_interval(place, capsys):
    evaluate.main(
        ["--model", str(place / "model"), "--task", str(place / "task.yaml"), "--shots", "0", "2",
         "--prepared", str(place / "prepared")]
    )  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert [each["shots"] for each in found] == [0, 2]
    low, high = found[1]["calibrated"]["interval"]
    assert low <= found[1]["calibrated"]["metrics"]["accuracy"] <= high


def test_the_test_split_is_refused(place):
    with pytest.raises(SystemExit, match="test split judges a run once"):
        evaluate.main(["--model", "m", "--task", str(place / "task.yaml"), "--split", "test"])


def test_prompts_that_do_not_fit_are_one_error(place):
    exported = load_exported(open_store(str(place / "model")))
    with pytest.raises(ConfigError, match="the model has 128 positions; ask with fewer --shots"):
        evaluate_few_shot(exported, prepared(place), FewShotConfig(shots=30))
