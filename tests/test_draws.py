"""How a few records of many are drawn: at random, or with labels in turn; and a draw that lacks labels."""

from dataclasses import replace

import numpy as np
import pytest
import yaml
from scipy import stats
from task_files import put_backbone, put_lines, put_task, sentences, skewed

from cluster.configuration.config import from_dict
from cluster.console.errors import ConfigError
from cluster.storage.uris import open_store
from trainers.finetuning.config import FinetuneConfig, seed_store
from trainers.finetuning.job import FinetuneOrder, identity_of, write_start
from trainers.finetuning.report import write_task_report
from trainers.finetuning.run import check_unchanged, finetune
from trainers.tasks.records import Example
from trainers.tasks.splits import choose_budget, prepare_task
from trainers.tasks.task import TaskConfig, load_task

TASK = TaskConfig(name="t", kind="classification", labels=("rare", "usual"))
POOL = [Example(str(i), f"text {i}", "", [], "usual" if i % 10 else "rare") for i in range(1_000)]


@pytest.mark.parametrize("draw", ["random", "balanced"])
def test_a_larger_budget_holds_the_smaller_one_and_another_seed_draws_others(draw):
    small, large = (choose_budget(TASK, POOL, budget, 3, draw) for budget in (10, 40))
    assert small == large[:10] and len({example.id for example in large}) == 40
    assert small != choose_budget(TASK, POOL, 10, 4, draw)


def test_a_random_draw_has_as_many_of_a_label_as_chance_gives():
    found = [sum(e.target == "rare" for e in choose_budget(TASK, POOL, 20, seed)) for seed in range(400)]
    of_chance = stats.hypergeom(1_000, 100, 20)
    counted = np.bincount(np.minimum(found, 5), minlength=6)
    expected = 400 * np.append(of_chance.pmf(range(5)), of_chance.sf(4))
    assert stats.chisquare(counted, expected).pvalue > 0.01


def test_in_a_balanced_draw_labels_take_turns():
    assert (
        sorted(e.target for e in choose_budget(TASK, POOL, 10, 3, "balanced")) == ["rare"] * 5 + ["usual"] * 5
    )


@pytest.fixture
def made(tmp_path):
    """A configuration of 15 records to train and 12 to validate, its prepared task, and the folder of its run."""
    given = {"uri": put_lines(tmp_path / "records.jsonl", skewed(400))}
    file = put_task(tmp_path / "task.yaml", name="t", kind="classification", metric="macro_f1", data=given)
    content = {
        "run": {"task": file, "storage": str(tmp_path), "name": "r", "prepared": str(tmp_path / "prepared")},
        "backbone": {"uri": put_backbone(tmp_path / "backbone")},
        "batch": {"label_budget": 15, "min_steps": 2, "epochs": 1.0, "class_weights": True},
        "engine": {"precision": "fp32", "zero_stage": 0},
        "validation": {"times": 1, "max_rows": 12},
    }
    config = from_dict(FinetuneConfig, content)
    return config, prepare_task(load_task(file), open_store(config.run.prepared)), seed_store(config, 0)


def with_draw(config, draw):
    return replace(config, batch=replace(config.batch, draw=draw))


def test_a_run_older_than_the_choice_of_a_draw_goes_on_as_balanced_and_is_refused_as_another(made):
    config, prepared, run = made
    balanced, order = with_draw(config, "balanced"), FinetuneOrder(config, prepared, 0, "of-weights")
    write_start(run, replace(order, config=balanced))
    old = yaml.safe_load(run.read("config.yaml"))
    del old["batch"]["draw"]
    run.put("config.yaml", yaml.safe_dump(old).encode())
    check_unchanged(run, balanced, prepared, "of-weights")
    with pytest.raises(
        ConfigError, match="batch.draw='random', but the run was started with 'balanced'; give it back"
    ):
        check_unchanged(run, config, prepared, "of-weights")
    # Its checkpoints, too, name no draw.
    assert "draw" not in identity_of(replace(order, config=balanced))["batch"]
    assert identity_of(order)["batch"]["draw"] == "random"


def test_a_run_older_than_the_choice_goes_on_where_it_took_all_records(made):
    config, prepared, run = made
    whole = replace(
        config,
        batch=replace(config.batch, label_budget=0),
        validation=replace(config.validation, max_rows=prepared.counts["validation"]),
    )
    write_start(run, FinetuneOrder(whole, prepared, 0, "of-weights"))
    old = yaml.safe_load(run.read("config.yaml"))
    del old["batch"]["draw"]
    run.put("config.yaml", yaml.safe_dump(old).encode())
    check_unchanged(run, whole, prepared, "of-weights")
    assert "draw" not in identity_of(FinetuneOrder(whole, prepared, 0, "of-weights"))["batch"]


def test_a_run_older_than_the_choice_goes_on_where_no_label_could_take_turns(made, tmp_path):
    config, _, run = made
    records = [record | {"label": float(i)} for i, record in enumerate(sentences(200))]
    file = put_task(
        tmp_path / "numbers.yaml",
        name="n",
        kind="regression",
        data={"uri": put_lines(tmp_path / "n.jsonl", records)},
    )
    config = replace(config, run=replace(config.run, task=file))
    prepared = prepare_task(load_task(file), open_store(config.run.prepared))
    order = FinetuneOrder(config, prepared, 0, "of-weights")
    write_start(run, order)
    old = yaml.safe_load(run.read("config.yaml"))
    del old["batch"]["draw"]
    run.put("config.yaml", yaml.safe_dump(old).encode())
    check_unchanged(run, config, prepared, "of-weights")
    assert "draw" not in identity_of(order)["batch"]


@pytest.mark.parametrize("draw", ["random", "balanced"])
def test_a_run_trains_and_is_judged_also_where_no_training_record_has_a_label_and_says_so(made, draw):
    config, prepared, run = made
    seed = next(
        seed
        for seed in range(100)
        if {e.target for e in choose_budget(prepared.task, prepared.read("train"), 15, seed)}
        == {"many", "most"}
    )
    config = with_draw(replace(config, run=replace(config.run, seeds=(seed,))), draw)
    (result,) = finetune(config, prepared=prepared, keep_model=False, alone=True).seeds
    lacking = ["a rare one"] if draw == "random" else []
    assert result["draw"] == draw and result["lacking_labels"] == lacking
    assert 0 <= result["test"]["metrics"]["macro_f1"] <= 1
    run = seed_store(config, seed)
    write_task_report(run, prepared)
    page, there = run.read("report.html").decode(), prepared.counts["train"]
    how = f"at random of {there}" if draw == "random" else f"balanced by all {there} labels of the pool"
    assert f"The 15 records of train were drawn {how}." in page
    assert ("No training record has the labels a rare one." in page) == bool(lacking)
