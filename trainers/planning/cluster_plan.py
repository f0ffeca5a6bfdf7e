"""Options to train a model on a cluster: what fits, how fast it is, and what it costs."""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table

from cluster.configuration.keys import nearest
from cluster.hardware.fleet import GPUS, Gpu
from cluster.hardware.machine import Peak
from data.order.order import AUTOMATIC_LANES, largest_divisor
from data.reading.raw_shards import CorpusConfig
from trainers.engine.config import EngineConfig
from trainers.model.shape import ModelConfig, count_parameters
from trainers.planning.checks import job_of as job_of_run
from trainers.planning.plan import Job, Memory, Plan, make_plan, rows_per_worker, step_time_of, strategy_of
from trainers.planning.published_speeds import errors
from trainers.planning.throughput import StepTime, Strategy
from trainers.pretraining.config import PretrainConfig
from trainers.reporting.units import count, duration, energy, mass, size

RESERVED_BYTES = 3 << 30
"""Of a GPU's memory: the driver's context, NCCL's buffers, kernels."""


USABLE = 0.92
"""Of the rest: what fragmentation leaves of it to torch's allocator."""


HOST_USABLE = 0.7
"""Of a node's memory: Ray's object store takes 30 % of it unless it is told otherwise."""


TABLE_WIDTH = 112


BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class AnyCorpus(CorpusConfig):
    """A corpus that need not be there yet."""

    def problems(self, at: str) -> Iterator[str]:
        return iter(())


@dataclass(frozen=True, kw_only=True)
class ClusterPlanConfig(PretrainConfig):
    """A pretraining run, and the cluster to plan it for."""

    corpus: AnyCorpus = field(default_factory=AnyCorpus)
    gpus: int = 8
    """GPUs in all."""
    gpu: str = "h100-80gb"
    """Which: a name of the table in cluster/hardware/fleet.py."""
    dollars_per_gpu_hour: float = 2.5
    """Price of one GPU for an hour, hosts and network included: assumed, they differ by a factor of five."""
    rows: int = 12
    """Lines of the table."""

    def problems(self, at: str = "") -> Iterator[str]:
        yield from super().problems(at)
        if self.engine.precision != "bf16":
            yield f"engine.precision={self.engine.precision}: no speed in it is known for any GPU; plan with bf16"
        if self.gpu not in GPUS:
            guess = nearest(self.gpu, list(GPUS)) or ", ".join(GPUS)
            yield f"gpu={self.gpu} is not in the table of cluster/hardware/fleet.py; nearest: {guess}"
        if not 1 <= self.gpus <= self.batch.rows_per_step:
            yield f"gpus={self.gpus:,} must be from 1 to batch.rows_per_step={self.batch.rows_per_step:,}"
        elif 0 < self.order.lanes < self.gpus:
            yield (
                f"gpus={self.gpus:,} cannot share order.lanes={self.order.lanes:,}: a run would refuse them; set "
                f"order.lanes={lanes_for(self.batch.rows_per_step, self.gpus):,}, or 0 to have it planned"
            )


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to train, and what it would come to."""

    plan: Plan
    device_bytes: float
    """Of one GPU's memory."""
    host_bytes: float
    """Of its node's memory, all GPUs of the node together."""
    fits: bool
    time: StepTime

    @property
    def strategy(self) -> Strategy:
        return strategy_of(self.plan.job)

    @property
    def micro_batches(self) -> int:
        return self.plan.micro_batches

    @property
    def tokens_per_second(self) -> float:
        """All GPUs."""
        return self.plan.tokens / self.plan.seconds

    @property
    def mfu(self) -> float:
        return self.plan.utilization


def options(config: ClusterPlanConfig) -> list[Option]:
    """Every combination that a configuration can have, the fastest first, those that do not fit last."""
    rows = rows_per_worker(job_of(config, config.engine))
    sizes = [number for number in BATCH_SIZES if number <= rows and rows % number == 0]
    combinations: Iterator[tuple[Any, ...]] = itertools.product(
        (0, 1, 2, 3), ("none", "optimizer", "optimizer+parameters"), (False, True), sizes
    )
    found = [
        option_of(
            config,
            replace(
                config.engine,
                zero_stage=stage,
                offload=offload,
                activation_checkpointing=recompute,
                micro_batch_rows=micro,
            ),
        )
        for stage, offload, recompute, micro in combinations
        if stage >= {"none": 0, "optimizer": 1, "optimizer+parameters": 3}[offload]
    ]
    return sorted(found, key=lambda option: (not option.fits, -option.tokens_per_second))


def option_of(config: ClusterPlanConfig, engine: EngineConfig) -> Option:
    """What a run with this engine would come to."""
    gpu, plan = GPUS[config.gpu], make_plan(job_of(config, engine))
    time = step_time_of(plan.job)
    assert time is not None, "the GPU is of the table"
    on_host = plan.memory.checkpoint_buffers + offloaded(engine, plan.memory)
    on_device = plan.memory.total - on_host
    node_bytes = on_host * min(config.gpus, gpu.per_node)
    return Option(
        plan=plan,
        device_bytes=on_device,
        host_bytes=node_bytes,
        fits=on_device <= room(gpu) and node_bytes <= host_room(gpu),
        time=time,
    )


def offloaded(engine: EngineConfig, memory: Memory) -> float:
    """Bytes of a worker's states that lie in host memory."""
    optimizer = 0.0 if engine.offload == "none" else memory.optimizer
    return optimizer + (memory.parameters if engine.offload == "optimizer+parameters" else 0.0)


def job_of(config: ClusterPlanConfig, engine: EngineConfig) -> Job:
    """The run on these GPUs, as its --dry-run counts it there."""
    gpu = GPUS[config.gpu]
    run = replace(
        config,
        engine=engine,
        cluster=replace(config.cluster, num_workers=config.gpus, gpus_per_worker=1.0),
        order=replace(config.order, lanes=lanes_of(config)),
    )
    peak = Peak(gpu.accelerator.bf16, gpu.accelerator.source)
    return job_of_run(run, model_of(config), "cuda", gpu.device, peak, gpu)


def lanes_of(config: ClusterPlanConfig) -> int:
    """Those of the configuration, or what the run chooses; where that is fewer than GPUs, the run must be told more."""
    rows = config.batch.rows_per_step
    chosen = config.order.lanes or largest_divisor(rows, AUTOMATIC_LANES)
    return chosen if chosen >= config.gpus else lanes_for(rows, config.gpus)


def lanes_for(rows_per_step: int, workers: int) -> int:
    """Lanes that so many workers can share with the fewest rows of weight zero."""
    divisors = [lanes for lanes in range(workers, rows_per_step + 1) if rows_per_step % lanes == 0]
    return min(divisors, key=lambda lanes: -(-lanes // workers) * (rows_per_step // lanes))


def model_of(config: ClusterPlanConfig) -> ModelConfig:
    """With the vocabulary that the configuration names: a tokenizer of its own is not looked at."""
    return replace(config.model, vocab_size=config.model.vocab_size or config.corpus.tokenizer.vocab_size)


def room(gpu: Gpu) -> float:
    """Bytes of a GPU that tensors may take."""
    return USABLE * (gpu.memory_bytes - RESERVED_BYTES)


def host_room(gpu: Gpu) -> float:
    """Bytes of a node's memory that its workers may take."""
    return HOST_USABLE * gpu.host_bytes


def why_nothing_fits(found: Sequence[Option], gpu: Gpu) -> str:
    """What is short: the GPUs' memory, or where that would do, the hosts'."""
    if on_device := [option for option in found if option.device_bytes <= room(gpu)]:
        least = min(option.host_bytes for option in on_device)
        return (
            f"nothing fits: what fits into a GPU takes at least {size(least)} of {size(host_room(gpu))} of a node's "
            "memory; take more GPUs, or nodes with more memory"
        )
    least = min(option.device_bytes for option in found)
    advice = "take more GPUs, or some with more memory"
    return f"nothing fits: the least is {size(least)} of {size(room(gpu))} a GPU; {advice}"


def options_table(config: ClusterPlanConfig, found: Sequence[Option]) -> Table:
    table = Table(
        title=f"{count(count_parameters(model_of(config)).total)} parameters on {config.gpus} x {config.gpu}"
    )
    for name in (
        "ZeRO",
        "offload",
        "recompute",
        "micro-batch",
        "a GPU holds",
        "a host",
        "tokens/s",
        "MFU",
        "exposed",
    ):
        table.add_column(name, justify="right")
    for option in found:
        way = option.strategy
        table.add_row(
            str(way.zero_stage),
            way.offload,
            "yes" if way.activation_checkpointing else "no",
            f"{way.micro_batch_rows} x {option.micro_batches}",
            size(option.device_bytes)
            + ("" if option.device_bytes <= room(GPUS[config.gpu]) else " (too much)"),
            size(option.host_bytes)
            + ("" if option.host_bytes <= host_room(GPUS[config.gpu]) else " (too much)"),
            count(round(option.tokens_per_second)),
            f"{option.mfu:.1%}",
            f"{option.time.communicating / option.time.total:.1%}",
        )
    return table


def summary(config: ClusterPlanConfig, gpu: Gpu, best: Option) -> Iterator[str]:
    """What the run takes by the fastest way that fits, and as it is configured."""
    plan, way = best.plan, best.strategy
    hours = config.gpus * plan.seconds / 3600
    keys = f"engine.zero_stage={way.zero_stage} engine.offload={way.offload} "
    keys += f"engine.activation_checkpointing={str(way.activation_checkpointing).lower()} "
    yield f"fastest    {keys}engine.micro_batch_rows={way.micro_batch_rows}"
    if not config.order.lanes and (lanes := lanes_of(config)) > AUTOMATIC_LANES:
        yield f"           order.lanes={lanes}: a run of {config.gpus} workers needs it from its first step on"
    yield f"time       {count(plan.tokens)} tokens in {duration(plan.seconds)}, {hours:,.0f} GPU-hours"
    yield f"cost       ${hours * config.dollars_per_gpu_hour:,.0f} at ${config.dollars_per_gpu_hour:g} a GPU-hour"
    yield f"energy     {energy(plan.energy.kwh)}, {mass(plan.energy.co2_grams)} CO2; {plan.energy.assumption}"
    given = option_of(config, config.engine)
    fits = "" if given.fits else ", which does not fit"
    yield f"configured {duration(given.plan.seconds)}, {energy(given.plan.energy.kwh)} with the engine as it is{fits}"
    node = f"{size(gpu.host_bytes)} of a node of {min(config.gpus, gpu.per_node)} workers"
    yield f"host       {size(best.host_bytes)} of the {node}, beside Ray's object store"


def basis(gpu: Gpu) -> Iterator[str]:
    """Where the constants come from, and how wrong the model is where it can be held against others' measurements."""
    found = errors()
    sizes = [abs(error) for _, error in found]
    row, worst = found[0]
    yield f"constants  {gpu.accelerator.source}; {gpu.source}"
    yield (
        f"error      of the model on {len(found)} published speeds: median {statistics.median(sizes):.0%}, "
        f"worst {worst:+.0%} ({row.source}, {row.model}, {row.num_gpus} x {row.gpu}, {row.seq_len:,} tokens a row); "
        "all of stage 3: for the others it was held against none"
    )
