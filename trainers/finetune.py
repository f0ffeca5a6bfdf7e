"""Fine-tune a pretrained backbone on a task: a few labelled records in, a judged and exported model out.

    python trainers/finetune.py --run.task trainers/tasks/movies.yaml --backbone.uri runs/NAME/export

The same command goes on where an interrupted run was. SIGTERM, Ctrl-C, or an object named `stop` in a seed's folder end
it after the step, with all saved. --backbone.from_scratch is the control.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

try:
    from cluster.config import ConfigError, load_config, run_entry
    from cluster.storage import Store, open_store
    from cluster.stored_file import parse_yaml, place_of, read_json, read_yaml
    from cluster.terminal import Terminal
    from trainers.changes import changed_keys
    from trainers.export_folder import foreign_problem
    from trainers.finetune_backbone import ORIGIN, backbone_digest, backbone_name, make_encoder, read_facts
    from trainers.finetune_config import FinetuneConfig, absolute, seed_store
    from trainers.finetune_end import check_chosen, read_chosen
    from trainers.finetune_group import check_records, place_to_train, train_in_group
    from trainers.finetune_loop import OnValidation
    from trainers.finetune_order import FinetuneOrder, draw_before, origin_of
    from trainers.finetune_result import RESULT, FinetuneResult, read_result
    from trainers.finetune_worker import work_alone
    from trainers.guard import TrainingDiverged
    from trainers.lease import lease
    from trainers.run_files import PUT_BACK
    from trainers.run_folder import CONFIG
    from trainers.stopping import STOP, RunFailed, RunStopped, stop_on_signal
    from trainers.task import load_task
    from trainers.task_data import PreparedTask, prepare_task
    from trainers.task_evaluation import TaskScore
    from trainers.task_metrics import interval_told, seeds_interval
    from trainers.task_report import results_table, task_tables, write_task_report
    from trainers.verdict import CLAIM, EXPORT
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing.name} is not installed: run `make setup`, then .venv/bin/python") from missing

FLAGS = {
    "dry-run": "check task, backbone, records and run but not the cluster, print the task's tables, train nothing"
}


def finetune(
    config: FinetuneConfig,
    *,
    prepared: PreparedTask | None = None,
    judge: bool = True,
    keep_model: bool = True,
    on_validation: OnValidation = lambda step, score: None,
    alone: bool | None = None,
    backbone: str = "",
) -> FinetuneResult:
    """Fine-tune once for each seed, each from where it is; seeds that are finished are not trained again. None is
    judged before all are trained and fit to be.

    `alone` trains in this process, as by default one worker does: right where the process has the device, as a sweep's
    trial has. Else the workers are Ray's, in the session that there is. With `judge=False` the test split is not
    loaded. `backbone` is the digest that the backbone has to have; by default the one that it has now.

    Raises:
        ConfigError: something about task, backbone or configuration cannot be right.
        RunStopped: a run was asked to stop, and has saved.
        RunFailed, TrainingDiverged, DivergedModelError, TestSplitError: a run that no restart would help.
    """
    config = absolute(config)
    task = prepared or prepare_task(load_task(config.run.task), open_store(config.run.prepared))
    backbone, left = backbone or backbone_digest(config), []
    runs = [seed_store(config, seed) for seed in config.run.seeds]
    for seed, run in zip(config.run.seeds, runs, strict=True):
        named = backbone_name(run, config, backbone)
        check_unchanged(run, config, task, named)
        if run.exists(RESULT):
            read_result(run, task.task.judged_by)
        else:
            left.append((run, FinetuneOrder(config, task, seed, named, judge, keep_model, backbone)))
    here = config.cluster.num_workers == 1 and alone is not False
    if len(left) > 1:  # one alone is judged by the workers that have trained it
        for run, order in [each for each in left if read_chosen(each[1], each[0]) is None]:
            start(replace(order, conclude=False), run, here, on_validation)
            check_chosen(order, run)
        for run, order in left:
            check_chosen(order, run)
    for run, order in left:
        start(order, run, here, on_validation)
        if not run.exists(RESULT):
            raise RunStopped(run.uri)
    return FinetuneResult(task.task.judged_by, [read_result(run, task.task.judged_by) for run in runs])


def start(order: FinetuneOrder, run: Store, here: bool, on_validation: OnValidation) -> None:
    """Do what the order says in this process or, not `here`, on a group of Ray's workers."""
    if run.exists(STOP):  # while another seed was trained or judged
        raise RunStopped(run.uri)
    if here:
        work_alone(order, on_validation)
    else:
        train_in_group(order, run, on_validation)


def check(config: FinetuneConfig, prepared: PreparedTask) -> None:
    """What `finetune` checks of each seed before it trains.

    Raises:
        ConfigError: a run that may not go on so, or records that do not fit.
    """
    backbone = backbone_digest(config)
    for seed in config.run.seeds:
        run = seed_store(config, seed)
        check_unchanged(run, config, prepared, backbone_name(run, config, backbone))
        check_records(FinetuneOrder(config, prepared, seed, backbone))


def check_unchanged(run: Store, config: FinetuneConfig, task: PreparedTask, backbone: str) -> None:
    """Refuse to go on with, or to hand out, what was learnt under another configuration, of other records, chosen by
    another metric, or from other weights; or to export at the end over a model that no run wrote.

    Raises:
        ConfigError: one line per key that differs and may not.
    """
    begun = run.exists(CONFIG)
    if not run.exists(RESULT) and (problem := foreign_problem(run.child(EXPORT), begun=begun)):
        raise ConfigError([problem])
    if not begun:
        return
    stored = read_yaml(run, CONFIG, dict[str, Any], PUT_BACK)
    changed = changed_keys(
        stored,
        config,
        judged=run.exists(CLAIM),
        finished=run.exists(RESULT),
        former={"batch.draw": draw_before(config, task.task)},
    )
    before = read_json(run, ORIGIN, dict[str, str], PUT_BACK) if run.exists(ORIGIN) else {}
    now = origin_of(task, backbone)
    before = now | before  # an older run has not written all of them down
    if before["task"] != now["task"]:
        changed.append(
            f"the records or the split of {task.task.name} are others: {before['task']} there, {now['task']} here; "
            "give them back, or choose a new run.name"
        )
    if before["metric"] != now["metric"]:
        changed.append(
            f"metric={now['metric']}, but the run was started with {before['metric']}; give it back, or choose a new "
            "run.name"
        )
    if before["prompt"] != now["prompt"]:
        prompt = changed_keys(
            parse_yaml(
                before["prompt"].encode(), dict[str, Any], f"prompt in {place_of(run, ORIGIN)}", PUT_BACK
            ),
            task.task.prompt,
        )
        changed += [f"prompt.{line}" for line in prompt]
    if before["backbone"] != now["backbone"]:
        changed.append(
            f"backbone.uri={config.backbone.uri} holds another model than the run was started from: "
            f"{before['backbone']} there, {now['backbone']} here; put that one back, or choose a new run.name"
        )
    if changed:
        raise ConfigError([f"run {run.uri}: {line}" for line in changed])


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
