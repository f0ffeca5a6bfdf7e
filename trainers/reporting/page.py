"""A run as one page, rendered from the files of its folder."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from cluster.console.printable import printable
from cluster.storage.uris import Store
from trainers.reporting.charts import draw_charts
from trainers.reporting.goodput import parts_of
from trainers.reporting.metrics import events_of
from trainers.reporting.results import (
    Measure,
    RunFiles,
    Score,
    Totals,
    attempts_of,
    energy_of,
    judged,
    measures_of,
    peak_in_words,
    read_run,
    scores_of,
    totals_of,
)
from trainers.reporting.units import count, duration, energy, flop, mass, n_gram, size

REPORT = "report.html"


TEMPLATE = "report.html"


def write_report(store: Store) -> str:
    """Makes the page of a run and puts it there; returns its URI. ValueError if no run is there."""
    run = read_run(store)
    store.put(REPORT, render(run, name=store.uri.rstrip("/").rpartition("/")[2]).encode())
    return f"{store.uri.rstrip('/')}/{REPORT}"


def render(run: RunFiles, name: str) -> str:
    """The page as HTML, whole in itself."""
    environment = page_environment()
    environment.filters |= {
        "count": count,
        "size": size,
        "duration": duration,
        "energy": energy,
        "mass": mass,
        "settings": lambda settings: ", ".join(f"{key} {value}" for key, value in settings.items()),
    }
    return environment.get_template(TEMPLATE).render(page(run, name))


def page_environment() -> jinja2.Environment:
    """How the pages of this folder are rendered: whole in themselves, with the style of `page.css`.

    All that is filled in is escaped, without keys and control characters; only a chart is markup.
    """
    return jinja2.Environment(
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value), lines=True),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )


def page(run: RunFiles, name: str) -> dict[str, Any]:
    """What the template is filled with."""
    totals, scores, measures = totals_of(run), scores_of(run), measures_of(run)
    return {
        "name": name,
        "state": state(run, totals),
        "numbers": list(headline(run, totals, scores, measures)),
        "scores": scores,
        "n_gram": n_gram(run.floor),
        "measures": measures,
        "reading": reading(run, scores, measures),
        "charts": draw_charts(run.history, run.attempts, run.floor),
        "marks": marks(run),
        "attempts": attempts_of(run.attempts),
        "repeated": repeated(totals),
        "time": parts_of(run.goodput) if totals else [],
        "skipped": [
            {
                "step": event["step"],
                "reason": event.get("reason", ""),
                "documents": event.get("documents", []),
            }
            for event in events_of(run.attempts, "skipped")
        ],
        "energy": energy_of(run),
        "samples": run.samples,
        "corpus": corpus_table(run.manifest),
        "plan": run.plan,
        "config": None
        if run.config is None
        else yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        "environment": list(flatten(run.environment or {})),
        "made": f"Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC from {len(run.attempts):,} records.",
    }


def state(run: RunFiles, totals: Totals | None) -> str:
    """One line: how far the run is, and of what it is."""
    planned = ((run.config or {}).get("run") or {}).get("steps")
    if totals is None:
        return "No step finished yet."
    trained = f"{count(totals.tokens)} tokens in {duration(totals.step_seconds)} of training"
    if run.test is not None:
        return f"Finished after {totals.steps:,} steps: {trained}."
    of_all = f" of {planned:,}" if planned else ""
    return f"Under way or interrupted: step {totals.steps:,}{of_all}, {trained}."


def headline(
    run: RunFiles, totals: Totals | None, scores: Sequence[Score], measures: Sequence[Measure]
) -> Iterator[dict[str, str]]:
    """The numbers at the top, each with its unit and what it is of."""

    def number(name: str, value: str, unit: str, note: str) -> dict[str, str]:
        return {"name": name, "value": value, "unit": unit, "note": note}

    for score in reversed(scores):
        note = f"perplexity {score.perplexity:,.1f} per token" if score.perplexity is not None else ""
        if score.below_floor is not None:
            relation = "below" if score.below_floor >= 0 else "above"
            note = f"{abs(score.below_floor):.1%} {relation} the byte {n_gram(run.floor)}"
        yield number(score.split.capitalize(), f"{score.bits_per_byte:.3f}", "bits/byte", note)
    for measure in reversed(measures):
        if measure.name.endswith("_accuracy"):
            note = "" if measure.baseline is None else f"counting alone: {measure.text(measure.baseline)}"
            yield number(
                f"{measure.split}: {measure.title}".capitalize(), measure.text(measure.value), "", note
            )
    if totals:
        median = f"median step {count(round(totals.median_tokens_per_second))}"
        yield number("Throughput", count(round(totals.tokens_per_second)), "tokens/s", median)
        if totals.mfu is not None:
            yield number("Utilization (MFU)", f"{totals.mfu:.1%}", "", f"of {peak_in_words(run)}")
        yield number("Waiting for data", f"{totals.data_wait_share:.2%}", "", "of training time")
        yield number("Checkpoint stalls", f"{totals.stall_share:.2%}", "", "of training time")
        validated = f"and {duration(totals.validation_seconds)} of validation"
        yield number("Training time", duration(totals.step_seconds), "", validated)
    if estimate := energy_of(run):
        yield number("Energy, estimated", energy(estimate.kwh), "", f"{mass(estimate.co2_grams)} CO2")


def reading(run: RunFiles, scores: Sequence[Score], measures: Sequence[Measure]) -> str:
    """How the table of results is to be read."""
    if not scores and not measures:
        return ""
    step = f"{judged(run)[0][1]:,}"
    if run.test is None:
        chosen = f"Validation prefers the weights of step {step} so far; the test split has not been read."
    else:
        chosen = f"Validation chose the weights of step {step}; then the test split was read, once."
    told = [chosen]
    if ((run.config or {}).get("engine") or {}).get("precision", "bf16") == "bf16":
        told.append(
            "Losses are those of bfloat16, as in training; the exported float32 has slightly other ones."
        )
    if scores:
        told.append(f"{floor_in_words(run)}Perplexity depends on the tokenizer, bits per byte do not.")
    if run.baselines:
        told.append(
            "Counting alone: for hidden tokens the distribution of single tokens in "
            f"{count(run.baselines['fitted_tokens'])} tokens of training text (its most frequent one for the "
            "accuracy), for pairs the more frequent answer. Losses are in nats per target, and tell nothing of "
            "bits per byte."
        )
    return " ".join(told)


def floor_in_words(run: RunFiles) -> str:
    """What the model is compared with; empty if with nothing."""
    if not run.floor:
        return ""
    fitted, smoothing = size(run.floor["fitted_bytes"]), run.floor["smoothing"]
    orders = len(run.floor.get("validation_by_order", ()))
    chosen = f"; of orders 1 to {orders} the best on validation" if orders else ""
    return (
        f"The byte {n_gram(run.floor)} ({smoothing}{chosen}), fitted on {fitted} of training text and scored "
        "on the same text as the model, is what counting alone achieves. "
    )


def marks(run: RunFiles) -> str:
    """What the marks in the charts mean, if there are any."""
    sentences = ["Curves of many steps are averaged; the pale band is the range."]
    if any(event["step"] for event in events_of(run.attempts, "start")):
        sentences.append("Dotted lines: the run went on from a checkpoint.")
    if events_of(run.attempts, "skipped"):
        sentences.append("Red ticks: steps that the guard skipped.")
    return " ".join(sentences)


def repeated(totals: Totals | None) -> str:
    """How much was done twice."""
    if not totals or not totals.repeated:
        return "No step was done twice."
    return f"Steps done again after a restart: {totals.repeated:,}. Sums and curves count each step once."


def corpus_table(manifest: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Rows by split and source, from the `summary` of manifest.json."""
    if not manifest or "summary" not in manifest:
        return None
    summary = manifest["summary"]
    rows = [
        {"split": split, "source": source, **counts}
        for split, sources in summary["splits"].items()
        for source, counts in sources.items()
    ]
    duplicates, broken = sum(row["duplicates"] for row in rows), sum(summary.get("set_aside", {}).values())
    return {
        "rows": rows,
        "has_sources": len({row["source"] for row in rows}) > 1,
        "left_out": f"Left out: {duplicates:,} duplicates; {broken:,} broken records, set aside with why.",
    }


def flatten(tree: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, str]]:
    """("a.b", value) for each leaf of nested mappings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", _readable(key, value)


def _readable(key: str, value: Any) -> str:
    if isinstance(value, int | float) and key.endswith("_bytes"):
        return size(value)
    if isinstance(value, int | float) and key.endswith("flops_per_second"):
        return f"{flop(value)}/s"
    return str(value)
