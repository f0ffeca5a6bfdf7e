"""What a run came to, recomputed from its directory alone: totals, the comparison with the floor, energy.

Everything may be missing, for a run is looked at while it goes on; what is not known is None.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rich.table import Table

from cluster.configuration.config import from_dict
from cluster.configuration.stored_file import as_config, place_of, read_json, read_text, read_yaml
from cluster.hardware.machine import Energy, EnergyConfig, estimate_energy
from cluster.storage.uris import Store
from trainers.reporting.goodput import Goodput, goodput_line, goodput_of
from trainers.reporting.metrics import (
    Record,
    attempt_starts,
    events_of,
    one_history,
    read_attempts,
    steps_of,
    validations_of,
)
from trainers.reporting.units import count, duration, energy, flop, mass, n_gram
from trainers.stored.metric_records import METERED
from trainers.stored.run_files import (
    LEFT_OUT,
    MADE_ANEW,
    PUT_BACK,
    Baselines,
    Best,
    Environment,
    Floor,
    Interval,
    Pinned,
    Sample,
    StoredConfig,
    Verdict,
)

CONFIG, CONCLUDED = "config.yaml", "concluded.json"


@dataclass(frozen=True)
class RunFiles:
    """The files of a run directory, parsed; None for each that is not there (yet)."""

    config: dict[str, Any] | None
    manifest: dict[str, Any] | None
    environment: dict[str, Any] | None
    plan: str | None
    best: dict[str, Any] | None
    test: dict[str, Any] | None
    samples: list[dict[str, Any]] | None
    floor: dict[str, Any] | None
    """Bits per byte of the byte n-gram by split, and how it was made."""
    attempts: list[Record]
    """Every record of every attempt, in the order written."""
    baselines: dict[str, Any] | None = None
    """What counting alone reaches on hidden tokens and pairs, by split."""
    conclusions: list[Interval] = field(default_factory=list)
    """Of the drivers that concluded it."""

    @cached_property
    def history(self) -> list[Record]:
        """The run's one history, by step."""
        return one_history(self.attempts)

    @cached_property
    def goodput(self) -> Goodput:
        """Where its time went."""
        return goodput_of(self.attempts, self.conclusions)


def read_run(store: Store) -> RunFiles:
    """Reads the directory of a run, finished or under way.

    Raises:
        DamagedFileError: a file does not hold what the run writes there.
        ValueError: nothing of a run is there.
    """

    def parsed(path: str, shape: Any, remedy: str, not_finite: bool = False) -> Any:
        if not store.exists(path):
            return None
        return read_json(store, path, shape, remedy, not_finite=not_finite)

    config = read_yaml(store, CONFIG, StoredConfig, LEFT_OUT) if store.exists(CONFIG) else None
    as_config(EnergyConfig, (config or {}).get("energy") or {}, place_of(store, CONFIG), LEFT_OUT)
    run = RunFiles(
        config=config,
        manifest=parsed("manifest.json", Pinned, LEFT_OUT),
        environment=parsed("environment.json", Environment, LEFT_OUT),
        plan=read_text(store, "plan.txt", LEFT_OUT) if store.exists("plan.txt") else None,
        best=parsed("best.json", Best, LEFT_OUT),
        test=parsed("test.json", Verdict, PUT_BACK, not_finite=True),
        samples=parsed("samples.json", list[Sample], MADE_ANEW),
        floor=parsed("floor.json", Floor, MADE_ANEW),
        attempts=read_attempts(store, needed=METERED),
        baselines=parsed("baselines.json", Baselines, MADE_ANEW),
        conclusions=read_conclusions(store),
    )
    if run.config is None and not run.attempts:
        raise ValueError(
            f"{store.uri} has neither config.yaml nor metrics/; give the URI of a run's own folder"
        )
    return run


def read_conclusions(store: Store) -> list[Interval]:
    """Of the drivers that concluded a run; none of one that was finished before they noted it."""
    found: list[Interval] = []
    if store.exists(CONCLUDED):
        found = read_json(store, CONCLUDED, list[Interval], LEFT_OUT)
    return found


@dataclass(frozen=True)
class Attempt:
    """One start of the run."""

    number: int
    first_step: int
    """Finished steps when it began."""
    last_step: int
    num_workers: int | None
    seconds: float
    """By the clock, from its first record to its last."""
    watts: float | None
    """That each worker is taken to draw, by what the first of them saw; None if it did not say."""


def attempts_of(records: list[Record]) -> list[Attempt]:
    """The starts of a run in their order."""
    attempts = []
    for number, first_step in sorted(attempt_starts(records).items()):
        own = [record for record in records if record["attempt"] == number]
        starts = events_of(own, "start")
        times = [record["time"] for record in own]
        # The first record of an attempt without a start is that of a step, and stands at the step's end.
        before = 0.0 if starts else (steps_of(own) or [{"step_seconds": 0.0}])[0]["step_seconds"]
        attempts.append(
            Attempt(
                number=number,
                first_step=first_step,
                last_step=max(record["step"] for record in own),
                num_workers=starts[0].get("world_size") if starts else None,
                watts=starts[0].get("watts") if starts else None,
                seconds=max(times) - min(times) + before,
            )
        )
    return attempts


@dataclass(frozen=True)
class Totals:
    """Sums over the steps of the history, so that rates times seconds are amounts."""

    steps: int
    tokens: int
    step_seconds: float
    tokens_per_second: float
    """tokens / step_seconds."""
    median_tokens_per_second: float
    """Of a step: without compilation and checkpoints."""
    data_wait_share: float
    """Of step_seconds."""
    stall_share: float
    """Of step_seconds: stalls by checkpoints."""
    mfu: float | None
    """Model FLOP / what the peak would have done in step_seconds."""
    validation_seconds: float
    skipped: int
    repeated: int
    """Steps that were done again after a restart."""


def totals_of(run: RunFiles) -> Totals | None:
    """Sums over the history; None before the first step."""
    steps = steps_of(run.history)
    if not steps:
        return None
    seconds = sum(step["step_seconds"] for step in steps)
    tokens = sum(step["tokens"] for step in steps)
    rates = sorted(step["tokens_per_second"] for step in steps)
    with_mfu = [step for step in steps if step.get("mfu") is not None]
    mfu_seconds = sum(step["step_seconds"] for step in with_mfu)
    return Totals(
        steps=steps[-1]["step"],
        tokens=tokens,
        step_seconds=seconds,
        tokens_per_second=tokens / seconds,
        median_tokens_per_second=(rates[(len(rates) - 1) // 2] + rates[len(rates) // 2]) / 2,
        data_wait_share=sum(step["data_wait_seconds"] for step in steps) / seconds,
        stall_share=sum(step["checkpoint_stall_seconds"] for step in steps) / seconds,
        mfu=sum(step["mfu"] * step["step_seconds"] for step in with_mfu) / mfu_seconds if with_mfu else None,
        validation_seconds=sum(v["validation"].get("seconds", 0.0) for v in validations_of(run.history)),
        skipped=len({event["step"] for event in events_of(run.attempts, "skipped")}),
        repeated=len(steps_of(run.attempts)) - len(steps),
    )


def energy_of(run: RunFiles) -> Energy | None:
    """Energy of all attempts, repeated steps included; None where neither workers nor driver said the power.

    A driver may run on a host that has none of the workers' devices: what they say comes first.
    """
    drivers = (run.environment or {}).get("watts_per_worker") or 0.0
    joules = seconds = 0.0
    for attempt in attempts_of(run.attempts):
        watts: float = attempt.watts or drivers
        if not watts:
            return None
        joules += watts * attempt.seconds * (attempt.num_workers or 1)
        seconds += attempt.seconds
    if not seconds:
        return None
    config = from_dict(EnergyConfig, (run.config or {}).get("energy") or {})
    return estimate_energy(config, joules / seconds, seconds)


def peak_in_words(run: RunFiles) -> str:
    """What MFU is a share of, as the newest attempt said it; older runs did not."""
    starts = events_of(run.attempts, "start")
    if not starts or "peak_flops_per_second" not in starts[-1]:
        return "peak FLOP/s"
    start = starts[-1]
    measured = "a measured peak" if start.get("peak_is_measured") else "the peak"
    return f"{measured} of {flop(start['peak_flops_per_second'])}/s a worker ({start.get('peak_source', '')})"


@dataclass(frozen=True)
class Score:
    """A split's bits per byte next to the floor on the same text."""

    split: str
    step: int
    """Of the weights that were judged."""
    bits_per_byte: float
    floor: float | None
    perplexity: float | None
    """Per token."""

    @property
    def below_floor(self) -> float | None:
        """Share by which the model needs fewer bits than the floor; negative if it needs more."""
        return None if self.floor is None else 1 - self.bits_per_byte / self.floor


@dataclass(frozen=True)
class Measure:
    """One loss or accuracy of a split next to what counting alone reaches."""

    split: str
    step: int
    """Of the weights that were judged."""
    name: str
    """As `masked_accuracy`."""
    value: float
    baseline: float | None

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")

    def text(self, value: float) -> str:
        """A value of this measure: a share of targets, or nats per target."""
        return f"{value:.1%}" if self.name.endswith("_accuracy") else f"{value:.3f}"


def judged(run: RunFiles) -> list[tuple[str, int, Record]]:
    """(split, step, what was found): validation at the best step (or the best so far), and test once it was
    judged."""
    validations = validations_of(run.history)

    def quality(record: Record) -> float:
        found = record["validation"]
        return found.get("bits_per_byte", found.get("loss")) or float("inf")

    best = min(validations, key=quality, default=None)
    if run.best:
        best = next((record for record in validations if record["step"] == run.best["step"]), best)
    found = [("validation", best["step"], best["validation"])] if best else []
    return found + ([("test", run.test.get("step", 0), run.test)] if run.test else [])


def scores_of(run: RunFiles) -> list[Score]:
    """Of each judged split; none where the objective has no bits per byte."""
    floors = run.floor or {}
    return [
        Score(split, step, found["bits_per_byte"], floors.get(split), found.get("perplexity"))
        for split, step, found in judged(run)
        if found.get("bits_per_byte") is not None
    ]


def measures_of(run: RunFiles) -> list[Measure]:
    """Losses and accuracies of hidden tokens and pairs, of each judged split."""
    baselines = run.baselines or {}
    return [
        Measure(split, step, name, value, baselines.get(split, {}).get(name))
        for split, step, found in judged(run)
        for name, value in found.items()
        if name.endswith(("_loss", "_accuracy")) and value is not None
    ]


def results_table(run: RunFiles) -> Table:
    """The table at the end of a run, for a terminal."""
    scores, measures = scores_of(run), measures_of(run)
    table = Table(title="Results", title_justify="left")
    table.add_column("")
    if measures:
        for column in ("model", "counting alone"):
            table.add_column(column, justify="right")
        for score in scores:
            floor = "" if score.floor is None else f"{score.floor:.3f}"
            table.add_row(f"{score.split}: bits per byte", f"{score.bits_per_byte:.3f}", floor)
        for measure in measures:
            baseline = "" if measure.baseline is None else measure.text(measure.baseline)
            table.add_row(f"{measure.split}: {measure.title}", measure.text(measure.value), baseline)
    else:
        _fill_with_scores(table, scores, run.floor)
    table.caption, table.caption_justify = "\n".join(summary_lines(run)), "left"
    return table


def _fill_with_scores(table: Table, scores: list[Score], floor: Record | None) -> None:
    table.add_column("bits per byte", justify="right")
    table.add_column(f"byte {n_gram(floor)}", justify="right")
    table.add_column("below it", justify="right")
    table.add_column("perplexity", justify="right")
    for score in scores:
        table.add_row(
            f"{score.split} (step {score.step:,})",
            f"{score.bits_per_byte:.3f}",
            "" if score.floor is None else f"{score.floor:.3f}",
            "" if score.below_floor is None else f"{score.below_floor:.1%}",
            "" if score.perplexity is None else f"{score.perplexity:,.2f}",
        )


def summary_lines(run: RunFiles) -> list[str]:
    """Speed, waiting, stalls and energy in words."""
    lines = []
    if totals := totals_of(run):
        rate, trained = count(round(totals.tokens_per_second)), duration(totals.step_seconds)
        lines.append(f"{rate} tokens/s: {count(totals.tokens)} tokens in {trained} of training")
        stalled = f"stalled by checkpoints {totals.stall_share:.2%}"
        lines.append(f"waited for data {totals.data_wait_share:.2%} of that time, {stalled}")
        lines.append(goodput_line(run.goodput))
        if totals.mfu is not None:
            lines.append(f"MFU {totals.mfu:.1%} of {peak_in_words(run)}")
    if estimate := energy_of(run):
        lines.append(f"{energy(estimate.kwh)}, {mass(estimate.co2_grams)} CO2 ({estimate.assumption})")
    return lines
