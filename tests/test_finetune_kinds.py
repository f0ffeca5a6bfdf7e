"""Each kind of task is learnt: its answers to the test split are worth more than any constant one."""

import json
import math
import random
from dataclasses import replace

import pytest
from task_files import BACKBONES, BAD, GOOD, REST, put_backbone, put_lines, put_task

from cluster.storage.uris import open_store
from tests.small_finetune import answers_again, config, judged_answers, run_of
from trainers.finetuning.report import write_task_report
from trainers.finetuning.run import finetune
from trainers.reporting.metrics import read_metrics, validations_of
from trainers.tasks.metrics import measure
from trainers.tasks.splits import prepare_task
from trainers.tasks.task import load_task

RECORDS = 240
LEARNING = {"batch": {"min_steps": 160}, "optimizer": {"learning_rate": 0.005}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    for name in ("causal", "bert"):
        put_backbone(folder / name, BACKBONES[name])
    return folder


def record_of(kind, generator):
    """A record whose target can be told from which of its words are good and which bad."""
    rest, good, bad = generator.choices(REST, k=4), generator.choice(GOOD), generator.choice(BAD)
    first, second = [*rest[:2], good], [*rest[2:], bad]
    generator.shuffle(first)
    if kind == "pairs":  # the same words on one side or on the other
        label = generator.choice(["before", "after"])
        texts = [" ".join(first), " ".join(second)]
        texts = texts if label == "before" else texts[::-1]
        return {"text": texts[0], "pair": texts[1], "label": label}
    if kind == "question_answering":
        context = [*rest, good]
        generator.shuffle(context)
        return {"text": f"what is {rest[0]}", "pair": " ".join(context), "label": good}
    chosen = [good] * generator.randrange(2) + [bad] * generator.randrange(2)
    words = [*rest, *chosen]
    generator.shuffle(words)
    if kind == "token_classification":
        tags = ["B-G" if word in GOOD else "B-B" if word in BAD else "O" for word in words]
        return {"tokens": words, "label": tags}
    if kind == "classification":
        return {"text": " ".join(words), "label": sorted({"G" if w in GOOD else "B" for w in chosen})}
    if kind == "regression":
        return {"text": " ".join(words), "label": 10.0 + 5 * (good in chosen) - 2 * (bad in chosen)}
    answer = generator.choice(["yes", "no"])
    words = [*rest, good if answer == "yes" else bad]
    generator.shuffle(words)
    text = " ".join(words)
    if kind == "chats":
        said = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        return {"messages": said}
    return {"text": text, "label": answer}


PAIR = {"columns": {"pair": "pair"}}
CONTENT = {
    "classification": {"multi_label": True},
    "pairs": PAIR,
    "question_answering": PAIR,
    "generation": {"prompt": {"template": "{text}?"}},
    "chats": {"columns": {"messages": "messages"}, "prompt": {"template": "{text}\nassistant:"}},
}


def task_of(place, name, **content):
    generator = random.Random(name)
    records = [{"id": f"r{n}"} | record_of(name, generator) for n in range(RECORDS)]
    uri = put_lines(place / f"{name}.jsonl", records)
    kind = "generation" if name == "chats" else name
    content = {"name": name, "kind": kind, "data": {"uri": uri}, **CONTENT.get(name, {}), **content}
    path = put_task(place / f"{name}.yaml", split={"similarity": 1.0}, **content)
    return prepare_task(load_task(path), open_store(str(place / "prepared")))


def best_constant(task, examples, known):
    """The metric of the best answer that is the same for every record, of those that train."""
    if task.kind == "regression":
        candidates = [sum(example.target for example in known) / len(known)]
    elif task.kind == "token_classification":
        candidates = [None]
    else:
        targets = [example.target for example in known]
        texts = [target["text"] if isinstance(target, dict) else target for target in targets]
        candidates = [json.loads(each) for each in {json.dumps(text) for text in texts}]

    def value(constant):
        answers = [constant if constant is not None else ["O"] * len(e.words) for e in examples]
        return measure(task, examples, answers, only=task.judged_by)[task.judged_by]

    return max(value(constant) for constant in candidates)


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("classification", "causal"),
        ("pairs", "causal"),
        ("token_classification", "causal"),
        ("regression", "causal"),
        ("question_answering", "causal"),
        ("generation", "causal"),
        ("chats", "causal"),
        ("pairs", "bert"),  # with token types
        ("token_classification", "bert"),
    ],
)
def test_each_kind_is_learnt_judged_reported_and_exported_with_the_answers_that_were_judged(
    place, name, backbone
):
    prepared = task_of(place, name)
    task, run_name = prepared.task, f"{name}-{backbone}"
    limits = {"times": 2, "max_new_tokens": 4}
    made = config(place, run_name, backbone={"uri": str(place / backbone)}, validation=limits, **LEARNING)
    found = finetune(
        replace(made, run=replace(made.run, task=str(place / f"{name}.yaml"))), prepared=prepared
    )
    run, tested = run_of(place, run_name), prepared.read_test()
    answers = judged_answers(run)
    assert {a["id"]: a["target"] for a in answers} == {example.id: example.target for example in tested}
    verdict = found.seeds[0]["test"]["metrics"]
    again = measure(task, tested, [a["answer"] for a in answers])
    assert verdict == again | {"loss": verdict["loss"]} and math.isfinite(verdict["loss"])
    constant = best_constant(task, tested, prepared.read("train"))
    assert verdict[task.judged_by] > constant + 0.5 * (1 - constant), f"a constant answer has {constant:.3f}"
    for judged, one in zip(answers, answers_again(run.child("export"), answers, 4), strict=True):
        assert one.value == (
            pytest.approx(judged["answer"], abs=1e-4) if name == "regression" else judged["answer"]
        )
    write_task_report(run, prepared)
    assert run.exists("report.html")


def test_a_run_judged_by_its_loss_keeps_the_step_of_the_least_and_beats_the_share_of_each_label(place):
    prepared = task_of(place, "generation", metric="loss")
    made = config(place, "by-loss", backbone={"uri": str(place / "causal")}, validation={"times": 6})
    made = replace(made, run=replace(made.run, task=str(place / "generation.yaml")))
    told = {}
    finetune(made, prepared=prepared, on_validation=lambda step, score: told.setdefault(step, score))
    run = run_of(place, "by-loss")
    result = json.loads(run.read("result.json"))
    losses = {step: score.metrics["loss"] for step, score in told.items()}
    assert result["best_step"] == min(losses, key=losses.get)
    assert result["score"] == -losses[result["best_step"]] == -result["validation"]["loss"]
    assert set(result["validation"]) == {"loss"}, "answers were written that choose nothing"
    stored = {r["step"]: r["validation"]["loss"] for r in validations_of(read_metrics(run))}
    assert stored == losses
    # Two answers that are equally frequent, and the closing token, which is certain.
    assert result["test"]["metrics"]["loss"] < math.log(2) / 2
