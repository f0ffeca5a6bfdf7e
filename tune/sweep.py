"""Search the hyperparameters of a fine-tuning task on its validation split, by Ray Tune over fine-tuning runs.

    python tune/sweep.py --config tune/configs/movies.yaml --base.backbone.uri runs/NAME/export

The same command goes on where an interrupted sweep was. No trial loads a test record; the winner is judged once.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    from rich.console import Console

    from cluster.config import ConfigError, load_config, run_entry, to_yaml
    from cluster.session import ray_session
    from cluster.storage import Store, open_store
    from trainers.finetune import finetune
    from trainers.finetune_backbone import backbone_digest, make_encoder, read_facts
    from trainers.finetune_config import FinetuneConfig, absolute, seed_store
    from trainers.finetune_group import place_to_train
    from trainers.finetune_order import origin_of
    from trainers.lease import lease
    from trainers.task import load_task
    from trainers.task_data import PreparedTask, prepare_task
    from trainers.task_report import write_task_report
    from tune.finalists import Finalist
    from tune.finetune_trials import FinetuneTrials
    from tune.interrupts import stopped_gently
    from tune.search import living_nodes, search
    from tune.search_space import Point, SearchSpace, parse_space, with_point
    from tune.sweep_config import SweepConfig, grid_problem, room_of, unshared_problem
    from tune.sweep_folder import pin
    from tune.sweep_report import sweep_table, write_sweep_report
    from tune.trial_records import read_trials
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing.name} is not installed: run `make setup`, then .venv/bin/python") from missing

JUDGED = "judged.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a sweep from the command line."""
    arguments = sys.argv[1:] if argv is None else argv
    config = load_config(SweepConfig, arguments, description=__doc__ or "").config
    console = Console(soft_wrap=True)
    config = replace(config, base=absolute(config.base))
    store = open_store(config.sweep.storage).child(config.sweep.name)
    space = parse_space(config.space, config.base)
    if problem := grid_problem(config.sweep, space):
        raise ConfigError([problem])
    prepared = prepare_task(load_task(config.base.run.task), open_store(config.base.run.prepared))
    # Records that are too long, and a backbone that is none, are better found here than in each trial.
    encoder = make_encoder(config.base, prepared.task, read_facts(config.base))
    for split in ("train", "validation"):
        encoder.encode(prepared.read(split))
    with lease(store, console.print):
        sweep(config, store, space, prepared, console)


def sweep(
    config: SweepConfig, store: Store, space: SearchSpace, prepared: PreparedTask, console: Console
) -> None:
    """Search, choose and judge, from where the sweep is."""
    pin(store, config, origin_of(prepared, backbone_digest(config.base)))
    with ray_session(config.base.cluster):
        nodes = living_nodes()
        if problem := unshared_problem(shared_uris(config), nodes):
            raise ConfigError([problem])
        concurrent = room_of(config.base.cluster).on(nodes, config.sweep.max_concurrent)
        finalists = search(
            config.sweep,
            FinetuneTrials(config.base, prepared),
            store,
            space,
            first_seed=config.base.run.seeds[0],
            concurrent=concurrent,
            console=console,
        )
    best = best_config(config, finalists[0])
    store.put("best.yaml", to_yaml(best).encode())
    judged = judge(best, finalists[0].point, store, prepared) if config.sweep.judge else None
    page = write_sweep_report(store, space, finalists, judged, prepared.task)
    console.print(sweep_table(read_trials(store), finalists, prepared.task))
    if judged:
        console.print(f"test {prepared.task.judged_by}: {judged['metrics'][prepared.task.judged_by]:.4f}")
    console.print(
        f"best configuration: {store.uri.removeprefix('file://')}/best.yaml; page: {page}", highlight=False
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
    return replace(best, run=replace(best.run, name=f"{config.sweep.name}-best"))


def judge(best: FinetuneConfig, point: Point, store: Store, prepared: PreparedTask) -> dict[str, Any]:
    """Train the winner once more, in the sweep's folder, and read the test split: once, also if asked again.

    Raises:
        ConfigError: the sweep has judged another point.
    """
    claim_judgement(store, point)
    here = replace(best, run=replace(best.run, storage=store.uri, name="best", seeds=best.run.seeds[:1]))
    with place_to_train(best.cluster) as alone:
        result = finetune(here, prepared=prepared, alone=alone)
    run = seed_store(here, here.run.seeds[0])
    write_task_report(run, prepared)
    test = result.seeds[0]["test"]
    store.put("test.json", json.dumps(test, indent=2).encode())
    return test


def claim_judgement(store: Store, point: Point) -> None:
    """Write down which point the test split judges; of a sweep it judges one. Raises `ConfigError` for another."""
    if store.put_if_absent(JUDGED, json.dumps({"point": point}, sort_keys=True).encode()):
        return
    if (first := json.loads(store.read(JUDGED))["point"]) != point:
        raise ConfigError(
            [
                f"the test split was opened to judge {first}, and cannot judge {point} too; set sweep.judge=false, "
                "or choose a new sweep.name with a test split that has chosen nothing"
            ]
        )


if __name__ == "__main__":
    run_entry(stopped_gently(main))
