"""What a run will take, before it starts: tokens, compute, memory per worker, storage, time and energy.

Memory of the model's state is counted as in ZeRO (Rajbhandari et al. 2020, section 3.1) for what the engine
holds: weights, their gradients, gradients summed in float32, float32 master weights, optimiser moments, each
divided by the number of workers from the ZeRO stage on that partitions it; tests/test_plan_states.py holds it against
what DeepSpeed allocates. Activations are counted tensor by tensor as in Korthikanti et al. 2022 (section 4.1) for
this backbone. Of a worker on CPUs the process and its temporaries are counted too, to within 10 % of what nine held
(tests/test_plan.py); on GPUs the sum leaves out what the allocator, the framework and NCCL take.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cluster.hardware.fleet import Gpu
from cluster.hardware.machine import Energy, EnergyConfig, Peak, estimate_energy
from data.order.order import AUTOMATIC_LANES, largest_divisor
from trainers.checkpoints.keeping import CheckpointConfig
from trainers.checkpoints.writer import HEADER_ROOM_BYTES
from trainers.engine.config import BUCKET_ELEMENTS, EngineConfig, overlaps
from trainers.model.cross_entropy import chunk_tokens
from trainers.model.shape import ModelConfig, count_parameters, flops_per_token
from trainers.optim.optimizer import OptimizerConfig, moments
from trainers.planning.cpu_speed import cpu_step_seconds
from trainers.planning.run_time import Beside, Evaluations, beside_steps
from trainers.planning.throughput import StepTime, Strategy, step_time
from trainers.reporting.units import count, duration, energy, flop, mass, size

GPU_UTILIZATION = 0.40
"""Assumed model FLOP/s / peak: PaLM reports 0.46, Megatron-LM 0.44-0.52 (Narayanan et al. 2021, table 1)."""
PROCESS_BYTES = 590 << 20
"""Of a worker's process on CPUs without its model, measured: torch 210 MiB, Ray 135, the rest of the imports 60,
DeepSpeed's engine of the smallest model 125, kernels 20, and Ray Data's way of the rows 40."""
COMPILER_BYTES = 100 << 20
"""What torch.compile leaves in that process."""
PASS_OVERHEAD = {False: 0.9, True: 0.4}
"""Of what a pass keeps, what its temporaries hold beside it on a CPU, eager and compiled; fitted to five processes."""

FLOAT32, BFLOAT16 = 4, 2


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a plan follows from."""

    model: ModelConfig
    """With vocab_size filled in."""
    engine: EngineConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    seq_len: int
    target_share: float = 1.0
    """Of the positions, those that the output head is computed for."""
    rows_per_step: int
    steps: int
    num_workers: int
    lanes: int = 0
    """Strands of the order, each of which one worker trains. 0: as the order chooses."""
    train_tokens: int | None = None
    """Tokens of the training split; None: not prepared yet."""
    left_out: Mapping[str, Mapping[str, int]] | None = None
    """By source, what an epoch leaves out, as `Order.remainder` counts it; None: not prepared yet."""
    peak: Peak
    """Of one worker's device."""
    gpu: Gpu | None = None
    """One worker's device, where cluster/hardware/fleet.py has it; None: speed is a share of the peak."""
    watts: float
    """All workers together."""
    energy: EnergyConfig
    evaluations: Evaluations = Evaluations()
    tokens_per_second: float | None = None
    """Measured in an earlier part of the run; None: estimated from the peak."""

    @property
    def on_gpu(self) -> bool:
        return not self.peak.is_measured


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one worker. On a CPU all of it is host memory; with accelerators the last is."""

    parameters: float
    gradients: float
    optimizer: float
    buckets: float
    """What ZeRO gathers gradients in before it sends them: on a GPU allocated whole, however small the model."""
    activations: float
    checkpoint_buffers: float
    """Always host memory."""
    working: float = 0.0
    """On a CPU: temporaries of a pass, a copy of the weights from when ZeRO laid them out, gradients of a worker's part
    in float32, and as much again that the optimiser puts aside."""
    process: float = 0.0
    """On a CPU: libraries, Ray, the data's way."""

    @property
    def total(self) -> float:
        state = self.states + self.buckets + self.activations + self.checkpoint_buffers
        return state + self.working + self.process

    @property
    def states(self) -> float:
        """Parameters, gradients, masters and moments: what ZeRO partitions."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers; `text` says them."""

    job: Job
    tokens: int
    epochs: float | None
    micro_batches: int
    """Of one worker in a step."""
    flops: float
    """Of the whole run."""
    memory: Memory
    checkpoint_bytes: int
    """One checkpoint on storage."""
    kept_checkpoints: int
    """At the end of the run."""
    utilization: float
    """Share of the peak that the estimated time assumes or, where tokens/s were measured, implies."""
    seconds: float
    """Of all steps."""
    beside: Beside
    """What comes before, between and after them."""
    energy: Energy
    """While the workers compute: steps, compilation, validations and test, as a report counts it."""

    @property
    def text(self) -> str:
        return "\n".join(f"{name:<12} {line}" for name, line in _lines(self))


def make_plan(job: Job) -> Plan:
    """Computes the plan. No I/O, nothing started."""
    tokens = job.steps * job.rows_per_step * job.seq_len
    flops = tokens * flops_per_token(job.model, job.seq_len, job.target_share)
    peak = job.peak.flops_per_second * job.num_workers
    seconds = training_seconds(job)
    beside = beside_steps(job.evaluations, seconds / tokens if tokens else 0.0, job.engine.compile)
    state_bytes = FLOAT32 * state_elements(job.model, job.optimizer)
    checkpoint = job.checkpoint
    for_good = job.steps // checkpoint.keep_every_steps if checkpoint.keep_every_steps else 0
    return Plan(
        job=job,
        tokens=tokens,
        epochs=tokens / job.train_tokens if job.train_tokens else None,
        micro_batches=micro_batches(job),
        flops=flops,
        memory=memory_per_worker(job),
        checkpoint_bytes=state_bytes,
        kept_checkpoints=checkpoint.keep_last + 1 + for_good,  # 1: the best
        utilization=flops / (seconds * peak) if seconds and peak else 0.0,
        seconds=seconds,
        beside=beside,
        energy=estimate_energy(job.energy, job.watts, seconds + beside.computing),
    )


def training_seconds(job: Job) -> float:
    """Of all steps, without what comes between them."""
    tokens = job.steps * job.rows_per_step * job.seq_len
    if job.tokens_per_second:
        return tokens / job.tokens_per_second
    if step := step_time_of(job):
        return job.steps * step.total
    if not job.on_gpu:
        return job.steps * cpu_step_seconds(
            job.model,
            job.optimizer,
            tokens=rows_per_worker(job) * job.seq_len,
            seq_len=job.seq_len,
            target_share=job.target_share,
            workers=job.num_workers,
            zero_stage=job.engine.zero_stage,
            compiled=job.engine.compile,
            recomputes=job.engine.activation_checkpointing,
            flops_per_second=job.peak.flops_per_second,
        )
    flops = tokens * flops_per_token(job.model, job.seq_len, job.target_share)
    return flops / (job.peak.flops_per_second * job.num_workers * GPU_UTILIZATION)


def step_time_of(job: Job) -> StepTime | None:
    """A step on GPUs of the table in cluster/hardware/fleet.py; None on others, and in float32, of which no speed
    is known."""
    if job.gpu is None or job.engine.precision != "bf16":
        return None
    return step_time(
        job.model,
        job.seq_len,
        micro_batches(job),
        strategy_of(job),
        job.gpu,
        job.num_workers,
        job.target_share,
    )


def strategy_of(job: Job) -> Strategy:
    """The configured engine, as the model of speed sees it."""
    engine = job.engine
    return Strategy(
        zero_stage=engine.zero_stage,
        micro_batch_rows=engine.rows_per_pass(rows_per_worker(job)),
        activation_checkpointing=engine.activation_checkpointing,
        offload=engine.offload,
        compiled=engine.compile,
        overlapped=overlaps(engine, on_gpu=True),
    )


def rows_per_worker(job: Job) -> int:
    """Rows of a step on each worker, those that fill up missing lanes included."""
    lanes = lanes_of(job)
    return math.ceil(lanes / job.num_workers) * (job.rows_per_step // lanes)


def micro_batches(job: Job) -> int:
    """Passes of a worker in a step."""
    rows = rows_per_worker(job)
    return rows // job.engine.rows_per_pass(rows)


def lanes_of(job: Job) -> int:
    """The order's lanes; for a cluster that is larger than it would choose, one for each worker if that divides."""
    return job.lanes or largest_divisor(job.rows_per_step, max(AUTOMATIC_LANES, job.num_workers))


def filled_share(job: Job) -> float:
    """Of the rows that workers compute on, those of weight zero, in place of lanes that there are not."""
    return 1 - job.rows_per_step / (rows_per_worker(job) * job.num_workers)


def state_elements(model: ModelConfig, optimizer: OptimizerConfig) -> int:
    """Elements of weights and moments: what a checkpoint holds in float32."""
    parameters = count_parameters(model)
    return (
        parameters.total
        + parameters.embedding * len(moments(optimizer, "embedding"))
        + parameters.vectors * len(moments(optimizer, "norm"))
        + parameters.head * len(moments(optimizer, "head"))
        + parameters.matrices * len(moments(optimizer, "matrix"))
    )


def memory_per_worker(job: Job) -> Memory:
    """Bytes by kind; see the module's docstring for the sources."""
    stage, workers, engine = job.engine.zero_stage, job.num_workers, job.engine
    parameters = count_parameters(job.model).total
    is_bf16 = engine.precision == "bf16"
    element = BFLOAT16 if is_bf16 else FLOAT32
    has_masters = stage >= 1 or is_bf16
    # Several micro-batches are summed in float32, except at stage 0 (see trainers/engine/config.py). Stage 1 keeps the
    # sum of all gradients beside those of the micro-batch; later ones keep their own part alone, and hand each on.
    several = micro_batches(job) > 1
    sum_element = FLOAT32 if is_bf16 and several and stage >= 1 else 0
    kept = element + sum_element if stage <= 1 else (sum_element or element) / workers
    moment_elements = state_elements(job.model, job.optimizer) - parameters
    state_bytes = FLOAT32 * (parameters + moment_elements) / workers
    files = math.ceil(state_bytes / (job.checkpoint.file_bytes - HEADER_ROOM_BYTES))
    bucket = engine.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", BUCKET_ELEMENTS)
    if not job.on_gpu:  # what is allocated and never filled takes no memory
        bucket = min(bucket, parameters)
    copies = 2 if overlaps(engine, job.on_gpu) and stage < 3 else 1  # one travels while another is filled
    activations, buffers = activation_bytes(job, element), float(files * job.checkpoint.file_bytes)
    laid_out = element + 2 * FLOAT32 / (workers if stage else 1)
    bucket_element = max(element, sum_element) if stage == 1 else element
    return Memory(
        parameters=element * parameters / (workers if stage == 3 else 1),
        gradients=kept * parameters,
        optimizer=FLOAT32 * (has_masters * parameters + moment_elements) / (workers if stage else 1),
        buckets=float(copies * bucket * bucket_element) if stage else 0.0,
        activations=activations,
        checkpoint_buffers=buffers if job.on_gpu else min(buffers, state_bytes),  # untouched memory is none
        working=0.0 if job.on_gpu else PASS_OVERHEAD[engine.compile] * activations + laid_out * parameters,
        process=0.0 if job.on_gpu else float(PROCESS_BYTES + engine.compile * COMPILER_BYTES),
    )


def activation_bytes(job: Job, element: int) -> float:
    """What one micro-batch keeps for its backward pass, attention computed without a matrix of scores.

    Elements per token and layer: residual stream and its norm before attention and before the MLP (4 D);
    query, key, value and attention's output (2 D + 2 K); gate, up, gate's activation and their product (4 F),
    without a gate the MLP's inside before and after its activation (2 F).
    With activation checkpointing each layer keeps its input alone (D), and one layer at a time the rest.
    Beside them the loss holds, of a chunk of tokens, logits, their logarithms in float32 and their gradient, and the
    sum of the head's gradients in float32 (trainers/model/cross_entropy.py).
    """
    model = job.model
    rows = job.engine.rows_per_pass(rows_per_worker(job))
    D, K, F = model.hidden_size, model.kv_heads * model.head_width, model.intermediate_size
    layer = 6 * D + 2 * K + (4 if model.activation == "swiglu" else 2) * F
    kept = model.num_layers * D + layer if job.engine.activation_checkpointing else model.num_layers * layer
    tokens = rows * job.seq_len
    targets = math.ceil(tokens * job.target_share)
    logits = min(targets, chunk_tokens(targets, D, model.vocab_size)) * model.vocab_size
    loss = (2 * element + FLOAT32) * logits + FLOAT32 * D * model.vocab_size
    return float(tokens * (kept + 2 * D) * element + loss)


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    job, parameters = plan.job, count_parameters(plan.job.model)
    rows, stage = rows_per_worker(job), job.engine.zero_stage
    tokens = (
        f"{job.steps:,} steps x {job.rows_per_step:,} rows x {job.seq_len:,} tokens = {count(plan.tokens)}"
    )
    yield "tokens", tokens + _epochs(plan)
    for source, left in (job.left_out or {}).items():
        yield "left out", f"{left['rows']:,} rows and {left['tokens']:,} tokens of {source} in each epoch"
    parts = (
        f"{count(parameters.non_embedding)} in layers, {count(parameters.embedding)} in embedding and head"
    )
    yield "model", f"{count(parameters.total)} parameters: {parts}"
    yield "compute", f"{flop(plan.flops)} = {flop(plan.flops / plan.tokens)} a token (as in PaLM, appendix B)"
    share = f"{rows:,} rows of a step each, in {plan.micro_batches} micro-batches"
    yield "workers", f"{job.num_workers} in {job.engine.precision}, ZeRO stage {stage}; {share}"
    if filled := filled_share(job):
        reason = f"order.lanes={lanes_of(job)} is no multiple of {job.num_workers} workers"
        yield "filled up", f"{filled:.1%} of the rows computed on have weight zero: {reason}"
    yield from _memory_lines(plan)
    yield "checkpoints", f"{size(plan.checkpoint_bytes)} each, every {job.checkpoint.every_steps:,} steps;"
    kept_bytes = plan.checkpoint_bytes * plan.kept_checkpoints
    yield "", f"at most {plan.kept_checkpoints} kept, {size(kept_bytes)} of storage"
    yield "time", f"{duration(plan.seconds)} of training, {_basis(plan)}"
    yield "", _in_all(plan)
    yield "energy", f"{energy(plan.energy.kwh)}, {mass(plan.energy.co2_grams)} CO2"
    yield "", plan.energy.assumption


def _epochs(plan: Plan) -> str:
    if plan.epochs is None:
        return ""
    return f" = {plan.epochs:.2f} epochs of {count(plan.job.train_tokens or 0)}"


def _basis(plan: Plan) -> str:
    if plan.job.tokens_per_second:
        return f"at {count(plan.job.tokens_per_second)} tokens/s as measured"
    peak, gpu = plan.job.peak, plan.job.gpu
    if gpu and step_time_of(plan.job):
        of = f"of {flop(peak.flops_per_second)}/s a worker ({peak.source})"
        return (
            f"at {plan.utilization:.0%} {of}, by the model of trainers/planning/throughput.py for {gpu.name}"
        )
    how = "at an assumed" if plan.job.on_gpu else "by the model of trainers/planning/cpu_speed.py at"
    return f"{how} {plan.utilization:.0%} of {flop(peak.flops_per_second)}/s a worker ({peak.source})"


def _in_all(plan: Plan) -> str:
    beside, known = plan.beside, plan.job.evaluations
    parts = [f"start {duration(beside.starting)}", f"compiling {duration(beside.compiling)}"]
    if known.validation_tokens is not None:
        parts.append(f"{known.validations:,} validations {duration(beside.validating)}")
    if known.test_tokens is not None:
        parts.append(f"test {duration(beside.testing)}")
    parts.append(f"end {duration(beside.ending)}")
    is_known = None not in (known.validation_tokens, known.test_tokens)
    unknown = "" if is_known else "; a corpus that is not prepared yet is not counted"
    return f"about {duration(plan.seconds + beside.total)} in all: {', '.join(parts)}{unknown}"


def _memory_lines(plan: Plan) -> Iterator[tuple[str, str]]:
    memory, offload = plan.memory, plan.job.engine.offload
    where = "" if offload == "none" else f", {offload} in host memory"
    about = "of tensors per worker" if plan.job.on_gpu else "per worker"
    yield "memory", f"about {size(memory.total)} {about}{where}:"
    for num_bytes, what in (
        (memory.parameters, "parameters"),
        (memory.gradients, "gradients"),
        (memory.optimizer, f"master weights and moments of {plan.job.optimizer.kind}"),
        (memory.buckets, "buckets of gradients on their way"),
        (memory.activations, "activations of a micro-batch"),
        (memory.checkpoint_buffers, "host buffers for checkpoints"),
        (memory.working, "temporaries of passes and updates"),
        (memory.process, "libraries, Ray and the data's way"),
    ):
        if num_bytes:
            yield "", f"{size(num_bytes):>10}  {what}"
