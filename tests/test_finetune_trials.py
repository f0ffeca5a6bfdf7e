"""Trials that fine-tune: what each of them would refuse is refused once before, and no more than that."""

import math
from typing import ClassVar

import pytest
from task_files import put_backbone, put_lines, put_task, sentences
from trial_experiments import Doing

from cluster.configuration.config import from_dict
from cluster.storage.uris import open_store
from trainers.finetuning.config import FinetuneConfig
from trainers.model.diverged import DivergedModelError
from trainers.tasks.splits import choose_budget, prepare_task
from trainers.tasks.task import load_task
from tune.search.experiment import Score
from tune.search.space import parse_space
from tune.trials import trials
from tune.trials.finetuning import FinetuneTrials, point_problems
from tune.trials.records import read_trials, trial_name


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return put_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def made(tmp_path, backbone):
    """A base configuration and its prepared task, of given records for train and for validation."""

    def make(train, validation, batch=None, **task):
        data = {
            name: put_lines(tmp_path / f"{name}.jsonl", records)
            for name, records in {"train": train, "validation": validation, "test": sentences(20, 9)}.items()
        }
        file = put_task(tmp_path / "task.yaml", name="t", data=data, **{"kind": "classification"} | task)
        content = {
            "run": {"task": file},
            "backbone": {"uri": backbone},
            "batch": {"min_steps": 1, "epochs": 1.0, "rows_per_step": 16} | (batch or {}),
            "engine": {"precision": "fp32", "zero_stage": 0},
            "validation": {"times": 2, "max_rows": 20},
        }
        prepared = prepare_task(load_task(file), open_store(str(tmp_path / "prepared")))
        return from_dict(FinetuneConfig, content), prepared

    return make


def found(base, prepared, space, seeds=(0,)):
    return point_problems(base, prepared, parse_space(space, base), list(seeds))


RATE = {"optimizer.learning_rate": {"choice": [0.001, 0.01]}}
LONG = {"id": "long", "text": "a very long story " * 100, "label": "good"}
GENERATION = {
    "kind": "generation",
    "columns": {"text": "text", "label": "label"},
    "prompt": {"template": "{text} It is"},
}


def test_only_records_of_the_label_budget_are_held_against_the_backbone(made):
    base, prepared = made([*sentences(60), LONG], sentences(20, 1))
    [problem] = found(base, prepared, RATE)
    assert "1 of 61 records of t are longer than 128 tokens" in problem
    budgets = {"batch.label_budget": {"choice": [8]}}
    assert found(base, prepared, budgets) == []
    # Each seed draws other records, and a finalist is tried with several.
    train = prepared.read("train")
    drawing = next(
        s for s in range(100) if LONG["id"] in {e.id for e in choose_budget(prepared.task, train, 8, s)}
    )
    assert len(found(base, prepared, budgets, [0, drawing])) == 1


def test_prompts_that_leave_no_room_for_an_answer_are_refused_once(made):
    long = [record | {"text": f"{record['text']} " * 4} for record in sentences(20, 1)]
    base, prepared = made(sentences(60), long, **GENERATION)
    [problem] = found(base, prepared, RATE)
    assert "beside an answer of 64" in problem
    assert found(base, prepared, RATE | {"batch.truncate": {"choice": [True]}}) == []


@pytest.mark.parametrize(
    ("space", "named"),
    [
        ({"adapt.train": {"choice": ["full", "head"]}}, "adapt.train=head trains nothing"),
        ({"batch.max_tokens": {"int": [8, 128]}}, "are longer than 8 tokens"),
        ({"batch.max_tokens": {"choice": [64, 512]}}, "batch.max_tokens=512 is more than the backbone's 128"),
        ({"adapt.train": {"choice": ["full", "lora"]}}, None),
    ],
)
def test_each_value_is_held_against_task_and_backbone(made, space, named):
    base, prepared = made(sentences(60), sentences(20, 1), **GENERATION)
    problems = found(base, prepared, space)
    assert any(named in problem for problem in problems) if named else not problems


def test_a_trial_comes_to_all_of_its_steps_also_where_the_budget_is_more_than_there_is(made, tmp_path):
    base, prepared = made(sentences(60), sentences(20, 1), {"label_budget": 10_000})
    shares = []
    FinetuneTrials(base, prepared).train(
        open_store(str(tmp_path / "trial")), {}, 0, lambda share, score, metrics: shares.append(share)
    )
    assert shares == [0.5, 1.0]


@pytest.mark.slow
def test_a_trial_that_diverges_comes_to_no_score(made, tmp_path):
    base, prepared = made(sentences(60), sentences(20, 1))
    scores: list[float] = []
    with pytest.raises(DivergedModelError, match="has a score"):
        FinetuneTrials(base, prepared).train(
            open_store(str(tmp_path / "trial")),
            {"optimizer.learning_rate": 1e30},
            0,
            lambda share, score, metrics: scores.append(score),
        )
    assert len(scores) == 2 and all(map(math.isnan, scores))


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_trial_whose_score_is_not_finite_has_failed(tmp_path, monkeypatch, score):
    sweep, told = open_store(str(tmp_path)), []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(trials.tune, "report", told.append)

    def diverging(folder, point, seed, report):
        report(0.5, score, {"accuracy": 0.9, "loss": math.nan})
        return Score(score, {"accuracy": 0.9})

    trials.run_trial({"point": {}, "seed": 0}, Doing(diverging, cpus=1.0), sweep)
    assert b"DivergedModelError" in sweep.read(f"trials/{trial_name({}, 0)}/error.txt")
    assert [each["best_score"] for each in told] == [-math.inf]


def test_a_backbone_that_is_replaced_ends_the_search_and_fails_no_point(tmp_path, monkeypatch):
    class Replaced:
        resources: ClassVar = {"gpu": 0}

        def changed(self):
            return "the backbone was replaced"

        def train(self, *arguments):
            raise RuntimeError("its digest is another")

    reports, sweep, point = [], open_store(str(tmp_path)), {"rate": 0.1}
    monkeypatch.setattr(trials.tune, "report", reports.append)
    trials.run_trial({"point": point, "seed": 0}, Replaced(), sweep)
    source = trials.Source(sweep, lambda: (point, 0), lambda record: None, 1, lambda name: "")
    for trial in ("first", "beside it"):
        source.suggest(trial)
    source.on_trial_result("first", reports[-1])
    source.on_trial_complete("first", reports[-1])
    source.on_trial_complete("beside it", {"score": 0.9, "best_score": 0.9, "percent": 100})
    assert source.changed == "the backbone was replaced"
    assert source.suggest("next") == trials.Searcher.FINISHED
    assert [trial.status for trial in read_trials(sweep)] == ["unfinished"]
    assert not [info.path for info in sweep.list() if info.path.endswith("error.txt")]
