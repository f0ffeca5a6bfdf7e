import json
import math
from pathlib import Path

import pytest
import yaml
from task_files import put_backbone, put_lines, put_task, sentences

from cluster.config import ConfigError
from cluster.storage import open_store
from trainers.task import TaskConfig
from trainers.task_records import Example
from tune.baselines import linear, majority
from tune.curve import CurvePoint, savings
from tune.label_efficiency import main


def point(arm: str, budget: int, mean: float) -> CurvePoint:
    return CurvePoint(arm, budget, (mean,), mean, mean, mean)


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
    [digest] = [info.path.removesuffix(".json")[-12:] for info in curve.list("linear-10-")]
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
