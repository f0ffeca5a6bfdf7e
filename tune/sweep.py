"""Search the hyperparameters of a fine-tuning task on its validation split, by Ray Tune over fine-tuning runs.

    python tune/sweep.py --config tune/configs/movies.yaml --base.backbone.uri runs/NAME/export

The same command goes on where an interrupted sweep was. No trial loads a test record; the winner is judged once.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    from rich.console import Console

    from cluster.configuration.config import load_config, run_entry, to_yaml
    from cluster.console.errors import ConfigError
    from cluster.console.terminal import Terminal
    from cluster.sessions.session import ray_session
    from cluster.storage.uris import Store, open_store
    from trainers.finetuning.backbone import backbone_digest, backbone_name
    from trainers.finetuning.config import FinetuneConfig, absolute
    from trainers.finetuning.job import origin_of
    from trainers.recovery.lease import lease
    from trainers.tasks.splits import PreparedTask, prepare_task
    from trainers.tasks.task import load_task
    from tune.search.config import BEST, SweepConfig, grid_problem, room_of, unshared_problem
    from tune.search.space import SearchSpace, parse_space, with_point
    from tune.sweeps.finalists import Finalist, finalists_before
    from tune.sweeps.folder import pin
    from tune.sweeps.judgement import JUDGED, claim_judgement, judge, refuse_after_judgement
    from tune.sweeps.page import sweep_table, write_sweep_report
    from tune.sweeps.phases import living_nodes, search
    from tune.trials.finetuning import FinetuneTrials, point_problems
    from tune.trials.interrupts import stopped_gently
    from tune.trials.records import read_trials
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing.name} is not installed: run `make setup`, then .venv/bin/python") from missing


def main(argv: Sequence[str] | None = None) -> None:
    """Run a sweep from the command line."""
    arguments = sys.argv[1:] if argv is None else argv
    config = load_config(SweepConfig, arguments, description=__doc__ or "").config
    console = Terminal(soft_wrap=True)
    config = replace(config, base=absolute(config.base))
    store = open_store(config.sweep.storage).child(config.sweep.name)
    space = parse_space(config.space, config.base)
    if problem := grid_problem(config.sweep, space):
        raise ConfigError([problem])
    prepared = prepare_task(load_task(config.base.run.task), open_store(config.base.run.prepared))
    seeds = [config.base.run.seeds[0] + number for number in range(config.sweep.seeds)]
    if problems := point_problems(config.base, prepared, space, seeds):
        raise ConfigError(problems)
    with lease(store, console.print):
        sweep(config, store, space, prepared, console)


def sweep(
    config: SweepConfig, store: Store, space: SearchSpace, prepared: PreparedTask, console: Console
) -> None:
    """Search, choose and judge, from where the sweep is."""
    refuse_after_judgement(store, config.sweep)
    backbone = backbone_digest(config.base)
    pin(store, config, origin_of(prepared, backbone_name(store, config.base, backbone)))
    first_seed, judged_before = config.base.run.seeds[0], store.exists(JUDGED)
    finalists = finalists_before(store, config.sweep, first_seed, judged=judged_before)
    if finalists is None:
        finalists = search_on_cluster(config, store, space, prepared, backbone, console)
    best = best_config(config, finalists[0])
    if config.sweep.judge or judged_before:
        claim_judgement(store, finalists[0].point)  # before best.yaml, which never names another point
    store.put("best.yaml", to_yaml(best).encode())
    judged = judge(best, finalists[0].point, store, prepared, backbone) if config.sweep.judge else None
    page = write_sweep_report(store, space, finalists, judged, prepared.task)
    console.print(sweep_table(read_trials(store), finalists, prepared.task))
    if judged:
        console.print(f"test {prepared.task.judged_by}: {judged['metrics'][prepared.task.judged_by]:.4f}")
    console.print(
        f"best configuration: {store.uri.removeprefix('file://')}/best.yaml; page: {page}", highlight=False
    )


def search_on_cluster(
    config: SweepConfig,
    store: Store,
    space: SearchSpace,
    prepared: PreparedTask,
    backbone: str,
    console: Console,
) -> list[Finalist]:
    """Start Ray and search the space. Returns the finalists, the best first.

    `backbone` is the digest of the model that every trial starts from.
    """
    with ray_session(config.base.cluster):
        nodes = living_nodes()
        if problem := unshared_problem(shared_uris(config), nodes):
            raise ConfigError([problem])
        return search(
            config.sweep,
            FinetuneTrials(config.base, prepared, backbone),
            store,
            space,
            first_seed=config.base.run.seeds[0],
            concurrent=room_of(config.base.cluster).on(nodes, config.sweep.max_concurrent),
            measure=prepared.task,
            console=console,
        )


def shared_uris(config: SweepConfig) -> dict[str, str]:
    """What every trial reads or writes, by key."""
    return {
        "sweep.storage": open_store(config.sweep.storage).uri,
        "base.run.prepared": config.base.run.prepared,
        "base.backbone.uri": config.base.backbone.uri,
    }


def best_config(config: SweepConfig, winner: Finalist) -> FinetuneConfig:
    """What `trainers/finetune.py --config` takes to train the winner."""
    best = with_point(config.base, winner.point)
    return replace(best, run=replace(best.run, name=f"{config.sweep.name}{BEST}"))


if __name__ == "__main__":
    run_entry(stopped_gently(main))
