"""One seed's fine-tuning on a Ray Train group, as its driver sees it: checked before, watched meanwhile."""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from cluster.session import ClusterConfig
from cluster.storage import StorageError, Store
from trainers.finetune_backbone import make_encoder, read_facts
from trainers.finetune_loop import OnValidation
from trainers.finetune_order import FinetuneOrder, encode_all, scale_of, training_records
from trainers.finetune_worker import work
from trainers.metrics import read_metrics, validations_of
from trainers.task_evaluation import TaskScore

POLL_SECONDS = 2.0
"""The workers put their metrics on storage every 5 s."""


def trains_alone(cluster: ClusterConfig) -> bool:
    """Whether the command's own process trains: one worker, on this machine. A Ray job's driver is on the head, which
    has no GPU."""
    return cluster.num_workers == 1 and not cluster.gpus_per_worker and cluster.is_local


def train_in_group(order: FinetuneOrder, run: Store, on_validation: OnValidation) -> None:
    """Run `finetune_worker.work` on every worker, and tell of each validation in the caller's thread.

    Raises:
        ConfigError: records or configuration that cannot be right, before a worker is started.
        ray.train.TrainingFailedError: the group failed more than `run.max_failures` times.
    """
    num_validated = check_records(order)
    from trainers.run import run_group  # here: Ray reads its variables when it is imported

    told = {record["step"] for record in validations_of(read_metrics(run))}
    config, thread = order.config, ThreadPoolExecutor(1, thread_name_prefix="group")
    try:
        working = thread.submit(run_group, work, order, config.cluster, run, config.run.max_failures)
        done = False
        while not done:
            done = bool(wait([working], POLL_SECONDS).done)
            for step, score in validations(run, num_validated):
                if step not in told:
                    told.add(step)
                    on_validation(step, score)
        working.result()
    finally:
        thread.shutdown(wait=False)  # interrupted, it ends with the Ray session


def validations(run: Store, num_records: int) -> list[tuple[int, TaskScore]]:
    """What the metrics on storage say; nothing while the storage does not answer."""
    try:
        records = validations_of(read_metrics(run))
    except StorageError:
        return []
    return [(record["step"], score_in(record["validation"], num_records)) for record in records]


def score_in(stored: Mapping[str, Any], num_records: int) -> TaskScore:
    metrics = {name: math.nan if value is None else value for name, value in stored.items()}
    return TaskScore(metrics.pop("score"), metrics, num_records)


def check_records(order: FinetuneOrder) -> int:
    """Encode what the workers will encode, without the backbone's weights; the number of records that validate.

    Raises:
        ConfigError: records that do not fit; a worker would be started for it again and again.
    """
    examples, validation = training_records(order)
    task = order.prepared.task
    encoder = make_encoder(order.config, task, read_facts(order.config), scale_of(task, examples))
    encode_all(order, encoder, examples, validation)
    return len(validation)
