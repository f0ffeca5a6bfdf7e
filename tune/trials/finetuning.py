"""Trials that fine-tune a backbone on a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.console.errors import ConfigError
from cluster.storage.uris import Store
from trainers.finetuning.backbone import backbone_digest
from trainers.finetuning.config import FinetuneConfig
from trainers.finetuning.group import check_records
from trainers.finetuning.job import FinetuneOrder
from trainers.finetuning.run import finetune
from trainers.tasks.evaluation import TaskScore
from trainers.tasks.splits import PreparedTask
from tune.search.experiment import DRIVER, Report, Score
from tune.search.space import Point, SearchSpace, with_point


@dataclass(frozen=True)
class FinetuneTrials:
    """A trial of one worker trains in its own process: a Ray Train run inside would add seconds to half a minute."""

    base: FinetuneConfig
    prepared: PreparedTask
    backbone: str = ""
    """Digest that the backbone has in every trial; empty: each takes what there is."""

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

    def changed(self) -> str | None:
        uri = self.base.backbone.uri
        if not self.backbone or (found := backbone_digest(self.base)) == self.backbone:
            return None
        return (
            f"base.backbone.uri={uri} was replaced while the sweep goes on: {self.backbone} there, {found} here; "
            "put that one back, and the same command goes on, or choose a new sweep.name"
        )

    def train(self, folder: Store, point: Point, seed: int, report: Report) -> Score:
        """Only train and validation records are loaded."""
        config = self.config_at(folder, point, seed)
        records = self.prepared.counts["train"]
        total = config.batch.steps(min(config.batch.label_budget or records, records))

        def validated(step: int, score: TaskScore) -> None:
            report(step / total, score.score, score.metrics)

        result = finetune(
            config, prepared=self.prepared, judge=False, keep_model=False, on_validation=validated,
            backbone=self.backbone,
        )  # fmt: skip
        found = result.seeds[0]
        return Score(found["score"], found["validation"])


def point_problems(
    base: FinetuneConfig, prepared: PreparedTask, space: SearchSpace, seeds: Sequence[int]
) -> list[str]:
    """What `finetune` would refuse, of each choice and each end of a range: found once here, and not by every trial
    that has the value."""
    checked: set[str] = set()
    problems: dict[str, None] = {}
    for _, _, point in space.corners():
        config = with_point(base, point)
        batch, adapt = config.batch, config.adapt
        for seed in seeds if batch.label_budget else seeds[:1]:  # it draws other records
            encoding = [batch.label_budget, batch.max_tokens, batch.truncate, seed]
            decisive = repr([config.backbone, adapt.train, adapt.lora_targets, *encoding])
            if decisive in checked:
                continue
            checked.add(decisive)
            try:
                check_records(FinetuneOrder(config, prepared, seed, "", judge=False, keep_model=False))
            except ConfigError as error:
                problems |= dict.fromkeys(error.problems)
    return list(problems)
