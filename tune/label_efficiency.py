"""How many labels pretraining saves: accuracy over label budgets, pretrained against from scratch and a linear model.

    python tune/label_efficiency.py --base.run.task trainers/tasks/movies.yaml --base.backbone.uri runs/NAME/export

Each point is a run of its own, judged on the test split once and used for no choice. The same command goes on where an
interrupted one was.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    from cluster.configuration.config import load_config, run_entry
    from cluster.console.errors import ConfigError
    from cluster.console.terminal import Terminal
    from cluster.storage.uris import open_store
    from trainers.finetuning.config import absolute
    from trainers.finetuning.group import place_to_train
    from trainers.recovery.lease import lease
    from trainers.tasks.splits import prepare_task
    from trainers.tasks.task import load_task
    from tune.curves.label_curve import LabelEfficiencyConfig, measure_curve
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing.name} is not installed: run `make setup`, then .venv/bin/python") from missing


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a curve from the command line."""
    arguments = sys.argv[1:] if argv is None else argv
    config = load_config(LabelEfficiencyConfig, arguments, description=__doc__ or "").config
    config = replace(config, base=absolute(config.base))
    console = Terminal(soft_wrap=True)
    task = load_task(config.base.run.task)
    if task.kind not in ("classification", "pairs") or task.multi_label:
        raise ConfigError([f"kind={task.kind}: a curve needs one label per record, for the linear model"])
    if task.judged_by == "loss":
        raise ConfigError(
            ["metric=loss: the linear model and the commonest label have none; nearest: metric=accuracy"]
        )
    prepared = prepare_task(task, open_store(config.base.run.prepared))
    store = open_store(config.curve.storage).child(config.curve.name or f"{task.name}-labels")
    with lease(store, console.print), place_to_train(config.base.cluster):
        measure_curve(config, prepared, store, console)


if __name__ == "__main__":
    run_entry(main)
