"""How fast a step would be: a model of computing and communication, with few constants, held against published speeds.

A micro-batch's matrix products run at the GPU's `matrix_share` of its peak, attention at a share of its own, and
everything elementwise, the loss's logits included, at the speed of the GPU's memory; then come the optimiser, at memory
speed, and ZeRO's collectives (Rajbhandari et al. 2020, section 7), as rings: a ring of N moves (N - 1) / N of the data
through each GPU's share of the slower link. Not counted: the host's time for ZeRO's hooks, checkpoints, validation,
failures. These constants and the shares in cluster/hardware/fleet.py were chosen on a grid for the least squared
error over the
rows of trainers/planning/published_speeds.py; the planner prints what error is left.
"""

from dataclasses import dataclass
from typing import Literal

from cluster.hardware.fleet import Gpu
from trainers.model.shape import ModelConfig, count_parameters, flops_per_token

ATTENTION_SHARE = 0.25
"""Of the peak, fused attention at 2k to 8k positions, for the causal half alone."""
PASSES = {False: 12.0, True: 6.0}
"""How often each activation is read or written in a forward and backward pass, eager and compiled."""
LOGIT_BYTES = {False: 36, True: 14}
"""Read and written for each logit beside the head's matrix products (trainers/model/cross_entropy.py), eager and
compiled."""
LINK_SHARE = 0.75
"""Of a link's bytes/s, reached by NCCL's large collectives."""
HOST_BANDWIDTH = 25e9
"""Bytes/s between a GPU and host memory over PCIe 4 x16, all GPUs of a node at once."""
HOST_UPDATE = 2e9
"""Parameters/s that one node's CPUs update with an Adam of torch, 25 bytes each at 50 GB/s."""
BF16, FP32 = 2, 4


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """What a plan may choose."""

    zero_stage: Literal[0, 1, 2, 3]
    micro_batch_rows: int
    activation_checkpointing: bool = False
    offload: Literal["none", "optimizer", "optimizer+parameters"] = "none"
    compiled: bool = True
    overlapped: bool = False
    """Whether gradients travel while others are computed; stage 3 is taken to fetch parameters ahead in any case."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimiser step on one GPU."""

    computing: float
    communicating: float
    """What is not hidden behind computing."""
    updating: float

    @property
    def total(self) -> float:
        return self.computing + self.communicating + self.updating


def step_time(
    model: ModelConfig,
    seq_len: int,
    micro_batches: int,
    strategy: Strategy,
    gpu: Gpu,
    num_gpus: int,
    target_share: float = 1.0,
) -> StepTime:
    """Estimate a step of `micro_batches` micro-batches on each GPU, in bf16; `target_share` as in `flops_per_token`."""
    computing = micro_batch_seconds(model, seq_len, strategy, gpu, target_share)
    weights = BF16 * count_parameters(model).total
    data = weights * (num_gpus - 1) / num_gpus / ring_bandwidth(gpu, num_gpus)
    if strategy.zero_stage == 3:
        # Gathered for the forward and for the backward pass, gradients scattered: in each micro-batch.
        moving = 3 * data
        if strategy.offload == "optimizer+parameters":
            moving += 2 * weights / num_gpus / HOST_BANDWIDTH
        exposed = micro_batches * max(0.0, moving - 0.9 * computing)
    else:
        reductions = micro_batches if strategy.zero_stage == 2 else 1
        hidden = 0.6 * computing if strategy.overlapped else 0.0  # behind the backward pass
        reducing = data if strategy.zero_stage == 2 else 2 * data
        exposed = reductions * max(0.0, reducing - hidden) + (data if strategy.zero_stage else 0.0)
    share = num_gpus if strategy.zero_stage else 1
    return StepTime(
        computing=micro_batches * computing,
        communicating=exposed,
        updating=update_seconds(count_parameters(model).total / share, strategy, gpu),
    )


def micro_batch_seconds(
    model: ModelConfig, seq_len: int, strategy: Strategy, gpu: Gpu, target_share: float = 1.0
) -> float:
    """Forward and backward pass of one micro-batch."""
    again = 4 / 3 if strategy.activation_checkpointing else 1.0
    attention = 12.0 * model.num_layers * model.num_heads * model.head_width * seq_len
    matrices = flops_per_token(model, seq_len, target_share) - attention
    peak = gpu.accelerator.bf16
    # The causal half; its backward pass computes the scores again: 3.5 instead of 3 passes.
    flash = attention / 2 * (3.5 / 3 + (again - 1))
    width, kv = model.hidden_size, model.kv_heads * model.head_width
    elements = model.num_layers * (6 * width + 2 * kv + 4 * model.intermediate_size)
    per_token = (
        matrices * again / (peak * gpu.matrix_share)
        + flash / (peak * ATTENTION_SHARE)
        + PASSES[strategy.compiled] * again * BF16 * elements / gpu.memory_bandwidth
        + LOGIT_BYTES[strategy.compiled] * target_share * model.vocab_size / gpu.memory_bandwidth
    )
    return strategy.micro_batch_rows * seq_len * per_token


def update_seconds(parameters: float, strategy: Strategy, gpu: Gpu) -> float:
    """One update of this many parameters: value and two moments read and written, gradient read, weight written."""
    if strategy.offload == "none":
        return parameters * (7 * FP32 + BF16) / gpu.memory_bandwidth
    travelling = parameters * (FP32 + BF16) / HOST_BANDWIDTH
    return travelling + parameters * gpu.per_node / HOST_UPDATE


def ring_bandwidth(gpu: Gpu, num_gpus: int) -> float:
    """Bytes/s of a ring over all GPUs: a node's GPUs share its way out, and pass the data on among themselves."""
    slower = gpu.link if num_gpus <= gpu.per_node else min(gpu.link, gpu.network * gpu.per_node)
    return LINK_SHARE * slower
