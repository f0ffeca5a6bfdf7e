"""One seed's fine-tuning on a Ray Train group, as its driver sees it: checked before, watched meanwhile."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from cluster.console.errors import ConfigError
from cluster.sessions.session import ray_session
from cluster.sessions.workers import ClusterConfig, shortages
from cluster.storage.uris import Store
from trainers.finetuning.backbone import make_encoder, read_facts
from trainers.finetuning.job import FinetuneOrder, encode_all, scale_of, training_records
from trainers.finetuning.loop import OnValidation
from trainers.finetuning.worker import work
from trainers.recovery.stopping import FAILURE, raise_final
from trainers.reporting.metrics import read_metrics, validations_of
from trainers.reporting.watching import watched
from trainers.tasks.evaluation import TaskScore


def trains_alone(cluster: ClusterConfig) -> bool:
    """Whether the command's own process trains: one worker, on this machine. A Ray job's driver is on the head, which
    has no GPU."""
    return cluster.num_workers == 1 and not cluster.gpus_per_worker and cluster.is_local


@contextmanager
def place_to_train(cluster: ClusterConfig) -> Iterator[bool]:
    """What `finetune(alone=…)` is to be told for the length of a with-block: True, or False in a session of Ray's.

    Raises:
        ConfigError: there is no such cluster, or it lacks what the workers need.
    """
    if trains_alone(cluster):
        yield True
        return
    with ray_session(cluster) as resources:
        if problems := list(shortages(cluster, resources)):
            raise ConfigError(problems)
        yield False


def train_in_group(order: FinetuneOrder, run: Store, on_validation: OnValidation) -> None:
    """Run `finetune_worker.work` on every worker, and tell of each validation in the caller's thread.

    Raises:
        ConfigError: records or configuration that cannot be right, before a worker is started.
        RunFailed: an error that no restart cures.
        ray.train.TrainingFailedError: the group failed more than `run.max_failures` times.
    """
    num_validated = check_records(order)
    from trainers.pretraining.driver import run_group  # here: Ray reads its variables when it is imported

    config = order.config
    run.delete(FAILURE)

    def group() -> None:
        try:
            run_group(work, order, config.cluster, run, config.run.max_failures)
        finally:
            raise_final(run)  # where a worker wrote down why, that says more than how the group ended

    def tell(step: int, found: Mapping[str, float]) -> None:
        metrics = dict(found)
        on_validation(step, TaskScore(metrics.pop("score"), metrics, num_validated))

    watched(
        run,
        group,
        tell,
        told=max((record["step"] for record in validations_of(read_metrics(run))), default=0),
    )


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
