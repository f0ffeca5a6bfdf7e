"""A model whose outputs are not finite has no score, no answer and no verdict, whoever asks it."""

import ast
import json
import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from small_finetune import SHORT, config, put_place, run_of
from task_files import BACKBONES, SHAPE, put_backbone, small_tokenizer
from tokenizers import Tokenizer

from cluster.sessions.session import PROJECT
from cluster.storage.uris import open_store
from trainers.evaluation.loss import evaluation_of
from trainers.evaluation.selection import Selection, ValidationConfig
from trainers.evaluation.verdict import VERDICT, record_verdict
from trainers.exported.folder import Exported, load_exported
from trainers.exported.reading import Reader
from trainers.exported.sampling import SamplingConfig, complete, generate
from trainers.finetuning.end import CHOSEN, answer_lines, read_chosen
from trainers.finetuning.job import FinetuneOrder
from trainers.finetuning.loop import Choice
from trainers.finetuning.run import finetune
from trainers.model.backbone import build
from trainers.model.diverged import DivergedModelError
from trainers.objectives.causal import CAUSAL
from trainers.prediction.pieces import Counts, Predictor, counts_of
from trainers.pretraining.loop import Ending
from trainers.pretraining.worker import refuse_diverged
from trainers.reporting.progress import Status
from trainers.tasks.encoding import Encoder, framed
from trainers.tasks.evaluation import TaskScore, answers_to, score_of
from trainers.tasks.export import export_task_model
from trainers.tasks.few_shot import log_likelihoods
from trainers.tasks.heads import AdaptConfig, TaskModel
from trainers.tasks.metrics import NOT_FINITE, Answer
from trainers.tasks.records import Example
from trainers.tasks.task import TaskConfig, TaskFiles, TaskPrompt

CPU = torch.device("cpu")
LABELS = ("bad", "good")
QUESTION = {"text": "film", "start": 2}
KINDS = {
    "classification": ({"labels": LABELS}, "good"),
    "multi_label": ({"kind": "classification", "labels": LABELS, "multi_label": True}, ["good"]),
    "regression": ({}, 1.5),
    "token_classification": ({"labels": ("O", "B-x")}, ["O", "B-x", "O"]),
    "question_answering": ({}, QUESTION),
    "generation": ({"prompt": TaskPrompt(template="Q: {text}\nA:")}, "film"),
}


def made(kind: str, shape: str = "causal") -> tuple[TaskModel, Encoder]:
    content, _ = KINDS[kind]
    task = TaskConfig(**{"name": "t", "kind": kind, "data": TaskFiles(uri="elsewhere.jsonl")} | content)
    causal = shape == "causal"
    tokenizer, pad = framed(Tokenizer.from_str(small_tokenizer().json), 0, causal=causal)
    model = TaskModel(build(BACKBONES[shape], seed=3), task, AdaptConfig(dropout=0.0), seed=0).eval()
    return model, Encoder(task, tokenizer, pad, 128, True, causal)


def examples(kind: str, *texts: str) -> list[Example]:
    return [
        Example(str(number), text, "a film", text.split(" ") if "token" in kind else [], KINDS[kind][1])
        for number, text in enumerate(texts)
    ]


def spoil(model: TaskModel, value: float) -> None:
    last = model.head.out if model.head is not None else model.backbone.lm_head
    with torch.no_grad():
        last.weight.fill_(value)


@torch.inference_mode()
def scored(model: TaskModel, encoder: Encoder, asked: list[Example]) -> tuple[list[Answer], TaskScore]:
    found, losses, weights = answers_to(
        model, encoder, asked, encoder.encode(asked), rows_per_batch=4, device=CPU, max_new_tokens=4
    )
    return found, score_of(encoder.task, asked, found, losses, weights)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_that_are_not_finite_are_no_answer_and_no_validation_score(kind, value):
    model, encoder = made(kind)
    asked = examples(kind, "a fine film", "the dull plot", "its warm end")
    answers, score = scored(model, encoder, asked)
    assert score.is_score and all(answer.is_finite for answer in answers)
    spoil(model, value)
    answers, score = scored(model, encoder, asked)
    assert not any(answer.is_finite for answer in answers)
    assert not score.is_score and score.metrics == {}
    assert Choice().after(10, score).best_step == 0


def test_several_labels_of_infinite_scores_are_no_answer_although_their_probability_is_1():
    model, encoder = made("multi_label")
    asked = examples("multi_label", "a fine film")
    with torch.no_grad():
        model.head.out.weight.zero_()
    model.head.register_forward_hook(lambda *_: torch.full((1, 2), math.inf))
    answers, score = scored(model, encoder, asked)
    assert not answers[0].is_finite and not score.is_score


@pytest.mark.parametrize("shape", BACKBONES)
@pytest.mark.parametrize("kind", ["classification", "token_classification", "question_answering"])
def test_one_record_without_finite_scores_takes_the_score_away_and_leaves_the_others_answers(kind, shape):
    model, encoder = made(kind, shape)
    asked = examples(kind, "a fine film", "the dull plot", "its warm end")
    before, _ = scored(model, encoder, asked)
    only = set(encoder.encode(asked[1:2])[0].ids) - {
        i for e in encoder.encode([asked[0], asked[2]]) for i in e.ids
    }
    with torch.no_grad():
        model.backbone.embed_tokens.weight[min(only)] = math.nan
    after, score = scored(model, encoder, asked)
    assert [answer.is_finite for answer in after] == [True, False, True]
    assert [after[0].value, after[2].value] == [before[0].value, before[2].value]
    assert not score.is_score


def test_padding_behind_a_record_takes_no_answer_away():
    model, encoder = made("token_classification", "rotary")
    asked = [
        Example("0", "a film", "", ["a", "film"], ["O", "B-x"]),
        *examples("token_classification", "the dull plot"),
    ]
    padding = encoder.encode(asked[:1])[0]
    hook = model.head.register_forward_hook(
        lambda _, __, scores: scores.index_fill(1, torch.arange(len(padding.ids), scores.shape[1]), math.nan)
    )
    answers, _ = scored(model, encoder, asked)
    hook.remove()
    assert answers[0].is_finite and not answers[1].is_finite


def test_a_metric_beyond_float64_is_none_and_the_metric_that_judges_no_score():
    task = TaskConfig(name="t", kind="regression", metric="mse")
    asked = [Example("0", "a", "", [], 0.0), Example("1", "b", "", [], 1e200)]
    answers = [Answer(-1e200, math.nan), Answer(0.0, math.nan)]
    score = score_of(task, asked, answers, 1.0, 2.0)
    assert not score.is_score and "mse" not in score.metrics and score.metrics["loss"] == 0.5
    assert not score_of(task, asked, answers, math.inf, 2.0).is_score


def test_outputs_decide_and_not_the_loss_alone():
    task = TaskConfig(name="t", kind="classification", labels=LABELS)
    asked = examples("classification", "a fine film", "the dull plot")
    assert score_of(task, asked, [Answer("good", 0.9)] * 2, 1.0, 2.0).score == 1.0
    assert not score_of(task, asked, [Answer("good", 0.9), NOT_FINITE], 1.0, 2.0).is_score


def test_a_validation_without_a_finite_loss_is_told_as_that():
    told = Status(10).absorb({"step": 4, "validation": {"loss": None, "bits_per_byte": None}})
    assert told == "step 4: validation loss not finite"


def test_tokens_that_follow_scores_without_numbers_are_none_and_other_rows_are_as_alone():
    model = build(SHAPE, seed=1).eval()
    with torch.no_grad():
        model.embed_tokens.weight[7] = math.nan
    for sampling in (SamplingConfig(max_new_tokens=4, temperature=0), SamplingConfig(max_new_tokens=4)):
        alone, broken = generate(model, [[3, 4], [3, 7, 5]], sampling)
        assert broken is None and alone == generate(model, [[3, 4]], sampling)[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Exported:
    found = load_exported(open_store(put_backbone(tmp_path_factory.mktemp("diverged"))))
    with torch.no_grad():
        found.model.lm_head.weight.fill_(math.nan)
    return found


def test_a_diverged_model_is_refused_where_it_is_asked_by_prompt(exported):
    with pytest.raises(DivergedModelError, match="answers to 2 of 2 prompts"):
        log_likelihoods(exported, ["Is it?", "And now?"], [" yes", " no"], 4)
    with pytest.raises(DivergedModelError, match="what follows 'a film'"):
        complete(exported, ["a film"], SamplingConfig(max_new_tokens=4))


def test_a_diverged_encoder_gives_no_vectors(tmp_path):
    encoder = load_exported(open_store(put_backbone(tmp_path / "bert", BACKBONES["causal"])))
    reader = Reader(replace(encoder, objective="mixed"))
    assert reader.embed(["a film"]).isfinite().all()
    with torch.no_grad():
        encoder.model.embed_tokens.weight.fill_(math.nan)
    with pytest.raises(DivergedModelError, match="outputs for texts are not finite"):
        reader.embed(["a film"])


def test_predict_tells_a_record_without_finite_scores_and_answers_the_others(tmp_path):
    model, encoder = made("classification")
    only = encoder.encode(examples("classification", "plot"))[0].ids
    rest = {i for e in encoder.encode(examples("classification", "a fine film")) for i in e.ids}
    with torch.no_grad():
        model.backbone.embed_tokens.weight[[i for i in only if i not in rest]] = math.nan
    export_task_model(model, encoder, 0, open_store(str(tmp_path / "export")))
    predictor = Predictor(str(tmp_path / "export"), str(tmp_path / "answers"), 4, 1)
    lines = predictor.lines([("1", {"id": "x", "text": "a fine film"}), ("2", {"id": "y", "text": "plot"})])
    assert lines[0]["answer"] in LABELS and "error" not in lines[0]
    assert "answer" not in lines[1] and "not finite" in lines[1]["error"] and lines[1]["id"] == "y"
    assert counts_of(lines) == Counts(answered=1, refused=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return put_place(tmp_path_factory.mktemp("place"))


@pytest.mark.slow
def test_a_run_none_of_whose_validations_has_a_score_ends_in_one_line_unjudged_and_not_exported(place):
    # Fewer steps than the guard lets pass: what ends the run is that no model can be chosen.
    told: list[TaskScore] = []
    diverging = config(place, "diverging", batch=SHORT, optimizer={"learning_rate": 1e30})
    for _ in range(2):  # the same command comes to the same end
        with pytest.raises(
            DivergedModelError, match=r"no validation of .*/diverging/seed-0 has a score"
        ) as caught:
            finetune(diverging, on_validation=lambda _, score: told.append(score))
        assert "\n" not in str(caught.value)
    assert told and not any(score.is_score for score in told)
    paths = {info.path for info in run_of(place, "diverging").list()}
    assert not [
        path for path in paths if "test" in path or "export" in path or path in (CHOSEN, "result.json")
    ]


def test_what_an_older_version_chose_of_a_diverged_model_is_not_judged(tmp_path):
    run, order = open_store(str(tmp_path)), Mock(spec=FinetuneOrder, judge=True, keep_model=True)
    choice = {
        "best_step": 2,
        "best_score": 0.4,
        "without_improvement": 2,
        "metrics": {"accuracy": 0.4, "loss": math.nan},
    }
    chosen = {"choice": choice, "steps": 6, "train_records": 9, "validation_records": 9, "scale": [0.0, 1.0]}
    run.put(CHOSEN, json.dumps(chosen).encode())
    with pytest.raises(DivergedModelError, match="names step 2, where the model's outputs were not finite"):
        read_chosen(order, run)


def test_a_pretraining_run_without_a_finite_validation_loss_ends_before_it_is_judged(tmp_path):
    run, config = open_store(str(tmp_path)), ValidationConfig()
    found = [
        evaluation_of((CAUSAL,), np.array([[loss, 8, np.nan]]), 24, 0.1)
        for loss in (math.nan, math.inf, 16.0)
    ]
    diverged = Selection().after(10, found[0], config).after(20, found[1], config)
    with pytest.raises(DivergedModelError, match="no validation of .* has a finite loss"):
        refuse_diverged(run, Ending(20, diverged, stopped=False))
    refuse_diverged(run, Ending(20, diverged, stopped=True))
    refuse_diverged(run, Ending(30, diverged.after(30, found[2], config), stopped=False))


def test_a_verdict_that_json_cannot_hold_is_not_written(tmp_path):
    run = open_store(str(tmp_path))
    with pytest.raises(ValueError, match="JSON"):
        record_verdict(run, {"step": 1, "loss": math.nan})
    assert not run.exists(VERDICT)
    line = answer_lines(examples("regression", "a film"), [Answer(1.0, math.nan)])
    assert json.loads(line, parse_constant=pytest.fail)["confidence"] is None


SHOWN_ALONE = {
    ("cluster/configuration/keys.py", "shown"),
    ("cluster/configuration/config.py", "to_dict"),
    ("cluster/configuration/config.py", "value"),
    ("cluster/configuration/stored_file.py", "decode_json"),
    ("trainers/tasks/records.py", "_refuse_half_character"),
}
"""Functions whose JSON is shown, or held against a type, and never stored."""


def test_all_json_that_is_written_refuses_what_json_does_not_have():
    lax = set()
    for folder in ("cluster", "data", "trainers", "tune"):
        for file in sorted(Path(PROJECT, folder).rglob("*.py")):
            path = file.relative_to(PROJECT).as_posix()
            for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                name = function.name if isinstance(function, ast.FunctionDef) else ""
                nodes = (
                    ast.iter_child_nodes(function) if isinstance(function, ast.Module | ast.ClassDef) else ()
                )
                inside = (
                    ast.walk(function)
                    if name
                    else (n for c in nodes if isinstance(c, ast.Assign) for n in ast.walk(c))
                )
                lax |= {(path, name) for node in inside if is_lax(node)}
    assert lax == SHOWN_ALONE


def is_lax(node: ast.AST) -> bool:
    """Whether a call makes JSON that may hold NaN."""
    if not (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("json.dumps", "json.dump", "json.JSONEncoder")
    ):
        return False
    strict = [key.value for key in node.keywords if key.arg == "allow_nan"]
    return not (strict and isinstance(strict[0], ast.Constant) and strict[0].value is False)
