"""No page holds an element that outside text brought: names of metrics, labels, sources and trials stay text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_task_report import answered, prepared_with, put_run

from cluster.storage.uris import Store, open_store
from trainers.finetuning.report import write_task_report
from trainers.reporting.metrics import MetricsWriter
from trainers.reporting.page import write_report
from tune.curves.curve import CurvePoint
from tune.curves.page import write_curve_report
from tune.search.measure import Measure
from tune.search.space import Dimension, SearchSpace
from tune.sweeps.finalists import Finalist
from tune.sweeps.page import write_sweep_report
from tune.trials.records import TrialRecord, record_outcome, trial_name

PLANTED = [
    '"><script>alert(1)</script>',
    "</text></svg><script>alert(1)</script>",
    "' onload='alert(1)' x='",
    '" onmouseover="alert(1)',
    "<img src=x onerror=alert(1)>",
    "font: 9px <iframe src=javascript:alert(1)>",
    "]]><!-- $x^$ --><script>",
    "{{ 7 * 7 }}",
    "\x1b[2J\x00\u202e",
]
PLAIN = "plain"


class Elements(HTMLParser):
    """Names of a page's elements and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[tuple[str, ...]] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add((tag, *sorted(name for name, _ in attrs)))


def pretraining_page(store: Store, text: str) -> None:
    summary = {
        "fragments": 1,
        "documents": 1,
        "bytes": 9,
        "tokens": 3,
        "bytes_per_token": 3.0,
        "duplicates": 0,
    }
    files = {
        "manifest.json": {
            "digest": "0" * 16,
            "summary": {"splits": {text: {text: summary, "b": summary}}, "set_aside": {text: 1}},
        },
        "environment.json": {text: text},
        "samples.json": [{"prompt": text, "continuation": text, "settings": {text: text}}],
        "config.yaml": {"run": {"steps": 2}, text: text},
    }
    for path, content in files.items():
        store.put(path, json.dumps(content).encode())
    store.put("plan.txt", text.encode(errors="replace"))
    step = {
        "loss": 4.0,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens": 4,
        "step_seconds": 2.0,
        "data_wait_seconds": 0.0,
    }
    step |= {"checkpoint_stall_seconds": 0.0, "tokens_per_second": 2.0, "mfu": 0.2, "memory_bytes": 2**30}
    with MetricsWriter(store, 1, 1e6) as writer:
        writer.write({"step": 0, "event": "start", "world_size": 1})
        for number in (1, 2):
            writer.write({"step": number} | step)
            found = {"loss": 4.0, f"{text}_accuracy": 0.5, "seconds": 1.0}
            writer.write({"step": number, "validation": found})
        writer.write({"step": 2, "event": "skipped", "reason": text, "documents": [text]})
    write_report(store)


def task_page(store: Store, text: str) -> None:
    put_run(store, [answered(text, "b", 0.5, text), answered("b", "b", 0.5, text)])
    store.put("config.yaml", text.encode(errors="replace"))
    write_task_report(store, prepared_with(Path(store.uri.removeprefix("file://")), [text, "b"]))


def sweep_page(store: Store, text: str) -> None:
    space = SearchSpace(
        (
            Dimension(f"mixture.weights.{text}", "uniform", (1.0, 2.0), {}),
            Dimension("adapt.train", "choice", (text, "lora"), {}),
        )
    )
    for number in range(9):
        point = {f"mixture.weights.{text}": 1 + number / 10, "adapt.train": (text, "lora")[number % 2]}
        trial = TrialRecord(
            trial_name(point, 0), point, 0, number + 1, "finished", number / 20, 1.0, error=text
        )
        record_outcome(store, trial)
    best = Finalist({f"mixture.weights.{text}": 1.0}, (0.5, 0.6), 0.55, 0.5, 0.6)
    write_sweep_report(store, space, [best], None, Measure(text, text))


def curve_page(store: Store, text: str) -> None:
    points = [
        CurvePoint(arm, budget, (0.5, 0.6), 0.55, 0.5, 0.6)
        for arm in ("pretrained", "scratch")
        for budget in (8, 16)
    ]
    prepared = prepared_with(Path(store.uri.removeprefix("file://")), [text, "b"])
    write_curve_report(store, prepared, points, {text: []}, "balanced")


@pytest.mark.slow
@pytest.mark.parametrize("page", [pretraining_page, task_page, sweep_page, curve_page])
def test_outside_text_brings_no_element_and_no_attribute_into_a_page(page, tmp_path: Path) -> None:
    def made(number: int, text: str) -> str:
        store = open_store(str(tmp_path / str(number)))
        page(store, text)
        return store.read("report.html").decode()

    expected = Elements(made(0, PLAIN)).found
    assert not {tag for tag, *_ in expected} & {"script", "img", "iframe", "object", "embed", "link"}
    for number, text in enumerate([*PLANTED[:1], " ".join(PLANTED), "".join(reversed(PLANTED))], 1):
        html = made(number, text)
        assert Elements(html).found <= expected, text
        assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", html), text
