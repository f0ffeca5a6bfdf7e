import io
import json
import re
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from cluster.storage.uris import open_store
from trainers.reporting.goodput import Goodput
from trainers.reporting.metrics import MetricsWriter
from trainers.reporting.page import write_report
from trainers.reporting.results import read_run, results_table

PROJECT = Path(__file__).resolve().parents[1]
COUNTS = {
    "fragments": 9,
    "documents": 34,
    "bytes": 4_794_898,
    "tokens": 1_571_234,
    "bytes_per_token": 3.05,
    "duplicates": 2,
}
FILES = {
    "config.yaml": yaml.safe_dump({"run": {"steps": 20}, "energy": {"overhead": 1.5}}),
    "manifest.json": json.dumps(
        {"digest": "0" * 16, "summary": {"splits": {"train": {"plays": COUNTS}}, "set_aside": {"plays": 3}}}
    ),
    "environment.json": json.dumps({"watts_per_worker": 50.0, "hardware": {"memory_bytes": 2**34}}),
    "plan.txt": "tokens       20 steps",
    "best.json": json.dumps(
        {
            "step": 10,
            "checkpoint": "step-00000010-w2-a1",
            "bits_per_byte": 2.0,
            "loss": 4.0,
            "why": "lowest loss",
        }
    ),
    "test.json": json.dumps({"step": 10, "bits_per_byte": 1.9, "perplexity": 30.0}),
    "floor.json": json.dumps(
        {
            "order": 6,
            "smoothing": "modified Kneser-Ney",
            "fitted_bytes": 2**20,
            "validation": 2.5,
            "test": 2.4,
        }
    ),
    "samples.json": json.dumps(
        [
            {
                "prompt": "ROMEO. ",
                "continuation": "<script>alert('x')</script>",
                "settings": {"temperature": 0.8},
            }
        ]
    ),
}


@pytest.fixture
def run(tmp_path):
    """A finished run of 20 steps with a restart after step 10 and a skipped step."""
    store = open_store(str(tmp_path / "a-run"))
    for path, text in FILES.items():
        store.put(path, text.encode())
    for attempt, first, last in ((1, 0, 12), (2, 10, 20)):
        with MetricsWriter(store, attempt, 1e6) as writer:
            writer.write({"step": first, "event": "start", "world_size": 2})
            for step in range(first + 1, last + 1):
                writer.write(
                    {
                        "step": step,
                        "loss": 4.0,
                        "lr": 1e-3,
                        "grad_norm": 1.0,
                        "tokens": 4_096,
                        "step_seconds": 2.0,
                        "data_wait_seconds": 0.02,
                        "checkpoint_stall_seconds": 0.0,
                        "tokens_per_second": 2_048.0,
                        "mfu": 0.25,
                        "memory_bytes": 2**30,
                    }
                )
            validation = {"loss": 4.0, "bits_per_byte": 2.0, "perplexity": 54.6, "seconds": 1.0}
            writer.write({"step": 10 * attempt, "validation": validation})
            if attempt == 2:
                writer.write({"step": 15, "event": "skipped", "reason": "loss", "documents": ["plays/<one>"]})
    return store


class Page(HTMLParser):
    """Text and tags of a page; fails where a tag is not closed."""

    VOID = {"meta", "br"}

    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self.open = "", [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += f" {data}"


def page_of(store):
    write_report(store)
    return Page(store.read("report.html").decode())


def test_the_page_names_the_order_of_the_floor_and_how_it_was_chosen(run):
    floor = json.loads(run.read("floor.json")) | {"order": 7, "validation_by_order": [2.6] * 6 + [2.5, 2.6]}
    run.put("floor.json", json.dumps(floor).encode())
    text = re.sub(r"\s+", " ", page_of(run).text)
    assert "The byte 7-gram (modified Kneser-Ney; of orders 1 to 8 the best on validation)" in text
    assert "below the byte 7-gram" in text and "6-gram" not in text


def test_the_page_holds_every_number_of_the_run(run):
    text = re.sub(r"\s+", " ", page_of(run).text)
    for part in (
        "Finished after 20 steps: 81.9 k tokens in 40 s of training.",
        "1.900 bits/byte 20.8% below the byte 6-gram",  # 1 - 1.9 / 2.4
        "2.000 bits/byte 20.0% below the byte 6-gram",
        "2,048 tokens/s",
        "25.0%",  # MFU
        "6-gram (modified Kneser-Ney), fitted on 1.00 MiB",
        "1.00% of training time",  # waited 0.02 of 2 s
        "W in all while running, x 1.5 for the site (PUE)",
        "Steps done again after a restart: 2.",
        "4.57 MiB",
        "1.57 M",
        "Left out: 2 duplicates; 3 broken records",
        "16.0 GiB",
        "20 steps",
    ):
        assert part in text, part


def test_the_page_and_the_table_say_what_the_utilization_is_a_share_of(run):
    assert re.search(r"25.0%\s+of peak FLOP/s", page_of(run).text), "an older run did not say"
    for measured, words in (
        (True, "of a measured peak of 3.10 TFLOP/s a worker"),
        (False, "of the peak of 3.10"),
    ):
        with MetricsWriter(run, 4 - measured, 1e6) as writer:
            peak = {"peak_flops_per_second": 3.1e12, "peak_source": "somewhere", "peak_is_measured": measured}
            writer.write({"step": 20, "event": "start", "world_size": 2, **peak})
        assert words in page_of(run).text
        console = Console(file=io.StringIO(), width=200)
        console.print(results_table(read_run(run)))
        assert f"MFU 25.0% {words}" in console.file.getvalue()


def test_every_part_of_the_runs_time_stands_in_a_table_and_they_add_up_to_all_of_it(run):
    text = re.sub(r"\s+", " ", page_of(run).text)
    table = text[text.index("Where the time went") :]
    shares = {}
    for field in fields(Goodput):
        [share] = re.findall(rf" {field.name.replace('_', ' ')} [^%]*? (-?[\d.]+)%", table)
        shares[field.name] = float(share)
    assert sum(shares.values()) == pytest.approx(100, abs=0.1 * len(shares))
    assert shares["training"] > shares["recomputed"] > 0  # two of twenty-two steps


def test_the_page_is_laid_out_for_phones_and_for_print(run):
    tags = page_of(run).tags
    html = run.read("report.html").decode()
    assert "@media print" in html and "@media (max-width" in html
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags


def test_the_page_needs_nothing_but_itself(run):
    page = page_of(run)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe", "image")]
    targets = [
        value for _, attributes in page.tags for key, value in attributes.items() if key.endswith("href")
    ]
    assert all(target.startswith("#") for target in targets)
    assert "@import" not in run.read("report.html").decode()


def test_text_from_the_run_stays_text(run):
    page = page_of(run)
    assert "<script>alert('x')</script>" in page.text and "plays/<one>" in page.text


@pytest.mark.parametrize(
    "missing", [*FILES, "metrics", "everything but metrics", "everything but config.yaml"]
)
def test_a_run_under_way_has_a_page_too(run, missing):
    keep = {"everything but metrics": ["metrics"], "everything but config.yaml": ["config.yaml"]}.get(missing)
    for info in run.list():
        top = info.path.partition("/")[0]
        if (top not in keep) if keep else top == missing:
            run.delete(info.path)
    text = page_of(run).text
    assert "None" not in text and "nan" not in text
    if missing == "test.json":
        assert "Under way or interrupted: step 20 of 20" in text and "has not been read" in text
    if missing in ("metrics", "everything but config.yaml"):
        assert "No step finished yet." in text


def test_the_command_rebuilds_the_page_of_any_run(run, tmp_path):
    script = str(PROJECT / "trainers" / "report.py")
    command = [sys.executable, script, "--run", str(tmp_path / "a-run")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("a-run/report.html"), done.stderr
    assert "1.900" in run.read("report.html").decode()


def test_a_place_without_a_run_is_an_error_in_one_line(tmp_path):
    script = str(PROJECT / "trainers" / "report.py")
    done = subprocess.run([sys.executable, script, "--run", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and str(tmp_path) in done.stderr
