"""Curves of a run as SVG, small enough for a phone and sharp in print.

Blue is what training measured, orange is validation, grey is a reference. Lines are labelled where they end,
not in a legend; the unit stands over the axis. Restarts are dotted lines, skipped steps red ticks.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from cluster.console.printable import printable
from trainers.reporting.metrics import Record, events_of, steps_of, validations_of
from trainers.reporting.units import count, duration, n_gram

BLUE, ORANGE, GREY, RED, INK = "#1d4ed8", "#c2410c", "#6b7280", "#b91c1c", "#1f2937"
MAX_POINTS = 400
"""Points of a curve, about a chart's width in pixels. More steps are averaged, their range drawn behind."""
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: sharp, small, and in the reader's own font
    "svg.hashsalt": "chart",  # the same run gives the same bytes
    "font.size": 10,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "text.parse_math": False,  # the name of a metric or label may hold a $
}


def _tick(number: float, position: int | None = None) -> str:
    """As short as the frame's left margin is narrow."""
    if abs(number) >= 1000:
        return count(number)
    if 0 < abs(number) < 0.01:
        digits, _, exponent = f"{number:.1e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{number:g}"


TICKS = FuncFormatter(_tick)


@dataclass(frozen=True)
class Chart:
    """A drawn chart."""

    title: str
    caption: str
    """What is shown, in words that stand without the picture."""
    svg: Markup
    """An SVG element."""


@dataclass(frozen=True)
class Curve:
    """A value over steps in at most MAX_POINTS points: four equally long arrays."""

    step: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


Value = Callable[[Record], float | None]


def curve_of(records: Sequence[Record], value: Value) -> Curve:
    """The value of each record over its step, averaged in groups; None and what is not finite is left out."""
    points = [(record["step"], value(record)) for record in records]
    known = [(step, number) for step, number in points if number is not None and math.isfinite(number)]
    groups = np.array_split(np.array(known, float).reshape(-1, 2), min(MAX_POINTS, max(1, len(known))))
    rows = [(*group.mean(axis=0), group[:, 1].min(), group[:, 1].max()) for group in groups if len(group)]
    return Curve(*np.array(rows, float).reshape(-1, 4).T)


def draw_charts(history: Sequence[Record], attempts: Sequence[Record], floor: Record | None) -> list[Chart]:
    """Every chart that the records allow; `floor`: `floor.json`."""
    steps, validations = steps_of(history), validations_of(history)
    if not steps:
        return []
    panel = Panel(last_step=max(record["step"] for record in history), attempts=attempts)
    stalls = [record for record in steps if record["checkpoint_stall_seconds"] > 0]
    stalled = sum(record["checkpoint_stall_seconds"] for record in stalls)
    charts = [
        panel.draw(
            "Loss", "nats per target", "Of each step's batch before its update, and of the validation rows.",
            lambda axes: _draw_loss(axes, steps, validations),
        ),
        panel.draw(
            "Validation", "bits per byte", "Bits for a byte of text not trained on; lower is better.",
            lambda axes: _draw_validation(axes, validations, floor),
        )
        if any(record["validation"].get("bits_per_byte") is not None for record in validations)
        else None,
        *(
            panel.line(
                validations, name.replace("_", " ").capitalize(), "%", "Share of the validation rows' targets.",
                _share(name), "{:.1f}".format,
            )
            for name in dict.fromkeys(key for record in validations for key in record["validation"])
            if name.endswith("_accuracy")
        ),
        panel.line(steps, "Learning rate", "", "Rate of each step.", lambda r: r.get("lr"), "{:.2g}".format),
        panel.line(
            steps, "Gradient norm", "log scale", "Norm of the global gradient, before clipping.",
            lambda r: r.get("grad_norm"), "{:.2g}".format, log=True,
        ),
        panel.line(
            steps, "Throughput", "tokens/s", "Tokens of a step over its seconds, waits and stalls included.",
            lambda r: r["tokens_per_second"], lambda rate: count(round(rate)),
        ),
        panel.line(
            steps, "Waiting for data", "% of a step", "Share of each step without data to compute on.",
            lambda r: 100 * r["data_wait_seconds"] / r["step_seconds"], "{:.2g}".format, at_least=1.0,
        ),
        panel.draw(
            "Checkpoint stalls", "seconds", f"{len(stalls)} stalls, {duration(stalled)} of training in all.",
            lambda axes: _draw_stalls(axes, stalls),
        ),
        panel.line(
            steps, "Memory", "GiB", "Of worker 0: the most on its accelerator, or held now on a CPU.",
            lambda r: r["memory_bytes"] / 2**30 if r.get("memory_bytes") else None, "{:.2f}".format,
        ),
    ]  # fmt: skip
    return [chart for chart in charts if chart is not None]


class Panel:
    """The frame that all charts of a run share: the same steps across, the same marks."""

    def __init__(self, last_step: int, attempts: Sequence[Record]) -> None:
        self._last_step = last_step
        self._restarts = sorted({event["step"] for event in events_of(attempts, "start")} - {0})
        self._skipped = sorted({event["step"] for event in events_of(attempts, "skipped")})

    def line(
        self,
        records: Sequence[Record],
        title: str,
        unit: str,
        caption: str,
        value: Value,
        text: Callable[[float], str],
        *,
        log: bool = False,
        at_least: float = 0.0,
    ) -> Chart | None:
        """One blue curve from zero up, its last value written beside it; None if no record has the value."""
        curve = curve_of(records, value)
        if not len(curve.step):
            return None

        def draw(axes: Axes) -> None:
            _draw_curve(axes, curve, BLUE)
            _label(axes, curve.step[-1], curve.mean[-1], text(curve.mean[-1]), BLUE)
            if log and curve.low.min() > 0:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
                axes.yaxis.set_minor_locator(NullLocator())
                axes.yaxis.set_major_formatter(TICKS)
            else:
                axes.set_ylim(0, max(at_least, 1.08 * curve.high.max()) or 1.0)

        return self.draw(title, unit, caption, draw)

    def draw(self, title: str, unit: str, caption: str, draw: Callable[[Axes], None]) -> Chart:
        """Draws into the frame and takes the SVG out."""
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(4.9, 2.6))
            axes = figure.add_axes(
                (0.115, 0.14, 0.72, 0.73)
            )  # fixed, so that charts line up below each other
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter(TICKS)
            draw(axes)
            self._mark(axes)
            axes.set_xlim(0, self._last_step)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: count(round(step))))
            axes.text(-0.16, 1.07, unit, transform=axes.transAxes, color=GREY)
            axes.text(1.07, -0.05, "step", transform=axes.transAxes, color=GREY, va="top")
            output = io.StringIO()
            figure.savefig(output, format="svg", metadata={"Date": None, "Creator": None})
        return Chart(title, caption, _embeddable(output.getvalue(), title))

    def _mark(self, axes: Axes) -> None:
        for step in self._restarts:
            axes.axvline(step, color=GREY, linewidth=0.8, linestyle=":")
            top = axes.get_xaxis_transform()
            axes.text(step, 1.0, "restart ", transform=top, color=GREY, ha="right", va="top", fontsize=8)
        for step in self._skipped:
            axes.axvline(step, 0, 0.06, color=RED, linewidth=1.5)


def draw_plain(
    title: str, unit: str, across: str, caption: str, draw: Callable[[Axes], None], *, width: float = 4.9
) -> Chart:
    """A chart outside of a run's frame: `unit` stands over the axis, `across` names what runs to the right."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, 2.6))
        axes = figure.add_axes((0.13, 0.16, 0.83, 0.70))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        draw(axes)
        axes.text(-0.12, 1.07, unit, transform=axes.transAxes, color=GREY)
        axes.set_xlabel(across, color=GREY, loc="right", labelpad=0)
        output = io.StringIO()
        figure.savefig(output, format="svg", metadata={"Date": None, "Creator": None})
    return Chart(title, caption, _embeddable(output.getvalue(), title))


def _share(name: str) -> Value:
    def value(record: Record) -> float | None:
        found = record["validation"].get(name)
        return None if found is None else 100 * found

    return value


def _draw_loss(axes: Axes, steps: Sequence[Record], validations: Sequence[Record]) -> None:
    training = curve_of(steps, lambda r: r["loss"])
    validation = curve_of(validations, lambda r: r["validation"].get("loss"))
    ends = []
    for curve, color, name in ((training, BLUE, "training"), (validation, ORANGE, "validation")):
        if len(curve.step):
            _draw_curve(axes, curve, color, marker="o" if curve is validation else "")
            ends.append((curve.step[-1], curve.mean[-1], f"{name}\n{curve.mean[-1]:.2f}", color))
    _label_apart(axes, ends)


def _draw_validation(axes: Axes, validations: Sequence[Record], floor: Record | None) -> None:
    curve = curve_of(validations, lambda r: r["validation"].get("bits_per_byte"))
    _draw_curve(axes, curve, ORANGE, marker="o")
    ends = (
        [(curve.step[-1], curve.mean[-1], f"model\n{curve.mean[-1]:.3f}", ORANGE)] if len(curve.step) else []
    )
    if floor and "validation" in floor:
        bits = floor["validation"]
        axes.axhline(bits, color=GREY, linewidth=1.2, linestyle="--")
        ends.append((axes.get_xlim()[1], bits, f"{n_gram(floor)}\n{bits:.3f}", GREY))
    _label_apart(axes, ends)


def _draw_stalls(axes: Axes, stalls: Sequence[Record]) -> None:
    seconds = [record["checkpoint_stall_seconds"] for record in stalls]
    axes.vlines([record["step"] for record in stalls], 0, seconds, color=BLUE, linewidth=1.5)
    axes.set_ylim(0, 1.08 * max(seconds, default=1.0))


def _draw_curve(axes: Axes, curve: Curve, color: str, marker: str = "") -> None:
    if (curve.high > curve.low).any():
        axes.fill_between(curve.step, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
    axes.plot(curve.step, curve.mean, color=color, linewidth=1.4, marker=marker, markersize=3)


def _label(axes: Axes, step: float, value: float, text: str, color: str) -> None:
    axes.annotate(
        text, (1, value), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", color=color,
        va="center", fontsize=9, annotation_clip=False,
    )  # fmt: skip


def _label_apart(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Labels at the right edge, moved apart where their two lines of text would overlap."""
    low, high = axes.get_ylim()
    height = 0.19 * (high - low)
    at = -math.inf
    for step, value, text, color in sorted(ends, key=lambda end: end[1]):
        at = max(value, at + height)
        _label(axes, step, at, text, color)


def _embeddable(document: str, title: str) -> Markup:
    """The SVG element alone, named for those who cannot see it, in the page's font, as wide as its place.

    Markup: its text is escaped by matplotlib, and only tags are changed here.
    """
    svg = printable(document[document.index("<svg") :], lines=True)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    salt = re.sub(r"\W+", "-", title.lower())  # ids must be unique in the page

    def changed(tag: re.Match[str]) -> str:
        in_page_font = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", tag[0])
        return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{salt}-", in_page_font)

    svg = re.sub(r"<[^>]*>", changed, svg)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(printable(title))}" ', 1))
