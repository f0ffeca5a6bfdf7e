"""Asking by prompt, against transformers' log-likelihoods."""

import json
import re

import numpy as np
import pytest
import torch
from task_files import put_backbone, put_lines, put_task, sentences

from cluster.console.errors import ConfigError
from cluster.storage.uris import open_store
from trainers import evaluate
from trainers.evaluation.verdict import TestSplitError
from trainers.exported.folder import load_exported
from trainers.exported.sampling import Completion
from trainers.tasks import few_shot
from trainers.tasks.encoding import prompt_of
from trainers.tasks.few_shot import (
    FewShotConfig,
    choice_scores,
    choose_shots,
    evaluate_few_shot,
    full_prompt,
    log_likelihoods,
    written,
)
from trainers.tasks.metrics import measure
from trainers.tasks.splits import prepare_task
from trainers.tasks.task import load_task

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
            assert lengths[p, a] == len(tail)


def test_calibration_takes_off_what_is_said_without_content(place):
    task = prepared(place)
    exported = load_exported(open_store(str(place / "model")))
    examples = task.read("validation")[:5]
    plain = choice_scores(exported, task.task, [], examples, 4)
    scores = choice_scores(exported, task.task, [], examples, 4, calibrate=True)
    assert plain.keys() == {"sum", "per_token"}
    assert all(np.allclose(plain[way], scores[way], atol=1e-4) for way in plain)
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


@pytest.mark.slow
def test_the_command_tells_each_number_of_shots_with_an_interval(place, capsys):
    evaluate.main(
        ["--model", str(place / "model"), "--task", str(place / "task.yaml"), "--shots", "0", "2",
         "--prepared", str(place / "prepared"), "--calibrate", "--max-rows", "8"]
    )  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert [each["shots"] for each in found] == [0, 2]
    low, high = found[1]["calibrated"]["interval"]
    assert low <= found[1]["calibrated"]["metrics"]["accuracy"] <= high
    assert {"sum", "per_token"} <= found[1].keys()


def test_the_test_split_is_refused(place):
    with pytest.raises(TestSplitError, match="test split judges a run once"):
        evaluate.main(["--model", "m", "--task", str(place / "task.yaml"), "--split", "test"])


def test_a_split_that_a_task_is_not_asked_on_is_refused(place):
    with pytest.raises(ValueError, match="--split train is for --corpus"):
        evaluate.main(
            ["--model", str(place / "model"), "--task", str(place / "task.yaml"), "--split", "train",
             "--prepared", str(place / "prepared"), "--max-rows", "1"]
        )  # fmt: skip


def test_prompts_that_do_not_fit_are_one_error(place):
    exported = load_exported(open_store(str(place / "model")))
    with pytest.raises(ConfigError, match="the model has 128 positions; ask with fewer --shots"):
        evaluate_few_shot(exported, prepared(place), FewShotConfig(shots=30))


def test_more_shots_than_train_has_are_one_error(place):
    task = prepared(place)
    number = len(task.read("train"))
    assert len(choose_shots(task, FewShotConfig(shots=number))) == number
    with pytest.raises(
        ConfigError, match=f"--shots {number + 1} are more than the {number} records of train"
    ):
        choose_shots(task, FewShotConfig(shots=number + 1))


def generation(place, name="echo", **content):
    """Records whose answer is the one number of their text."""
    records = [{"id": f"g{n}", "text": f"number {n * 7}", "label": str(n * 7)} for n in range(60)]
    data = {"uri": put_lines(place / f"{name}.jsonl", records)}
    described = {"name": name, "kind": "generation", "data": data, "split": {"similarity": 1.0}}
    path = put_task(place / f"{name}.yaml", **described | content)
    return prepare_task(load_task(path), open_store(str(place / "prepared")))


@pytest.mark.slow
@pytest.mark.parametrize("shots", [0, 3])
def test_a_written_answer_is_transformers_likeliest_text_up_to_the_separator(place, shots):
    from transformers import LlamaForCausalLM

    task = generation(place, prompt={"template": "{text} is", "separator": "\n\n"})
    exported = load_exported(open_store(str(place / "model")))
    theirs = LlamaForCausalLM.from_pretrained(place / "model")
    config = FewShotConfig(shots=shots, max_rows=4)
    examples, solved = few_shot.choose_asked(task, config), choose_shots(task, config)
    expected = []
    for example in examples:
        prompt = full_prompt(task.task, solved, prompt_of(task.task, example))
        assert prompt.endswith(f"{example.text} is") and prompt.count("\n\n") == shots
        ids = [exported.boundary_id, *exported.tokenizer.encode(prompt, add_special_tokens=False).ids]
        made = theirs.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=64, eos_token_id=exported.boundary_id,
            pad_token_id=exported.boundary_id,
        )  # fmt: skip
        text = exported.tokenizer.decode(made[0, len(ids) :].tolist(), skip_special_tokens=True)
        expected.append(text.split("\n\n")[0].strip())
    assert written(exported, task.task, solved, examples) == expected
    found = evaluate_few_shot(exported, task, config)
    assert found["written"]["metrics"] == measure(task.task, examples, expected)
    assert set(found["written"]["metrics"]) == {"chrf", "bleu", "rouge_l", "exact_match"}
    assert (found["shots"], found["records"]) == (shots, 4)


def test_a_written_answer_ends_where_the_separator_begins(place):
    exported = load_exported(open_store(str(place / "model")))
    task = generation(place)
    examples = few_shot.choose_asked(task, FewShotConfig(max_rows=1))
    (whole,) = written(exported, task.task, [], examples)
    assert len(whole) > 12
    middle = whole[5:10]
    ended = generation(place, "ended", prompt={"separator": middle})
    assert written(exported, ended.task, [], examples) == [whole.split(middle)[0].strip()]


def test_a_separator_that_would_end_each_answer_at_once_is_refused(place):
    exported = load_exported(open_store(str(place / "model")))
    task = generation(place, "bare", prompt={"separator": ""})
    with pytest.raises(ConfigError, match="prompt.separator='' would end each answer before it begins"):
        evaluate_few_shot(exported, task, FewShotConfig())


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("classification", {"multi_label": True}),
        ("regression", {}),
        ("token_classification", {}),
    ],
)
def test_a_kind_that_has_no_prompt_is_refused_by_name(place, kind, content):
    words = {"tokens": ["a", "b"], "text": "a b"}
    labels = {"classification": ["x"], "regression": 1.5}
    tags = [["O", "O"], ["O", "B-x"]]
    records = [
        words | {"tokens": ["a", f"b{n}"], "text": f"a b{n}", "label": labels.get(kind, tags[n % 2])}
        for n in range(60)
    ]
    uri = put_lines(place / f"{kind}.jsonl", records)
    described = {"name": kind, "kind": kind, "data": {"uri": uri}, "split": {"similarity": 1.0}} | content
    task = prepare_task(
        load_task(put_task(place / f"{kind}.yaml", **described)), open_store(str(place / "prepared"))
    )
    exported = load_exported(open_store(str(place / "model")))
    with pytest.raises(ConfigError, match=f"kind={kind} .* cannot be asked by a prompt"):
        evaluate_few_shot(exported, task, FewShotConfig())


def question_answering(place, **content):
    records = [
        {"text": f"who is {n}?", "context": f"number {n} is Anna{n} of house {n * 7}", "label": f"Anna{n}"}
        for n in range(60)
    ]
    uri = put_lines(place / "qa.jsonl", records)
    described = {
        "name": "qa",
        "kind": "question_answering",
        "data": {"uri": uri},
        "columns": {"pair": "context"},
    }
    path = put_task(place / "qa.yaml", **described, **content)
    return prepare_task(load_task(path), open_store(str(place / "prepared")))


def test_an_answer_from_a_context_is_written_and_scored_by_squads_f1(place, monkeypatch):
    task = question_answering(place, prompt={"template": "{pair}\n{text}"})
    exported = load_exported(open_store(str(place / "model")))
    asked = []

    def says_half(exported, prompts, sampling):
        asked.extend(prompts)
        assert "\n" in sampling.stop
        return [
            Completion(" Anna" + re.findall(r"who is (\d+)", p)[-1] + " Bert", [], "stop") for p in prompts
        ]

    monkeypatch.setattr(few_shot, "complete", says_half)
    found = evaluate_few_shot(exported, task, FewShotConfig(shots=1))["written"]["metrics"]
    assert found == {"f1": pytest.approx(2 / 3), "exact_match": 0.0}
    solved, question = asked[0].split("\n\n")
    assert re.fullmatch(r"number (\d+) is Anna\1 of house \d+\nwho is \1\? Anna\1", solved)
    assert re.fullmatch(r"number (\d+) is Anna\1 of house \d+\nwho is \1\?", question)


def test_a_model_writes_answers_from_a_context(place):
    task = question_answering(place, prompt={"template": "{pair}\n{text}"})
    exported = load_exported(open_store(str(place / "model")))
    found = evaluate_few_shot(exported, task, FewShotConfig(max_rows=3))
    assert 0 <= found["written"]["metrics"]["f1"] <= 1 and found["records"] == 3


@pytest.mark.parametrize(
    ("config", "content", "message"),
    [
        (FewShotConfig(), {}, "prompt.template='{text}' has no {pair}: context would not be asked about"),
        (
            FewShotConfig(calibrate=True),
            {"prompt": {"template": "{pair} {text}"}},
            "--calibrate is for labels",
        ),
        (FewShotConfig(), {"metric": "loss"}, "metric=loss needs training"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_is_scored(place, config, content, message):
    exported = load_exported(open_store(str(place / "model")))
    with pytest.raises(ConfigError, match=re.escape(message)):
        evaluate_few_shot(exported, question_answering(place, **content), config)
