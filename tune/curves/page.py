"""A label-efficiency curve as a page."""

from collections.abc import Mapping, Sequence

import jinja2
import numpy as np
from matplotlib.axes import Axes

from cluster.storage.uris import Store
from trainers.reporting.charts import BLUE, GREY, INK, ORANGE, Chart, draw_plain
from trainers.reporting.page import REPORT, page_environment
from trainers.tasks.metrics import interval_told
from trainers.tasks.splits import PreparedTask
from trainers.tasks.task import Draw, TaskConfig
from tune.curves.curve import CurvePoint, Saving

COLORS = {"pretrained": BLUE, "scratch": ORANGE, "linear": INK, "majority": GREY}


def tune_pages() -> jinja2.Environment:
    """As the pages of trainers/, with the templates of this folder before theirs."""
    environment = page_environment()
    environment.filters["interval_told"] = interval_told
    assert environment.loader is not None
    environment.loader = jinja2.ChoiceLoader(
        [
            jinja2.PackageLoader("tune.curves", "."),
            jinja2.PackageLoader("tune.sweeps", "."),
            environment.loader,
        ]
    )
    return environment


def write_curve_report(
    store: Store,
    prepared: PreparedTask,
    points: Sequence[CurvePoint],
    saved: Mapping[str, Sequence[Saving]],
    draw: Draw,
) -> str:
    """Make the page and put it there; returns its URI."""
    task = prepared.task
    page = {
        "draw": draw,
        "pool": prepared.counts,
        "lacking": {point.budget: told(point.lacking) for point in points if any(point.lacking)},
        "name": store.uri.rstrip("/").rpartition("/")[2],
        "task": task,
        "chart": curve_chart(task, points),
        "points": sorted(points, key=lambda point: (point.budget, list(COLORS).index(point.arm))),
        "arms": list(saved),
        "rows": list(zip(*saved.values(), strict=True)),
    }
    store.put(REPORT, tune_pages().get_template("curve_report.html").render(page).encode())
    return f"{store.uri.removeprefix('file://')}/{REPORT}"


def told(numbers: Sequence[int]) -> str:
    """One number for each seed, or the one that they share."""
    return " / ".join(f"{number:,}" for number in (numbers if len(set(numbers)) > 1 else numbers[:1]))


def curve_chart(task: TaskConfig, points: Sequence[CurvePoint]) -> Chart:
    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        for arm, color in COLORS.items():
            ours = sorted((point for point in points if point.arm == arm), key=lambda point: point.budget)
            if not ours:
                continue
            x = [point.budget for point in ours]
            ends = np.array([(p.low, p.high) for p in ours], float)  # NaN where there is no interval
            axes.fill_between(x, *ends.T, color=color, alpha=0.12, linewidth=0)
            axes.plot(x, [p.mean for p in ours], color=color, linewidth=1.4, marker="o", markersize=3)
            axes.annotate(
                arm,
                (x[-1], ours[-1].mean),
                (4, 0),
                textcoords="offset points",
                color=color,
                fontsize=8,
                va="center",
            )
        axes.margins(x=0.18)

    caption = "Mean over seeds on the test split; the band is the 95 % interval of Student's t over seeds that differ."
    return draw_plain("Labels and accuracy", task.judged_by, "training labels", caption, draw)
