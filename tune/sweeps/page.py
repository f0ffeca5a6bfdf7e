"""A sweep as a table and as one page with plots."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from matplotlib.axes import Axes
from rich.table import Table

from cluster.storage.uris import Store
from trainers.reporting.charts import BLUE, GREY, ORANGE, Chart, draw_plain
from trainers.reporting.page import REPORT
from trainers.reporting.units import duration
from trainers.tasks.metrics import interval_told
from tune.curves.page import tune_pages
from tune.search.measure import Measured
from tune.search.proposals import as_trial
from tune.search.space import Dimension, SearchSpace
from tune.sweeps.finalists import Finalist
from tune.trials.records import TrialRecord, read_trials

TEMPLATE = "sweep_report.html"


def sweep_table(trials: Sequence[TrialRecord], finalists: Sequence[Finalist], task: Measured) -> Table:
    """The best points with their intervals, and how many trials ended how."""
    counts = {status: sum(r.status == status for r in trials) for status in ("finished", "stopped", "failed")}
    table = Table(
        "point", f"validation {task.judged_by}", "95 % interval over seeds", "seeds",
        title=", ".join(f"{number} {status}" for status, number in counts.items()),
    )  # fmt: skip
    for finalist in finalists:
        table.add_row(
            described(finalist.point),
            f"{task.oriented(finalist.mean):.4f}",
            interval(finalist, task),
            str(len(finalist.scores)),
        )
    return table


def interval(finalist: Finalist, task: Measured) -> str:
    """Its ends as the metric, the lower first; a dash where its seeds say nothing of the spread."""
    ends = (finalist.low, finalist.high)
    return interval_told(*(sorted(task.oriented(end) for end in ends if end is not None) or ends))


def described(point: dict[str, Any]) -> str:
    """A point on one line."""
    return ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in point.items())


def write_sweep_report(
    sweep: Store,
    space: SearchSpace,
    finalists: Sequence[Finalist],
    judged: dict[str, Any] | None,
    task: Measured,
) -> str:
    """Make the page of a sweep and put it there; returns its URI."""
    trials = read_trials(sweep)
    first_seed = trials[0].seed
    searched = [trial for trial in trials if trial.seed == first_seed]
    environment = tune_pages()
    environment.filters |= {"duration": duration, "described": described, "interval": interval}
    page = {
        "name": sweep.uri.rstrip("/").rpartition("/")[2],
        "task": task,
        "trials": trials,
        "finalists": finalists,
        "judged": judged,
        "charts": list(sweep_charts(searched, space, task)),
    }
    sweep.put(REPORT, environment.get_template(TEMPLATE).render(page).encode())
    return f"{sweep.uri.rstrip('/').removeprefix('file://')}/{REPORT}"


def sweep_charts(trials: Sequence[TrialRecord], space: SearchSpace, task: Measured) -> list[Chart]:
    """Best so far against trials and cost, parallel coordinates, a slice for each key, and importance."""
    scored = [trial for trial in trials if trial.score is not None]
    if not scored:
        return []
    seconds = np.cumsum([trial.seconds for trial in scored]).tolist()
    charts = [
        best_chart("Best so far, by trials", "trial", scored, [trial.number for trial in scored], task),
        best_chart("Best so far, by cost", "trial seconds", scored, seconds, task),
        parallel_chart(scored, space, task),
        *(slice_chart(scored, dimension, task) for dimension in space.dimensions),
    ]
    importance = importances(scored, space)
    return [*charts, importance_chart(importance)] if importance else charts


def metrics_of(trials: Sequence[TrialRecord], task: Measured) -> list[float]:
    """The metric behind each score."""
    return [task.oriented(trial.score) for trial in trials if trial.score is not None]


def best_chart(
    title: str, across: str, trials: Sequence[TrialRecord], x: Sequence[float], task: Measured
) -> Chart:
    best = [task.oriented(score) for score in np.maximum.accumulate([trial.score or 0.0 for trial in trials])]

    def draw(axes: Axes) -> None:
        axes.plot(x, metrics_of(trials, task), color=GREY, linestyle="", marker="o", markersize=3)
        axes.step(x, best, color=BLUE, linewidth=1.4, where="post")

    caption = "Dots are trials, the line is the best so far."
    return draw_plain(title, f"validation {task.judged_by}", across, caption, draw)


def coordinate(dimension: Dimension, value: Any) -> float:
    """Where a value lies between the ends of its dimension, 0 to 1; on a logarithmic scale if it is searched on one."""
    if dimension.kind == "choice":
        return dimension.values.index(value) / max(1, len(dimension.values) - 1)
    low, high = dimension.values
    if dimension.kind == "loguniform":
        low, high, value = np.log([low, high, value]).tolist()
    return (value - low) / (high - low)


def parallel_chart(trials: Sequence[TrialRecord], space: SearchSpace, task: Measured) -> Chart:
    scores, metrics = np.array([trial.score for trial in trials], float), np.array(metrics_of(trials, task))
    shares = (scores - scores.min()) / (np.ptp(scores) or 1.0)
    ends = (metrics - metrics.min()) / (np.ptp(metrics) or 1.0)
    keys = [dimension.key.rpartition(".")[2] for dimension in space.dimensions]

    def draw(axes: Axes) -> None:
        for trial, share, end in sorted(zip(trials, shares, ends, strict=True), key=lambda line: line[1]):
            heights = [
                coordinate(d, trial.point[d.key]) if d.key in trial.point else np.nan
                for d in space.dimensions
            ]
            color = ORANGE if share == 1 else BLUE
            axes.plot(
                [*heights, end], color=color, alpha=1.0 if share == 1 else 0.15 + 0.5 * share, linewidth=1.2
            )
        axes.set_xticks(range(len(keys) + 1), [*keys, task.judged_by], fontsize=7)
        axes.set_yticks([0, 1], ["low", "high"])

    caption = (
        "Each line is a trial; the darker, the better; orange is the best. A gap: the key did not apply."
    )
    return draw_plain("Parallel coordinates", "", "", caption, draw)


def slice_chart(trials: Sequence[TrialRecord], dimension: Dimension, task: Measured) -> Chart:
    key = dimension.key
    having = [trial for trial in trials if key in trial.point]

    def draw(axes: Axes) -> None:
        if dimension.kind == "choice":
            axes.set_xticks(range(len(dimension.values)), [str(value) for value in dimension.values])
        elif dimension.kind == "loguniform":
            axes.set_xscale("log")
        values = [trial.point[key] for trial in having]
        at = [dimension.values.index(v) if dimension.kind == "choice" else v for v in values]
        axes.plot(at, metrics_of(having, task), color=BLUE, linestyle="", marker="o", markersize=3)

    caption = f"Each trial's {task.judged_by} over its {key}."
    return draw_plain(key, f"validation {task.judged_by}", key.rpartition(".")[2], caption, draw)


def importances(trials: Sequence[TrialRecord], space: SearchSpace) -> dict[str, float]:
    """Share of the scores' variance that each key explains, by PED-ANOVA (Watanabe et al. 2023); empty where
    trials are few."""
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        study.add_trial(as_trial(space, trial.point, trial.score))
    if len(trials) < 8 or len({trial.score for trial in trials}) < 2:
        return {}
    everywhere = [d.key for d in space.dimensions if not d.condition]
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    return optuna.importance.get_param_importances(study, evaluator=evaluator, params=everywhere)


def importance_chart(importance: dict[str, float]) -> Chart:
    keys = list(importance)[::-1]

    def draw(axes: Axes) -> None:
        axes.barh(
            [key.rpartition(".")[2] for key in keys],
            [importance[key] for key in keys],
            color=BLUE,
            height=0.6,
        )
        axes.tick_params("y", labelsize=7)

    caption = "How far the best quarter of the trials differs from all in each key (PED-ANOVA), as a share."
    return draw_plain("Importance", "", "share", caption, draw)
