"""A fine-tuning run of one or more seeds: trained, judged together, exported."""

from dataclasses import replace
from typing import Any

from cluster.configuration.stored_file import parse_yaml, place_of, read_json, read_yaml
from cluster.console.errors import ConfigError
from cluster.storage.uris import Store, open_store
from trainers.evaluation.verdict import CLAIM, EXPORT
from trainers.exported.replacing import foreign_problem
from trainers.finetuning.backbone import ORIGIN, backbone_digest, backbone_name
from trainers.finetuning.config import FinetuneConfig, absolute, seed_store
from trainers.finetuning.end import check_chosen, read_chosen
from trainers.finetuning.group import check_records, train_in_group
from trainers.finetuning.job import FinetuneOrder, draw_before, origin_of
from trainers.finetuning.loop import OnValidation
from trainers.finetuning.result import RESULT, FinetuneResult, read_result
from trainers.finetuning.worker import work_alone
from trainers.pretraining.run_folder import CONFIG
from trainers.recovery.stopping import STOP, RunStopped
from trainers.stored.changes import changed_keys
from trainers.stored.run_files import PUT_BACK
from trainers.tasks.splits import PreparedTask, prepare_task
from trainers.tasks.task import load_task


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
        former={"batch.draw": draw_before(config, task)},
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
