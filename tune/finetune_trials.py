"""Trials that fine-tune a backbone on a task."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cluster.storage import Store
from trainers.finetune import finetune
from trainers.finetune_config import FinetuneConfig
from trainers.task_data import PreparedTask
from trainers.task_evaluation import TaskScore
from tune.experiment import DRIVER, Report, Score
from tune.search_space import Point, with_point


@dataclass(frozen=True)
class FinetuneTrials:
    """A trial of one worker trains in its own process: a Ray Train run inside would add seconds to half a minute."""

    base: FinetuneConfig
    prepared: PreparedTask

    @property
    def resources(self) -> Mapping[str, float]:
        cluster = self.base.cluster
        if cluster.num_workers > 1:
            return DRIVER
        return {"cpu": cluster.cpus_per_worker, "gpu": cluster.gpus_per_worker}

    def config_at(self, folder: Store, point: Point, seed: int) -> FinetuneConfig:
        """The trial's configuration; its run lies in the trial's folder."""
        config = with_point(self.base, point)
        storage, _, name = folder.uri.rpartition("/")
        return replace(config, run=replace(config.run, storage=storage, name=name, seeds=(seed,)))

    def train(self, folder: Store, point: Point, seed: int, report: Report) -> Score:
        """Only train and validation records are loaded."""
        config = self.config_at(folder, point, seed)
        total = config.batch.steps(config.batch.label_budget or self.prepared.counts["train"])

        def validated(step: int, score: TaskScore) -> None:
            report(step / total, score.score, score.metrics)

        result = finetune(
            config, prepared=self.prepared, judge=False, keep_model=False, on_validation=validated
        )
        found = result.seeds[0]
        return Score(found["score"], found["validation"])
