"""The configuration of a pretraining run: one section per part, each a dataclass beside the code that it configures."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from cluster.configuration.keys import may_change
from cluster.hardware.machine import EnergyConfig, worker_watts
from cluster.limits.bounds import folder_problems
from cluster.sessions.workers import ClusterConfig
from cluster.storage.uris import Store, open_store
from data.order.order import OrderConfig
from data.reading.raw_shards import CorpusConfig
from data.rows.framing import Framing, framing_of
from data.shards.manifest import Manifest
from trainers.checkpoints.keeping import CheckpointConfig
from trainers.engine.config import EngineConfig
from trainers.evaluation.selection import ValidationConfig
from trainers.model.shape import ModelConfig
from trainers.objectives.kinds import OBJECTIVES, ObjectiveConfig
from trainers.optim.optimizer import OptimizerConfig
from trainers.optim.schedule import ScheduleConfig
from trainers.recovery.guard import GuardConfig
from trainers.recovery.heartbeat import HeartbeatConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run keeps its state, and how often it may be started anew."""

    name: str = may_change("pretrain")
    """The run's folder under `run.storage`; the same name goes on where the run was."""
    storage: str = may_change("runs")
    """URI of the folder of runs: a path, file://, s3:// or gs://; every node must reach it."""
    steps: int = may_change(10_000, "until judged")
    """Optimiser steps. It may be raised until the run is judged; the schedule then ends later too."""
    init_from: str = ""
    """Folder of a model to start from: an export of this project, or a Hugging Face BERT or Llama with
    safetensors. model.* and corpus.tokenizer.path are then taken from there; empty: random weights."""
    seed: int = 0
    """Of the initial weights. The order of the rows has a seed of its own, `order.seed`."""
    max_failures: int = may_change(3)
    """Restarts from the last committed checkpoint before the run gives up; -1: no limit."""
    log_every_seconds: float = may_change(10.0)
    """Seconds between two progress lines where the output is not a terminal."""
    log_events: bool = may_change(False)
    """Print each event (start, checkpoint, skipped step, …) as a line of JSON, for a log collector."""
    prompts: tuple[str, ...] = may_change(("The ",), "until finished")
    """Continued by the finished model, for the report."""
    floor_bytes: int = may_change(8_000_000, "until finished")
    """Bytes of training text for the byte n-gram that the report compares with; 0 leaves it out."""

    def problems(self, at: str) -> Iterator[str]:
        if "/" in self.name:
            yield f"{at}.name={self.name!r} must be the name of one folder under {at}.storage"
        yield from folder_problems(f"{at}.name", self.name, self.storage)
        if self.steps < 1:
            yield f"{at}.steps={self.steps} must be at least 1"
        if self.max_failures < -1:
            yield f"{at}.max_failures={self.max_failures} must be 0 or more, or -1 for no limit"
        if self.log_every_seconds <= 0:
            yield f"{at}.log_every_seconds={self.log_every_seconds} must be positive"
        if self.floor_bytes < 0:
            yield f"{at}.floor_bytes={self.floor_bytes} must not be negative; 0 leaves the floor out"


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """What one optimiser step is made of, whatever the number of workers."""

    seq_len: int = 1_024
    """Target tokens per row."""
    rows_per_step: int = 512
    """Rows of a global batch: all workers, all accumulation."""

    def problems(self, at: str) -> Iterator[str]:
        for key, value in (("seq_len", self.seq_len), ("rows_per_step", self.rows_per_step)):
            if value < 1:
                yield f"{at}.{key}={value} must be at least 1"


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A pretraining run."""

    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    order: OrderConfig = field(default_factory=OrderConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    heartbeat: HeartbeatConfig = field(default_factory=HeartbeatConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)

    def problems(self, at: str = "") -> Iterator[str]:
        """What does not fit between sections; each section has its own `problems`."""
        batch = self.batch
        yield from self.order.batch_problems(
            "order", rows_per_step=batch.rows_per_step, workers=self.cluster.num_workers
        )
        yield from self.order.source_problems("order", list(self.corpus.named_sources()))
        for split in ("validation", "test"):
            if self.corpus.splits.is_empty(split):
                yield f"corpus.splits leaves the {split} split empty, which every run needs: set corpus.splits.{split}"
        if not self.run.init_from:  # else the shape is still to be read from there
            yield from self.model_problems()

    def model_problems(self) -> Iterator[str]:
        """What does not fit to the model's shape."""
        batch = self.batch
        if batch.seq_len > self.model.max_positions:
            yield (
                f"batch.seq_len={batch.seq_len:,} is more than model.max_positions={self.model.max_positions:,}; "
                f"raise model.max_positions to {batch.seq_len:,} or shorten the rows"
            )
        yield from shape_problems(self.objective, self.model)
        if self.objective.is_encoder and batch.seq_len < LEAST_FRAMED:
            yield (
                f"batch.seq_len={batch.seq_len} is too short for a text between special tokens; "
                f"give {LEAST_FRAMED} or more"
            )


LEAST_FRAMED = 8
"""Positions of a row that holds two texts and three special tokens: less is no text."""


def shape_problems(objective: ObjectiveConfig, model: ModelConfig) -> Iterator[str]:
    """What the objective needs of the model's shape and the model has not, and what no loss would train."""
    if objective.kind not in OBJECTIVES:
        return  # its own line says so
    kind = f"objective.kind={objective.kind}"
    attention = "bidirectional" if objective.is_encoder else "causal"
    if model.attention != attention:
        yield f"{kind} needs model.attention={attention}, not {model.attention}"
    if model.pair_head != objective.has_pairs:
        needs = "needs a head for pairs" if objective.has_pairs else "would never train the head for pairs"
        yield f"{kind} {needs}: set model.pair_head={str(objective.has_pairs).lower()}"
    if objective.has_pairs and model.num_token_types < 2:
        yield f"{kind} tells two texts apart: model.num_token_types={model.num_token_types} must be 2 or more"


def run_store(config: PretrainConfig) -> Store:
    """The run's folder."""
    return open_store(config.run.storage).child(config.run.name)


def watts_per_worker(config: PretrainConfig, device: str, device_name: str) -> float:
    """Watts that a plan, a run's records and its report count for each worker."""
    return worker_watts(config.energy, device, device_name, config.cluster.threads)


def model_of(config: PretrainConfig, manifest: Manifest) -> ModelConfig:
    """The model's configuration with the vocabulary of the tokenizer, unless it names a larger one.

    Raises:
        ValueError: `model.vocab_size` is smaller than the tokenizer's.
    """
    wanted = config.model.vocab_size
    if 0 < wanted < manifest.vocab_size:
        raise ValueError(
            f"model.vocab_size={wanted:,} is less than the tokenizer's {manifest.vocab_size:,} entries; "
            f"nearest: {manifest.vocab_size:,}, or 0 to take the tokenizer's"
        )
    return replace(config.model, vocab_size=wanted or manifest.vocab_size)


def evaluation_framing(config: PretrainConfig, manifest: Manifest) -> Framing | None:
    """How rows are framed that are not trained on: alike for every seed of the objective."""
    framing = config.objective.framing
    if framing is None:
        return None
    return framing_of(replace(framing, seed=0), config.corpus.prepared, manifest, config.batch.seq_len)


def absolute(config: PretrainConfig) -> PretrainConfig:
    """The same configuration with absolute URIs: workers have another working directory."""
    corpus = config.corpus
    return replace(
        config,
        run=replace(
            config.run,
            storage=open_store(config.run.storage).uri,
            init_from=config.run.init_from and open_store(config.run.init_from).uri,
        ),
        corpus=replace(
            corpus,
            uri=corpus.uri and open_store(corpus.uri).uri,
            sources={name: open_store(uri).uri for name, uri in corpus.sources.items()},
            prepared=open_store(corpus.prepared).uri,
        ),
    )
