import json
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import yaml
from sklearn.dummy import DummyClassifier
from task_files import put_backbone, put_lines, put_task, sentences, skewed

from cluster.configuration.config import from_dict
from cluster.console.errors import ConfigError
from cluster.storage.uris import open_store
from trainers.tasks.metrics import seeds_interval
from trainers.tasks.records import Example
from trainers.tasks.splits import choose_budget, prepare_task
from trainers.tasks.task import Draw, TaskConfig, load_task
from tune.curves.baselines import linear, majority
from tune.curves.curve import CurvePoint, Saving, savings
from tune.curves.label_curve import LabelEfficiencyConfig, value_of
from tune.curves.page import write_curve_report
from tune.label_efficiency import main


def point(arm: str, budget: int, mean: float) -> CurvePoint:
    return CurvePoint(arm, budget, (mean,), mean, None, None)


def test_the_labels_are_read_off_the_line_over_their_logarithm() -> None:
    points = [point("pretrained", 10, 0.5), point("pretrained", 1_000, 0.9), point("scratch", 1_000, 0.7)]
    [found] = savings(points, "scratch")
    assert found.labels == pytest.approx(100) and not found.at_most
    assert found.told() == "0.700: 100 labels, a factor of 10.0"


def test_what_the_smallest_budget_reaches_is_a_bound_and_what_none_reaches_is_said() -> None:
    ours = [point("pretrained", 10, 0.6), point("pretrained", 100, 0.7)]
    theirs = [point("linear", 30, 0.6), point("linear", 100, 0.8)]
    enough, never = savings([*ours, *theirs[::-1]], "linear")
    assert enough.told() == "0.600: at most 10 labels, a factor of at least 3.0"
    assert never.labels is None and "not reached" in never.told()


def test_the_linear_model_learns_words_and_the_majority_does_not() -> None:
    task = TaskConfig(name="t", kind="classification", labels=("a", "b"))
    rows = [
        Example(str(i), f"{'good' if i % 3 else 'bad'} thing {i}", "", [], "a" if i % 3 else "b")
        for i in range(90)
    ]
    train, validation, test = rows[:40], rows[40:60], rows[60:]
    assert linear(task, train, validation, test)["accuracy"] == 1.0
    assert math.isclose(majority(task, train, test)["accuracy"], 2 / 3)


@pytest.mark.parametrize("seeds", [2, 3])
def test_the_interval_of_a_factor_holds_the_true_one_also_with_few_seeds(seeds: int) -> None:
    """The pretrained curve rises by 0.1 with each tenfold, and is at the rival's 5,000 labels with 500."""
    generator, held, trials = np.random.default_rng(0), 0, 200
    for _ in range(trials):
        levels = {("pretrained", 10 ** (n / 2)): 0.5 + 0.05 * n for n in range(2, 9)}
        levels["scratch", 5_000] = 0.5 + 0.1 * math.log10(500)
        points = []
        for (arm, budget), level in levels.items():
            values = tuple((level + 0.02 * generator.normal(size=seeds)).tolist())
            points.append(CurvePoint(arm, round(budget), values, *seeds_interval(values)))
        [saving] = savings(points, "scratch")
        assert saving.interval is not None
        fewest, most = saving.interval
        held += fewest <= 500 and (most is None or most >= 500)
    assert held / trials >= 0.95


def test_a_factor_has_no_interval_where_one_seed_says_nothing_of_the_spread() -> None:
    [found] = savings(
        [point("pretrained", 10, 0.5), point("pretrained", 100, 0.9), point("scratch", 100, 0.7)], "scratch"
    )
    assert found.interval is None and "(" not in found.told()


def test_an_end_of_a_factors_interval_beyond_the_budgets_is_unknown() -> None:
    assert Saving(1_000, 0.7, 100.0, False, (50.0, None)).told().endswith("a factor of 10.0 (? to 20.0)")
    assert (
        Saving(1_000, 0.7, 10.0, True, (0.0, 40.0)).told().endswith("a factor of at least 100.0 (25.0 to ?)")
    )


def test_of_labels_that_are_equally_common_the_majority_takes_the_mean() -> None:
    """scikit-learn's takes the first by the alphabet."""
    task = TaskConfig(name="t", kind="classification", labels=("a", "b", "c"))

    def labelled(labels: str) -> list[Example]:
        return [Example(str(i), f"text {i}", "", [], label) for i, label in enumerate(labels)]

    known, test = labelled("aabbc"), labelled("abbbbcccc")
    rows, truth = [[0]] * len(test), [example.target for example in test]
    theirs = [
        DummyClassifier(strategy="constant", constant=label).fit(rows, truth).score(rows, truth)
        for label in "ab"
    ]
    assert (
        majority(task, known, test)["accuracy"]
        == pytest.approx(sum(theirs) / 2)
        == pytest.approx((1 + 4) / 9 / 2)
    )


@pytest.mark.parametrize("draw", ["random", "balanced"])
def test_the_majority_is_that_of_the_pool_where_labels_take_turns_and_else_of_the_draw(
    tmp_path: Path, draw: str
) -> None:
    uri = put_lines(tmp_path / "records.jsonl", skewed(400))
    task = put_task(tmp_path / "task.yaml", name="toy", kind="classification", data={"uri": uri})
    prepared = prepare_task(load_task(task), open_store(str(tmp_path / "prepared")))
    base = {"run": {"task": task}, "backbone": {"uri": "of no use"}, "batch": {"draw": draw}}
    config = from_dict(LabelEfficiencyConfig, {"base": base})
    pool, test = prepared.read("train"), prepared.read_test()
    known = pool if draw == "balanced" else choose_budget(prepared.task, pool, 15, seed=0)
    theirs = DummyClassifier(strategy="most_frequent").fit([[0]] * len(known), [e.target for e in known])
    expected = theirs.score([[0]] * len(test), [e.target for e in test])
    found = value_of(config, prepared, open_store(str(tmp_path / "curve")), "majority", 15, 0)
    assert found == pytest.approx(expected) and found > 0.5


def test_the_page_tells_how_records_were_drawn_which_labels_lack_and_counts_what_validates(
    tmp_path: Path,
) -> None:
    uri = put_lines(tmp_path / "records.jsonl", skewed(400))
    task = put_task(tmp_path / "task.yaml", name="toy", kind="classification", data={"uri": uri})
    prepared = prepare_task(load_task(task), open_store(str(tmp_path / "prepared")))
    store = open_store(str(tmp_path / "curve"))
    points = [CurvePoint("pretrained", 100, (0.5,), 0.5, None, None, validated=90, lacking=(2,))]
    pages = {}
    for draw in get_args(Draw):
        write_curve_report(store, prepared, points, {}, draw)
        pages[draw] = store.read("report.html").decode()
    for page in pages.values():
        assert "100 to train + 90 to validate" in page and "<td>–</td>" in page
        assert "of the 3 labels 2 are in no record that trains" in page
    assert f"found by all {prepared.counts['train']} labels of the training pool" in pages["balanced"]
    assert "drawn at random" in pages["random"]


def test_a_linear_model_stands_a_draw_without_some_labels(tmp_path: Path) -> None:
    task = TaskConfig(name="t", kind="classification", labels=("rare", "usual"), metric="macro_f1")
    rows = [Example(str(i), f"thing {i}", "", [], "usual" if i % 10 else "rare") for i in range(40)]
    usual = [row for row in rows if row.target == "usual"]
    assert linear(task, usual[:10], usual[10:20], rows)["accuracy"] == pytest.approx(0.9)


def test_a_metric_that_the_linear_model_lacks_is_refused_at_the_start(tmp_path: Path) -> None:
    uri = put_lines(tmp_path / "records.jsonl", sentences(80))
    task = put_task(
        tmp_path / "task.yaml", name="toy", kind="classification", metric="loss", data={"uri": uri}
    )
    command = ["--base.run.task", task, "--base.backbone.uri", "nowhere", "--curve.storage", str(tmp_path)]
    with pytest.raises(ConfigError, match="metric=loss: the linear model"):
        main(command)


@pytest.mark.slow
def test_the_command_measures_every_arm_and_checks_what_the_backbone_has_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        r | {"text": f"{r['text']} number {i} " + r["text"][::-1]} for i, r in enumerate(sentences(160))
    ]
    uri = put_lines(tmp_path / "records.jsonl", records)
    task = put_task(tmp_path / "task.yaml", name="toy", kind="classification", data={"uri": uri})
    put_backbone(tmp_path / "run" / "export")
    (tmp_path / "raw").mkdir()
    put_lines(tmp_path / "raw" / "a.jsonl", [{"id": "a", "text": "nothing of the task " * 20}])
    arguments = {
        "curve.storage": tmp_path / "curves", "curve.budgets": "[10, 0]", "curve.seeds": 1,
        "base.run.task": task, "base.run.prepared": tmp_path / "prepared",
        "base.backbone.uri": tmp_path / "run" / "export", "base.batch.min_steps": 2, "base.batch.max_steps": 2,
        "base.validation.times": 1, "base.engine.precision": "fp32", "base.engine.zero_stage": 0,
    }  # fmt: skip
    command = [part for key, value in arguments.items() for part in (f"--{key}", str(value))]

    main(command)
    assert "NOT CHECKED for the test split" in capsys.readouterr().out  # nothing says what it was trained on
    curve = open_store(str(tmp_path / "curves" / "toy-labels"))
    content = json.loads(curve.read("curve.json"))
    points = {(point["arm"], point["budget"]): point["mean"] for point in content["points"]}
    budgets = {budget for _, budget in points}
    assert {arm for arm, _ in points} == {"pretrained", "scratch", "linear", "majority"} and len(points) == 8
    assert 10 in budgets and len(budgets) == 2 and curve.exists("report.html")
    [digest] = [info.path.removesuffix(".json")[-12:] for info in curve.list("linear-random-10-")]
    assert any(digest in str(path) for path in (tmp_path / "prepared").iterdir())

    main([*command, "--curve.arms", '["pretrained"]'])
    alone = json.loads(curve.read("curve.json"))
    assert alone["saved"] == {}
    assert [(p["arm"], p["budget"], p["mean"]) for p in alone["points"]] == [
        ("pretrained", budget, points["pretrained", budget]) for budget in sorted(budgets)
    ]

    config = {"run": {}, "corpus": {"uri": str(tmp_path / "raw"), "sources": {}}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    main(command)  # goes on: nothing is left to measure
    assert "raw contains none of" in capsys.readouterr().out
    put_lines(tmp_path / "raw" / "b.jsonl", records)
    with pytest.raises(ConfigError, match="pretrained on .*raw, which contains .* test texts"):
        main(command)
    main([*command, "--curve.check_overlap", "false"])
    assert "NOT CHECKED" in capsys.readouterr().out


@pytest.mark.slow
def test_an_arm_that_diverges_does_not_keep_the_others_from_being_measured(tmp_path: Path) -> None:
    uri = put_lines(tmp_path / "records.jsonl", sentences(300))
    put_task(tmp_path / "task.yaml", name="t", kind="classification", data={"uri": uri})
    settings = {
        "base.run.task": tmp_path / "task.yaml", "base.run.prepared": tmp_path / "prepared",
        "base.backbone.uri": put_backbone(tmp_path / "model"), "base.engine.precision": "fp32",
        "base.batch.min_steps": 3, "base.batch.max_steps": 3, "base.validation.max_rows": 20,
        "curve.storage": tmp_path / "curves", "curve.budgets": "[20]", "curve.seeds": 2,
        "curve.arms": "[scratch, pretrained]", "curve.scratch_learning_rate": 1e30,
    }  # fmt: skip
    arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    with pytest.raises(SystemExit, match="1 of its points have no score.*20 labels, scratch: "):
        main(arguments)
    curve = open_store(str(tmp_path / "curves" / "t-labels"))
    judged = {info.path for info in curve.list() if info.path.endswith("/test.json")}
    assert judged == {f"pretrained-20/seed-{seed}/test.json" for seed in (0, 1)}
    main([*arguments, "--curve.arms", "[pretrained]"])
    assert [point["arm"] for point in json.loads(curve.read("curve.json"))["points"]] == ["pretrained"]
