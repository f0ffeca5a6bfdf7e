"""Search pretraining's hyperparameters at small scale: rates, batch, schedule, and the weights of sources.

    python tune/sweep_pretraining.py --config tune/configs/pretrain-rates.yaml

The corpus is prepared once, and every trial is trained on as many tokens of it. Validation chooses; the test split is
not read: `trainers/pretrain.py --config best.yaml` judges. The same command goes on where an interrupted sweep was.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    from rich.console import Console

    from cluster.configuration.config import load_config, run_entry, to_yaml
    from cluster.configuration.stored_file import read_json
    from cluster.console.errors import ConfigError
    from cluster.console.terminal import Terminal
    from cluster.sessions.session import ray_session
    from cluster.sessions.workers import piece_shortages
    from cluster.storage.uris import Store, open_store
    from data.order.order import Order, OrderError
    from data.preparing.corpus import EXPECTED, corpus_table, prepare
    from data.preparing.progress import progress_line
    from data.rows.window import READ_CPUS
    from data.shards.manifest import Manifest
    from trainers.exported.model_digest import FORMER_LENGTH, content_digest, listing_digest
    from trainers.planning.checks import manifest_problems, objective_problems, problems_before_start
    from trainers.pretraining.config import PretrainConfig, absolute
    from trainers.pretraining.initial import with_initial
    from trainers.recovery.lease import lease
    from tune.search.config import BEST, SweepRunConfig, grid_problem, room_of, unshared_problem
    from tune.search.measure import Measure
    from tune.search.space import SearchSpace, parse_space
    from tune.sweeps.finalists import finalists_before
    from tune.sweeps.folder import ORIGIN, PUT_BACK, pin
    from tune.sweeps.page import sweep_table, write_sweep_report
    from tune.sweeps.phases import living_nodes, search
    from tune.trials.interrupts import stopped_gently
    from tune.trials.pretraining import PretrainTrials
    from tune.trials.records import read_trials
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing.name} is not installed: run `make setup`, then .venv/bin/python") from missing

MEASURE = Measure("pretraining", "loss")
CHOICES_NAMED = 8
"""Of the batches that fit, in the remedy for a range of which some do not."""


@dataclass(frozen=True, kw_only=True)
class PretrainSweepConfig:
    """A sweep over pretraining runs."""

    sweep: SweepRunConfig = field(default_factory=lambda: SweepRunConfig(judge=False))
    base: PretrainConfig = field(default_factory=PretrainConfig)
    space: dict[str, Any] = field(default_factory=dict)
    """What is varied: optimizer.*, schedule.*, batch.rows_per_step and order.weights.SOURCE; see
    tune/search/space.py."""

    def problems(self, at: str = "") -> Iterator[str]:
        if self.sweep.judge:
            yield "sweep.judge=true is not for pretraining: trainers/pretrain.py --config best.yaml judges"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a sweep from the command line."""
    arguments = sys.argv[1:] if argv is None else argv
    config = load_config(PretrainSweepConfig, arguments, description=__doc__ or "").config
    console = Terminal(soft_wrap=True)
    store = open_store(config.sweep.storage).child(config.sweep.name)
    given = absolute(config.base)
    base = with_initial(replace(given, run=replace(given.run, storage=store.uri, name="trials")))
    config = replace(config, base=base)
    space = parse_space(config.space, base)
    problems = [*problems_before_start(base), *range_problems(base, space)]
    if problem := grid_problem(config.sweep, space):
        problems.append(problem)
    if problems:
        raise ConfigError(problems)
    with lease(store, console.print):
        sweep(config, store, space, console)


def sweep(config: PretrainSweepConfig, store: Store, space: SearchSpace, console: Console) -> None:
    """Prepare, search and choose, from where the sweep is."""
    base = config.base
    with ray_session(base.cluster) as resources:
        if problems := list(piece_shortages(base.corpus.cpus_per_piece, resources)):
            raise ConfigError(problems)
        nodes = living_nodes()
        shared = {"sweep.storage": store.uri, "base.corpus.prepared": base.corpus.prepared}
        shared |= {"base.run.init_from": base.run.init_from} if base.run.init_from else {}
        if problem := unshared_problem(shared, nodes):
            raise ConfigError([problem])
        concurrent = room_of(base.cluster, READ_CPUS).on(nodes, config.sweep.max_concurrent)
        try:
            with progress_line(console) as on_progress:
                manifest = prepare(base.corpus, on_progress)
        except EXPECTED as unusable:
            raise ConfigError([str(unusable)]) from None
        console.print(corpus_table(manifest))
        if manifest.weakness:
            console.print(manifest.weakness, highlight=False)
        init = content_digest(open_store(base.run.init_from)) if base.run.init_from else ""
        trials = PretrainTrials(base, manifest.digest, init)
        if problems := [
            *manifest_problems(base, manifest),
            *objective_problems(base, manifest),
            *order_problems(trials, manifest, space),
        ]:
            raise ConfigError(problems)
        pin(store, config, origin_of(store, config, manifest, init))
        finalists = finalists_before(store, config.sweep, base.run.seed) or search(
            config.sweep,
            trials,
            store,
            space,
            first_seed=base.run.seed,
            concurrent=concurrent,
            measure=MEASURE,
            console=console,
        )
    best = trials.config_at(finalists[0].point)
    best = replace(best, run=replace(best.run, storage="runs", name=f"{config.sweep.name}{BEST}"))
    store.put("best.yaml", to_yaml(best).encode())
    page = write_sweep_report(store, space, finalists, None, MEASURE)
    console.print(sweep_table(read_trials(store), finalists, MEASURE))
    console.print(
        f"best configuration: {store.uri.removeprefix('file://')}/best.yaml; page: {page}", highlight=False
    )


def order_problems(trials: PretrainTrials, manifest: Manifest, space: SearchSpace) -> Iterator[str]:
    """What no order could be made of: unknown sources, sizes that do not fit; at each choice, and at the ends of
    each range."""
    for dimension, value, point in space.corners():
        config = trials.config_at(point)
        batch = config.batch
        try:
            Order(manifest, config.order, seq_len=batch.seq_len, rows_per_step=batch.rows_per_step)
        except OrderError as error:
            yield f"space.{dimension.key}={value}: {error}"


def range_problems(base: PretrainConfig, space: SearchSpace) -> Iterator[str]:
    """A range of batches that lanes or workers cannot share out: between its ends, which fit, a trial would fail."""
    workers = base.cluster.num_workers
    for dimension in space.dimensions:
        if dimension.key != "batch.rows_per_step" or dimension.kind != "int":
            continue
        low, high = dimension.values
        wrong = {
            rows: problems
            for rows in range(low, high + 1)
            if (problems := list(base.order.batch_problems("order", rows_per_step=rows, workers=workers)))
        }
        if wrong:
            fitting = [rows for rows in range(low, high + 1) if rows not in wrong]
            some = fitting[:: max(1, math.ceil(len(fitting) / CHOICES_NAMED))]
            yield (
                f"space.{dimension.key}.int={[low, high]}: {len(wrong):,} of {high + 1 - low:,} values do not fit, the "
                f"first: {next(iter(wrong.values()))[0]}; name those that do, as {{choice: {some}}}"
            )


def origin_of(store: Store, config: PretrainSweepConfig, manifest: Manifest, init: str) -> dict[str, str]:
    """Digests of the corpus and of the initial model: scores depend on both, and no configuration key holds them.

    `init` is the content digest of the initial model, empty for random weights.
    """
    before = read_json(store, ORIGIN, dict[str, str], PUT_BACK) if store.exists(ORIGIN) else {}
    if init and len(before.get("init_from", "")) == FORMER_LENGTH:  # of sizes and times
        init = listing_digest(open_store(config.base.run.init_from).list())
    return {"corpus": manifest.digest, "init_from": init or "random weights"}


if __name__ == "__main__":
    run_entry(stopped_gently(main))
