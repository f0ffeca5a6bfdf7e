"""Search the hyperparameters of a fine-tuning task on its validation split, by Ray Tune over fine-tuning runs.

    python tune/sweep.py --config tune/configs/movies.yaml --base.backbone.uri runs/NAME/export

The same command goes on where an interrupted sweep was. No trial loads a test record; the winner is judged once.
"""

import json
import sys
import time
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
    from trainers.finetune_config import FinetuneConfig, absolute, seed_store
    from trainers.finetune_worker import load_backbone, make_encoder
    from trainers.task import load_task
    from trainers.task_data import prepare_task
    from trainers.task_report import write_task_report
    from tune.finalists import Finalist, best_points, rank
    from tune.proposals import Proposals
    from tune.search_space import Point, parse_space, with_point
    from tune.sweep_config import SweepConfig, room_for_trials
    from tune.sweep_report import sweep_table, write_sweep_report
    from tune.trial_records import TrialRecord, read_trials
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing.name} is not installed: run `make setup`, then .venv/bin/python") from missing


class ProgressLine:
    """Prints how a sweep stands whenever a trial ends."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total, self._started = console, total, time.monotonic()
        self._running: set[str] = set()
        self._ended: dict[str, TrialRecord] = {}

    def __call__(self, record: TrialRecord) -> None:
        if record.status == "unfinished":
            self._running.add(record.name)
            return
        self._running.discard(record.name)
        self._ended[record.name] = record
        counts = {status: sum(r.status == status for r in self._ended.values()) for status in _STATUS}
        best = max((r.score for r in self._ended.values() if r.score is not None), default=float("nan"))
        seconds = time.monotonic() - self._started
        left = seconds / len(self._ended) * max(0, self._total - len(self._ended))
        told = ", ".join(f"{number} {status}" for status, number in counts.items())
        self._console.print(
            f"trials: {len(self._running)} running, {told} of {self._total}; best {best:.4f}; "
            f"{seconds / 60:.1f} min, about {left / 60:.1f} min left",
            highlight=False,
        )


_STATUS = ("finished", "stopped", "failed")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a sweep from the command line."""
    arguments = sys.argv[1:] if argv is None else argv
    config = load_config(SweepConfig, arguments, description=__doc__ or "").config
    console = Console(soft_wrap=True)
    config = replace(config, base=absolute(config.base))
    store = open_store(config.sweep.storage).child(config.sweep.name)
    space = parse_space(config.space, config.base)
    prepared = prepare_task(load_task(config.base.run.task), open_store(config.base.run.prepared))
    # Records that are too long, and a backbone that is none, are better found here than in each trial.
    make_encoder(config.base, prepared.task, load_backbone(config.base, seed=0)).encode(
        prepared.read("train")
    )
    with ray_session(config.base.cluster) as resources:
        concurrent, problem = room_for_trials(config, resources)
        if problem:
            raise ConfigError([problem])
        store.put("config.yaml", to_yaml(config).encode())
        finalists = search_and_repeat(config, store, space, prepared, concurrent, console)
    winner = finalists[0]
    best = best_config(config, winner)
    store.put("best.yaml", to_yaml(best).encode())
    judged = judge(config, best, store, prepared) if config.sweep.judge else None
    page = write_sweep_report(store, space, finalists, judged, prepared.task)
    console.print(sweep_table(read_trials(store), finalists, prepared.task))
    if judged:
        console.print(f"test {prepared.task.judged_by}: {judged['metrics'][prepared.task.judged_by]:.4f}")
    console.print(
        f"best configuration: {store.uri.removeprefix('file://')}/best.yaml; page: {page}", highlight=False
    )


def search_and_repeat(
    config: SweepConfig, store: Store, space: Any, prepared: Any, concurrent: int, console: Console
) -> list[Finalist]:
    """Both phases: the search, and the best points with further seeds; the winner first."""
    from tune.trials import TrialOrder, run_trials  # here: Ray reads its variables when it is imported

    order = TrialOrder(config.base, prepared, store)
    first_seed = config.base.run.seeds[0]
    known = read_trials(store)
    searched = [r for r in known if r.seed == first_seed]
    ended = [(r.point, r.score) for r in searched if r.status != "unfinished"]
    proposals = Proposals(space, config.sweep.search, config.sweep.trials, config.sweep.seed, ended)
    unfinished = [r.point for r in searched if r.status == "unfinished"]

    def ask() -> tuple[Point, int] | None:
        if unfinished:
            return proposals.adopt(unfinished.pop(0)), first_seed
        point = proposals.propose()
        return None if point is None else (point, first_seed)

    progress = ProgressLine(console, config.sweep.trials)
    for record in searched:
        if record.status != "unfinished":
            progress(record)

    def tell(record: TrialRecord) -> None:
        if record.status != "unfinished":
            proposals.learn(record.point, record.score)
        progress(record)

    if proposals.left:
        run_trials(
            config, order, ask, tell,
            first_number=len(known) + 1, num_trials=proposals.left, concurrent=concurrent, early_stopping=True,
        )  # fmt: skip
    best = best_points(read_trials(store), first_seed, config.sweep.best)
    if not best:
        raise SystemExit(f"no trial of {store.uri} reached a validation; see trials/NAME/error.txt")
    seeds = [first_seed + number for number in range(config.sweep.seeds)]
    done = {(repr(r.point), r.seed) for r in read_trials(store) if r.status in ("finished", "failed")}
    wanted = [(point, seed) for point in best for seed in seeds if (repr(point), seed) not in done]
    if wanted:
        remaining = list(wanted)
        run_trials(
            config, order, lambda: remaining.pop(0) if remaining else None, ProgressLine(console, len(wanted)),
            first_number=len(read_trials(store)) + 1, num_trials=len(wanted), concurrent=concurrent,
            early_stopping=False,
        )  # fmt: skip
    return rank(best, seeds, read_trials(store))


def best_config(config: SweepConfig, winner: Finalist) -> FinetuneConfig:
    """What `trainers/finetune.py --config` takes to train the winner."""
    best = with_point(config.base, winner.point)
    return replace(best, run=replace(best.run, name=f"{config.sweep.name}-best"))


def judge(config: SweepConfig, best: FinetuneConfig, store: Store, prepared: Any) -> dict[str, Any]:
    """Train the winner once more, in the sweep's folder, and read the test split: once, also if asked again."""
    here = replace(best, run=replace(best.run, storage=store.uri, name="best", seeds=best.run.seeds[:1]))
    if best.cluster.num_workers > 1:
        with ray_session(best.cluster):
            result = finetune(here, prepared=prepared)
    else:
        result = finetune(here, prepared=prepared)
    run = seed_store(here, here.run.seeds[0])
    write_task_report(run, prepared)
    test = result.seeds[0]["test"]
    store.put("test.json", json.dumps(test, indent=2).encode())
    return test


if __name__ == "__main__":
    run_entry(main)
