"""A sweep's page shows the metric as the task names it, also where less is better, and says which keys matter."""

import io
import re

import pytest
from rich.console import Console

from cluster.storage.uris import open_store
from tune.search.measure import Measure
from tune.search.space import Dimension, SearchSpace
from tune.sweeps.finalists import Finalist
from tune.sweeps.page import importances, sweep_table, write_sweep_report
from tune.trials.records import TrialRecord, read_trials, record_outcome, trial_name

SPACE = SearchSpace(
    (
        Dimension("optimizer.learning_rate", "uniform", (1.0, 2.0), {}),
        Dimension("adapt.dropout", "uniform", (0.0, 0.3), {}),
        Dimension("adapt.train", "choice", ("full", "lora"), {}),
        Dimension("adapt.lora_rank", "int", (4, 16), {"adapt.train": "lora"}),
    )
)
TASK = Measure("made", "mse")


@pytest.fixture
def sweep(tmp_path):
    """Ten trials whose mse grows with the learning rate alone, from 0.5 to 0.95."""
    store = open_store(str(tmp_path / "s"))
    for n in range(10):
        point = {"optimizer.learning_rate": 1 + n / 10, "adapt.dropout": (n * 7 % 10) / 40}
        point |= {"adapt.train": "lora", "adapt.lora_rank": 4 + n} if n % 2 else {"adapt.train": "full"}
        record_outcome(
            store, TrialRecord(trial_name(point, 0), point, 0, n + 1, "finished", -(0.5 + n / 20), 1.0)
        )
    return store


def test_what_explains_the_scores_is_the_most_important_and_a_conditional_key_is_not_weighed(sweep):
    shares = importances(read_trials(sweep), SPACE)
    assert max(shares, key=shares.get) == "optimizer.learning_rate"
    assert shares.keys() == {"optimizer.learning_rate", "adapt.dropout", "adapt.train"}
    assert importances(read_trials(sweep)[:7], SPACE) == {}


def test_less_is_better_is_shown_as_it_is_and_an_interval_from_low_to_high(sweep):
    best = Finalist({"optimizer.learning_rate": 1.0}, (-0.5, -0.54), -0.52, -0.56, -0.48)
    write_sweep_report(sweep, SPACE, [best], None, TASK)
    page = sweep.read("report.html").decode()
    assert "<td>0.5200</td><td>0.4800 to 0.5600</td>" in page
    assert [f"<td>{0.5 + n / 20:.4f}</td>" in page for n in range(10)] == [True] * 10
    titles = re.findall("<h3>(.*?)</h3>", page)
    assert titles[-1] == "Importance" and "adapt.lora_rank" in titles and len(titles) == 3 + 4 + 1
    assert "validation mse" in page and "validation score" not in page
    assert "-0.5" not in page and "\N{MINUS SIGN}" not in page, "a negated score"
    console = Console(file=io.StringIO(), width=200)
    console.print(sweep_table(read_trials(sweep), [best], TASK))
    assert re.search(r"0\.5200 .* 0\.4800 to 0\.5600", console.file.getvalue())


def test_one_seed_has_a_dash_for_an_interval(sweep):
    best = Finalist({"optimizer.learning_rate": 1.0}, (-0.5,), -0.5, None, None)
    write_sweep_report(sweep, SPACE, [best], None, TASK)
    assert "<td>0.5000</td><td>–</td><td>1</td>" in sweep.read("report.html").decode()
    console = Console(file=io.StringIO(), width=200)
    console.print(sweep_table(read_trials(sweep), [best], TASK))
    assert re.search(r"0\.5000 .* – ", console.file.getvalue())
