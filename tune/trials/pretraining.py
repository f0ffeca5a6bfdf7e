"""Trials that pretrain: a small run on Ray's workers each, all over one set of token shards."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.storage.uris import Store, open_store
from trainers.checkpoints.keeping import read_best
from trainers.exported.model_digest import content_digest
from trainers.pretraining.config import PretrainConfig
from trainers.recovery.stopping import raise_final
from trainers.reporting.watching import watched
from tune.search.experiment import DRIVER, Report, Score
from tune.search.space import Point, with_point


@dataclass(frozen=True)
class PretrainTrials:
    """The trial's own process drives Ray Train's workers; no trial reads the test split, and none is exported."""

    base: PretrainConfig
    manifest: str
    """Digest of what all of them are trained on."""
    init: str = ""
    """Digest of what all of them start from; empty: random weights."""

    @property
    def resources(self) -> Mapping[str, float]:
        return DRIVER

    def config_at(self, point: Point) -> PretrainConfig:
        """The configuration at a point. A larger batch takes fewer steps: every trial sees as many tokens."""
        config = with_point(self.base, point)
        share = self.base.batch.rows_per_step / config.batch.rows_per_step
        return replace(
            config,
            run=replace(config.run, steps=max(1, round(config.run.steps * share))),
            validation=replace(
                config.validation, every_steps=max(1, round(config.validation.every_steps * share))
            ),
        )

    def changed(self) -> str | None:
        uri = self.base.run.init_from
        if not self.init or (found := content_digest(open_store(uri))) == self.init:
            return None
        return (
            f"base.run.init_from={uri} was replaced while the sweep goes on: {self.init} there, {found} here; put that "
            "one back, and the same command goes on, or choose a new sweep.name"
        )

    def train(self, folder: Store, point: Point, seed: int, report: Report) -> Score:
        """Its score is the validation loss in nats per target token, turned so that more is better."""
        # Here: this module is imported by the driver before Ray's variables are set, which Ray reads when imported.
        from trainers.pretraining.driver import run_group
        from trainers.pretraining.worker import Task, work

        config = self.config_at(point)
        storage, _, name = folder.uri.rpartition("/")
        config = replace(
            config,
            run=replace(config.run, storage=storage, name=name, seed=seed),
            order=replace(config.order, seed=self.base.order.seed + seed - self.base.run.seed),
        )

        def train() -> None:
            task = Task(config, self.manifest, judge=False, init=self.init)
            run_group(work, task, config.cluster, folder, config.run.max_failures)
            raise_final(folder)

        def seen(step: int, found: Mapping[str, float]) -> None:
            report(step / config.run.steps, -found["loss"], numbers(found))

        watched(folder, train, seen)
        best = read_best(folder)
        assert best is not None, "the run came to its end, where it is validated"
        return Score(-best["loss"], numbers(best))


def numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """What was measured, without names and counts."""
    return {key: found[key] for key in ("loss", "bits_per_byte") if found.get(key) is not None}
