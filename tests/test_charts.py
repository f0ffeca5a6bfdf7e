import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.reporting.charts import MAX_POINTS, curve_of, draw_charts

FLOOR = {"order": 7, "validation": 2.3, "test": 2.2}


def step(number, **values):
    record = {
        "step": number,
        "attempt": 1,
        "time": float(number),
        "loss": 8.0 / number,
        "lr": 1e-3,
        "grad_norm": 1.0 / number,
        "tokens": 4_096,
        "step_seconds": 2.0,
        "data_wait_seconds": 0.01,
        "checkpoint_stall_seconds": 0.25 if number % 10 == 0 else 0.0,
        "tokens_per_second": 2_048.0,
        "memory_bytes": 2**30,
    }
    return record | values


def validation(number):
    found = {"loss": 4.0, "bits_per_byte": 2.0}
    return {"step": number, "validation": found, "attempt": 1, "time": 0.0}


def start(number):
    return {"step": number, "event": "start", "attempt": 1, "time": 0.0}


RECORDS = [start(0), *(step(n) for n in range(1, 31)), validation(10), validation(20), start(20)]


def words(chart):
    return " ".join(
        "".join(text.itertext()) for text in ElementTree.fromstring(chart.svg).iter() if text.text
    )


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3 * MAX_POINTS))
def test_an_averaged_curve_keeps_mean_and_range(values):
    records = [{"step": number, "value": value} for number, value in enumerate(values, start=1)]
    curve = curve_of(records, lambda record: record["value"])
    assert len(curve.step) == min(len(values), MAX_POINTS)
    assert (curve.low.min(), curve.high.max()) == (min(values), max(values))
    assert np.all((curve.low <= curve.mean + 1e-6) & (curve.mean <= curve.high + 1e-6))
    if len(values) <= MAX_POINTS or len(values) % MAX_POINTS == 0:  # equal groups
        assert curve.mean.mean() == pytest.approx(np.mean(values), abs=1e-6)


def test_what_is_not_known_is_left_out_of_a_curve():
    values = [1.0, None, float("nan"), float("inf"), 3.0]
    records = [{"step": number, "value": value} for number, value in enumerate(values)]
    curve = curve_of(records, lambda record: record["value"])
    assert curve.step.tolist() == [0, 4] and curve.mean.tolist() == [1.0, 3.0]


def test_every_curve_of_a_run_is_drawn_with_its_unit_and_last_value():
    charts = {chart.title: chart for chart in draw_charts(RECORDS, RECORDS, floor=FLOOR)}
    assert list(charts) == [
        "Loss",
        "Validation",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Waiting for data",
        "Checkpoint stalls",
        "Memory",
    ]
    assert all("step" in words(chart) and "restart" in words(chart) for chart in charts.values())
    for title, parts in {
        "Loss": ["nats per target", "training", "0.27", "validation", "4.00"],
        "Validation": ["bits per byte", "model", "2.000", "7-gram", "2.300"],
        "Throughput": ["tokens/s", "2,048"],
        "Waiting for data": ["% of a step", "0.5"],
        "Memory": ["GiB", "1.00"],
    }.items():
        assert all(part in words(charts[title]) for part in parts), title
    assert charts["Checkpoint stalls"].caption == "3 stalls, 0.75 s of training in all."


def test_charts_can_stand_in_one_page():
    charts = draw_charts(RECORDS, RECORDS, floor=None)
    ids = [name for chart in charts for name in re.findall(r' id="([^"]+)"', chart.svg)]
    assert len(ids) == len(set(ids))
    for chart in charts:
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', chart.svg))
        assert used <= set(re.findall(r' id="([^"]+)"', chart.svg))
        assert 'pt"' not in chart.svg.split(">", 1)[0]  # as wide as its place
        assert f'aria-label="{chart.title}"' in chart.svg


def test_the_same_run_gives_the_same_bytes():
    assert draw_charts(RECORDS, RECORDS, floor=FLOOR) == draw_charts(RECORDS, RECORDS, floor=FLOOR)


def test_a_run_without_validation_or_memory_has_no_empty_charts():
    records = [step(n, memory_bytes=None, loss=None) for n in range(1, 5)]
    titles = [chart.title for chart in draw_charts(records, records, floor=None)]
    assert "Validation" not in titles and "Memory" not in titles and "Loss" in titles


def test_one_step_is_enough_and_none_gives_nothing():
    assert draw_charts([step(1)], [step(1)], floor=None)
    assert draw_charts([], [], floor=None) == []
