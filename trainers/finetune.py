"""Fine-tune a pretrained backbone on a task: a few labelled records in, a judged and exported model out.

    python trainers/finetune.py --run.task trainers/tasks/movies.yaml --backbone.uri runs/NAME/export

The same command goes on where an interrupted run was. SIGTERM, Ctrl-C, or an object named `stop` in a seed's folder end
it after the step, with all saved. --backbone.from_scratch is the control.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    from cluster.configuration.config import load_config, run_entry
    from cluster.console.terminal import Terminal
    from cluster.storage.uris import open_store
    from trainers.finetuning.backbone import make_encoder, read_facts
    from trainers.finetuning.config import FinetuneConfig, absolute, seed_store
    from trainers.finetuning.group import place_to_train
    from trainers.finetuning.report import results_table, task_tables, write_task_report
    from trainers.finetuning.run import check, finetune
    from trainers.recovery.guard import TrainingDiverged
    from trainers.recovery.lease import lease
    from trainers.recovery.stopping import STOP, RunFailed, RunStopped, stop_on_signal
    from trainers.tasks.evaluation import TaskScore
    from trainers.tasks.metrics import interval_told, seeds_interval
    from trainers.tasks.splits import prepare_task
    from trainers.tasks.task import load_task
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing.name} is not installed: run `make setup`, then .venv/bin/python") from missing

FLAGS = {
    "dry-run": "check task, backbone, records and run but not the cluster, print the task's tables, train nothing"
}


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune from the command line."""
    arguments = sys.argv[1:] if argv is None else argv
    loaded = load_config(FinetuneConfig, arguments, description=__doc__ or "", extra_flags=FLAGS)
    config, console = absolute(loaded.config), Terminal(soft_wrap=True)
    prepared = prepare_task(load_task(config.run.task), open_store(config.run.prepared))
    facts = read_facts(config)
    encoder = make_encoder(config, prepared.task, facts)
    if not facts.names_tokenizer:
        console.print(
            f"{config.backbone.uri} does not say which tokenizer it was trained with; of its tokenizer.json only the "
            "number of entries was compared"
        )
    for table in task_tables(prepared, encoder):
        console.print(table)
    if "dry-run" in loaded.flags:
        return check(config, prepared)

    def tell(step: int, score: TaskScore) -> None:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in score.metrics.items())
        if not score.is_score:
            shown = "has no score: the model's outputs, or its loss, are not finite"
        console.print(f"step {step:,}: validation {shown}", highlight=False)

    runs = [seed_store(config, seed) for seed in config.run.seeds]
    with ExitStack() as held:
        for run in runs:
            held.enter_context(lease(run, console.print))
            run.delete(STOP)  # an earlier driver was asked
        alone = held.enter_context(place_to_train(config.cluster))
        held.enter_context(stop_on_signal(*runs))
        try:
            result = finetune(config, prepared=prepared, on_validation=tell, alone=alone)
        except RunStopped as stopped:
            return console.print(
                f"{stopped} has saved and stopped; the same command goes on", highlight=False
            )
        except (RunFailed, TrainingDiverged) as failed:
            raise SystemExit(f"the run cannot go on: {failed}") from None
        pages = [write_task_report(run, prepared) for run in runs]
    console.print(results_table(result))
    for seed in result.seeds:
        if lacking := seed.get("lacking_labels"):
            console.print(f"seed {seed['seed']}: no training record has the labels {', '.join(lacking)}")
    mean, low, high = seeds_interval(result.values("test"))
    if len(config.run.seeds) > 1:
        console.print(
            f"test {result.metric}: {mean:.4f} (95 % interval over seeds {interval_told(low, high)})"
        )
    console.print(f"the run is finished; report: {pages[0].removeprefix('file://')}", highlight=False)


if __name__ == "__main__":
    run_entry(main)
