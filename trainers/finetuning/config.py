"""The configuration of a fine-tuning run."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from cluster.configuration.keys import may_change
from cluster.limits.bounds import folder_problems
from cluster.sessions.workers import ClusterConfig
from cluster.storage.uris import Store, open_store
from trainers.checkpoints.keeping import CheckpointConfig
from trainers.engine.config import EngineConfig
from trainers.optim.optimizer import OptimizerConfig
from trainers.optim.schedule import ScheduleConfig
from trainers.recovery.guard import GuardConfig
from trainers.recovery.heartbeat import HeartbeatConfig
from trainers.tasks.heads import AdaptConfig
from trainers.tasks.task import Draw


@dataclass(frozen=True, kw_only=True)
class FinetuneRunConfig:
    """Where a run keeps its state, and what it learns."""

    name: str = may_change("finetune")
    """The run's folder under `run.storage`; the same name goes on where the run was."""
    storage: str = may_change("runs")
    """URI of the folder of runs: a path, file://, s3:// or gs://; every node must reach it."""
    task: str = may_change("")
    """Task file, as trainers/tasks/movies.yaml."""
    prepared: str = may_change("corpora/tasks/prepared")
    """URI of the folder of split tasks."""
    seeds: tuple[int, ...] = may_change((0,))
    """One run for each: of the head, of the order of the records, and of the labels of a budget."""
    max_failures: int = may_change(3)
    """Restarts of a worker group from the last committed checkpoint before the run gives up; -1: no limit."""

    def problems(self, at: str) -> Iterator[str]:
        yield from folder_problems(f"{at}.name", self.name, self.storage)
        if not self.task:
            yield f"{at}.task must be given: the path of a task file"
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            yield f"{at}.seeds={list(self.seeds)} must be one or more different numbers"
        if min(self.seeds, default=0) < 0:
            yield f"{at}.seeds={list(self.seeds)} must not be negative: no order of records has such a seed"


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What is adapted."""

    uri: str = ""
    """Folder of an exported model."""
    from_scratch: bool = False
    """Take its shape and tokenizer with initial weights: the control that shows what pretraining is worth."""

    def problems(self, at: str) -> Iterator[str]:
        if not self.uri:
            yield f"{at}.uri must be given: the folder of an exported model, as runs/NAME/export"


@dataclass(frozen=True, kw_only=True)
class RecordsConfig:
    """What one optimiser step is made of, and how many there are."""

    rows_per_step: int = 32
    """Records of a global batch; no more than there are."""
    epochs: float = 3.0
    """Times that each training record is seen."""
    min_steps: int = 30
    """Steps at least: with ten labels three epochs are nothing."""
    max_steps: int = 0
    """Steps at most; 0: no limit."""
    label_budget: int = 0
    """Training records, drawn by a seed; 0: all."""
    draw: Draw = "random"
    """How they are drawn, and those of validation.max_rows: at `random`, or `balanced`: labels in turn, where rare ones
    are found by the labels of the whole split."""
    max_tokens: int = 0
    """Tokens of a record at most; 0: the backbone's positions."""
    truncate: bool = False
    """Cut longer records instead of refusing them. In the test split they are cut in any case, and counted."""
    class_weights: bool = False
    """Weight each label's loss by the inverse of its frequency in train, 1 on average; where a record may have several,
    having each one and not having it."""

    def problems(self, at: str) -> Iterator[str]:
        if self.rows_per_step < 1:
            yield f"{at}.rows_per_step={self.rows_per_step} must be at least 1"
        if self.epochs <= 0:
            yield f"{at}.epochs={self.epochs} must be positive"
        for key in ("min_steps", "max_steps", "label_budget", "max_tokens"):
            if getattr(self, key) < 0:
                yield f"{at}.{key}={getattr(self, key)} must be 0 or more"
        if 0 < self.max_steps < self.min_steps:
            yield f"{at}.max_steps={self.max_steps} is less than {at}.min_steps={self.min_steps}; raise it"

    def steps(self, num_records: int) -> int:
        """Optimiser steps for that many training records."""
        steps = max(
            self.min_steps, round(self.epochs * num_records / min(self.rows_per_step, num_records)), 1
        )
        return min(steps, self.max_steps) if self.max_steps else steps


@dataclass(frozen=True, kw_only=True)
class ChoiceConfig:
    """How the validation split chooses the checkpoint, and stops a run that no longer improves."""

    times: int = 8
    """Validations of a run, evenly spaced; the last step is always validated."""
    max_rows: int = 1_000
    """Records of the fixed set, the first ones of a keyed draw; 0: the whole split."""
    patience: int = may_change(3, "until judged")
    """Validations without a better score before the run stops early; 0: never."""
    max_new_tokens: int = 64
    """Tokens of a generated answer at most."""

    def problems(self, at: str) -> Iterator[str]:
        for key, least in (("times", 1), ("max_rows", 0), ("patience", 0), ("max_new_tokens", 1)):
            if getattr(self, key) < least:
                yield f"{at}.{key}={getattr(self, key)} must be {least} or more"


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """A fine-tuning run."""

    run: FinetuneRunConfig = field(default_factory=FinetuneRunConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)
    batch: RecordsConfig = field(default_factory=RecordsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-4, weight_decay=0.01, betas=(0.9, 0.98))
    )
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(kind="linear", warmup_steps=10, final_fraction=0.0)
    )
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(micro_batch_rows=32))
    checkpoint: CheckpointConfig = field(
        default_factory=lambda: CheckpointConfig(every_steps=200, keep_last=1)
    )
    validation: ChoiceConfig = field(default_factory=ChoiceConfig)
    # Only what is not finite is refused: of few and short records one step's loss may be many times another's.
    guard: GuardConfig = field(
        default_factory=lambda: GuardConfig(max_norm_ratio=0.0, max_loss_rise=0.0, max_skipped_in_a_row=20)
    )
    heartbeat: HeartbeatConfig = field(default_factory=HeartbeatConfig)

    def problems(self, at: str = "") -> Iterator[str]:
        if self.cluster.num_workers > self.batch.rows_per_step:
            yield (
                f"cluster.num_workers={self.cluster.num_workers} is more than batch.rows_per_step="
                f"{self.batch.rows_per_step}: some workers would have no record"
            )
        if self.engine.zero_stage == 3 and self.cluster.num_workers > 1:
            # Its forward pass is a collective, and the workers' shares of validation differ in batches.
            yield "engine.zero_stage=3 with several workers is not for fine-tuning; nearest: engine.zero_stage=2"


def absolute(config: FinetuneConfig) -> FinetuneConfig:
    """The same configuration with absolute URIs: workers have another working directory."""
    run = replace(
        config.run,
        storage=open_store(config.run.storage).uri,
        prepared=open_store(config.run.prepared).uri,
    )
    backbone = replace(config.backbone, uri=config.backbone.uri and open_store(config.backbone.uri).uri)
    return replace(config, run=run, backbone=backbone)


def seed_store(config: FinetuneConfig, seed: int) -> Store:
    """The folder of one seed's run."""
    return open_store(config.run.storage).child(f"{config.run.name}/seed-{seed}")
