"""Accuracy over label budgets, arm by arm: what is measured, resumed and compared."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from rich.console import Console
from rich.table import Table

from cluster.configuration.stored_file import DamagedFileError, read_json
from cluster.console.errors import ConfigError
from cluster.limits.bounds import folder_problems
from cluster.storage.uris import StorageError, Store
from data.curation.overlap import texts_within
from data.reading.raw_shards import CorpusError
from trainers.finetuning.config import FinetuneConfig
from trainers.finetuning.group import trains_alone
from trainers.finetuning.run import finetune
from trainers.model.diverged import DivergedModelError
from trainers.recovery.guard import TrainingDiverged
from trainers.tasks.labels import lacking_labels
from trainers.tasks.metrics import interval_told, seeds_interval
from trainers.tasks.splits import PreparedTask, choose_budget
from tune.curves.baselines import linear, majority
from tune.curves.curve import CurvePoint, Saving, savings
from tune.curves.page import told, write_curve_report
from tune.curves.pretraining_text import PretrainingText, pretraining_text

Arm = Literal["pretrained", "scratch", "linear", "majority"]


ARMS: tuple[Arm, ...] = get_args(Arm)


NEURAL = ("pretrained", "scratch")


@dataclass(frozen=True, kw_only=True)
class CurveConfig:
    """Which points a curve has."""

    name: str = ""
    """The curve's folder under `curve.storage`; the same name goes on where it was. Empty: TASK-labels."""
    storage: str = "curves"
    """URI of the folder of curves."""
    arms: tuple[Arm, ...] = ARMS
    """What is measured. The pretrained model alone is enough to compare backbones."""
    budgets: tuple[int, ...] = (10, 30, 100, 300, 1_000, 0)
    """Training records, drawn as `base.batch.draw` says; 0: all. As many more validate, at most
    `base.validation.max_rows`."""
    seeds: int = 3
    """Runs of each point: other records, another order, another head."""
    scratch_learning_rate: float = 0.0
    """Rate of the control; 0: that of `base.optimizer`. The control deserves a rate of its own."""
    check_overlap: bool = True
    """Read all text that the backbone was pretrained on, and refuse a curve if the test split stands in it."""
    pretraining_text: str = ""
    """Folder of that text; empty: as the configuration says that lies beside the backbone's export."""

    def problems(self, at: str) -> Iterator[str]:
        if self.name:
            yield from folder_problems(f"{at}.name", self.name, self.storage)
        if not self.arms:
            yield f"{at}.arms={list(self.arms)} must be one or more of {', '.join(ARMS)}"
        if self.seeds < 1:
            yield f"{at}.seeds={self.seeds} must be at least 1"
        if not self.budgets or any(budget < 0 for budget in self.budgets):
            yield f"{at}.budgets={list(self.budgets)} must be one or more numbers of records, 0 for all"


@dataclass(frozen=True, kw_only=True)
class LabelEfficiencyConfig:
    """A curve of accuracy over label budgets."""

    curve: CurveConfig = field(default_factory=CurveConfig)
    base: FinetuneConfig = field(default_factory=FinetuneConfig)


def measure_curve(
    config: LabelEfficiencyConfig, prepared: PreparedTask, store: Store, console: Console
) -> None:
    """Check, measure what is left, and make the page."""
    check_overlap(config, prepared, console)
    points = measure_points(config, prepared, store, console)
    compared = {"scratch", "linear"} & set(config.curve.arms) if "pretrained" in config.curve.arms else ()
    saved = {arm: savings(points, arm) for arm in sorted(compared, reverse=True)}
    content = {
        "metric": prepared.task.judged_by,
        "draw": config.base.batch.draw,
        "points": [vars(point) for point in points],
        "saved": {arm: [vars(saving) for saving in found] for arm, found in saved.items()},
    }
    store.put("curve.json", json.dumps(content, indent=2, allow_nan=False).encode())
    console.print(curve_table(points, config.curve.arms, prepared.task.judged_by))
    if saved:
        console.print(savings_table(saved))
    page = write_curve_report(store, prepared, points, saved, config.base.batch.draw)
    console.print(f"page: {page}", highlight=False)


def check_overlap(config: LabelEfficiencyConfig, prepared: PreparedTask, console: Console) -> None:
    """Print whether pretraining has seen the test split; refuse to go on if it has. Reads texts, not labels."""
    if not config.curve.check_overlap:
        return console.print("pretraining text: NOT CHECKED for the test split (curve.check_overlap=false)")
    given = config.curve.pretraining_text
    text = PretrainingText((given,), "") if given else pretraining_text(config.base.backbone.uri)
    examples = [example.content for example in prepared.read_test()]
    for uri in text.uris:
        try:
            found = texts_within(examples, uri)
        except (CorpusError, StorageError, FileNotFoundError) as error:
            console.print(f"pretraining text: {uri} NOT CHECKED for the test split: {error}", highlight=False)
            continue
        if found:
            raise ConfigError(
                [
                    f"the backbone was pretrained on {uri}, which contains {len(found):,} of {len(examples):,} test "
                    f"texts, the first: {examples[min(found)][:80]!r}; pretrain without them, or set "
                    "curve.check_overlap=false and say so"
                ]
            )
        console.print(
            f"pretraining text: {uri} contains none of {len(examples):,} test texts", highlight=False
        )
    if text.unknown:
        console.print(
            f"pretraining text: NOT CHECKED for the test split: {text.unknown}; name it by curve.pretraining_text",
            highlight=False,
        )


def measure_points(
    config: LabelEfficiencyConfig, prepared: PreparedTask, store: Store, console: Console
) -> list[CurvePoint]:
    """Every arm at every budget, the small budgets first; what is done is read.

    Raises:
        SystemExit: arms diverged; all others are measured by then.
    """
    points, diverged = [], []
    task, draw, pool = prepared.task, config.base.batch.draw, prepared.read("train")
    seeds = [config.base.run.seeds[0] + number for number in range(config.curve.seeds)]
    for budget in config.curve.budgets:
        drawn = [choose_budget(task, pool, budget, seed, draw) for seed in seeds]
        lacking = tuple(len(lacking_labels(task, examples)) for examples in drawn)
        if any(lacking):
            console.print(
                f"{budget:,} labels: of {len(task.labels)} labels {told(lacking)} are in no record that trains"
            )
        for arm in config.curve.arms:
            try:
                values = values_of(config, prepared, store, arm, budget, seeds)
            except (DivergedModelError, TrainingDiverged) as error:
                diverged.append(f"{len(drawn[0]):,} labels, {arm}: {error}")
                console.print(diverged[-1], highlight=False)
                continue
            there = prepared.counts["validation"]
            validated = 0 if arm == "majority" else min(validation_rows(config, budget) or there, there)
            points.append(CurvePoint(arm, len(drawn[0]), values, *seeds_interval(values), validated, lacking))
            console.print(
                f"{len(drawn[0]):,} to train + {validated:,} to validate, {arm}: {points[-1].mean:.4f} "
                f"({', '.join(f'{v:.4f}' for v in values)})",
                highlight=False,
            )
    if diverged:
        raise SystemExit(
            f"the curve has no page: {len(diverged)} of its points have no score; all others are measured. Leave "
            "these out (curve.arms, curve.budgets), or choose another rate and a new curve.name: "
            + "; ".join(diverged)
        )
    return points


def values_of(
    config: LabelEfficiencyConfig,
    prepared: PreparedTask,
    store: Store,
    arm: str,
    budget: int,
    seeds: Sequence[int],
) -> tuple[float, ...]:
    """The test metric of each seed. Raises DivergedModelError, TrainingDiverged."""
    if arm not in NEURAL:
        return tuple(value_of(config, prepared, store, arm, budget, seed) for seed in seeds)
    here = trains_alone(config.base.cluster)
    arm_run = arm_config(config, store, arm, budget, seeds)
    return tuple(finetune(arm_run, prepared=prepared, keep_model=False, alone=here).values("test"))


def value_of(
    config: LabelEfficiencyConfig, prepared: PreparedTask, store: Store, arm: str, budget: int, seed: int
) -> float:
    """The test metric of a model without a run of its own."""
    metric = prepared.task.judged_by
    rows, draw = validation_rows(config, budget), config.base.batch.draw
    # An older curve's linear models were of balanced draws; its majorities went by the alphabet, and are left alone.
    named = arm if (arm, draw) == ("linear", "balanced") else f"{arm}-{draw}"
    path = f"{named}-{budget}-{seed}-{rows}-{prepared.digest}.json"
    if (found := value_at(store, path, metric)) is None:
        pool, test = prepared.read("train"), prepared.read_test()
        train = choose_budget(prepared.task, pool, budget, seed, draw)
        validation = choose_budget(prepared.task, prepared.read("validation"), rows, 0, draw)
        # A balanced draw has looked at the labels of the pool, and its own shares are nobody's.
        known = pool if draw == "balanced" else train
        answers = (
            linear(prepared.task, train, validation, test)
            if arm == "linear"
            else majority(prepared.task, known, test)
        )
        store.put(path, json.dumps(answers, allow_nan=False).encode())
        found = answers[metric]
    return found


def value_at(store: Store, path: str, metric: str) -> float | None:
    """What a model without a run of its own came to; None where that is not known yet, or damaged: it takes seconds."""
    try:
        found: dict[str, float] = read_json(
            store, path, dict[str, float], "it is measured again", not_finite=True
        )
    except FileNotFoundError:
        return None
    except DamagedFileError as damaged:
        print(damaged)
        return None
    return found.get(metric)


def validation_rows(config: LabelEfficiencyConfig, budget: int) -> int:
    """Who has ten labels has not a thousand to validate with."""
    limit = config.base.validation.max_rows
    return min(budget, limit) if budget and limit else budget or limit


def arm_config(
    config: LabelEfficiencyConfig, store: Store, arm: str, budget: int, seeds: Sequence[int]
) -> FinetuneConfig:
    """The fine-tuning runs of one point."""
    base, rate = config.base, config.curve.scratch_learning_rate
    scratch = arm == "scratch"
    optimizer = replace(base.optimizer, learning_rate=rate) if scratch and rate else base.optimizer
    return replace(
        base,
        run=replace(base.run, storage=store.uri, name=f"{arm}-{budget}", seeds=tuple(seeds)),
        backbone=replace(base.backbone, from_scratch=scratch),
        # Adapters on initial weights would train next to nothing: the control always trains all.
        adapt=replace(base.adapt, train="full", layer_decay=1.0) if scratch else base.adapt,
        batch=replace(base.batch, label_budget=budget),
        validation=replace(base.validation, max_rows=validation_rows(config, budget)),
        optimizer=optimizer,
    )


def curve_table(points: Sequence[CurvePoint], arms: Sequence[str], metric: str) -> Table:
    """Budgets down, arms across."""
    table = Table("labels", *arms, title=f"test {metric}, mean over seeds (95 % interval)")
    for budget in sorted({point.budget for point in points}):
        of_budget = {point.arm: point for point in points if point.budget == budget}
        cells = [
            f"{p.mean:.3f} ({interval_told(p.low, p.high, 3)})" for p in map(of_budget.__getitem__, arms)
        ]
        table.add_row(f"{budget:,}", *cells)
    return table


def savings_table(saved: Mapping[str, Sequence[Saving]]) -> Table:
    """Budgets down, the arms that pretraining is held against across."""
    table = Table(
        "labels", *saved, title="what they reach, and the labels with which the pretrained model does"
    )
    for row in zip(*saved.values(), strict=True):
        table.add_row(f"{row[0].budget:,}", *(saving.told() for saving in row))
    return table
