"""Speeds that others published, as the planner's model is held against: tokens/s of one GPU, bf16, fully sharded.

llm-foundry: scripts/train/benchmarking/README.md (MosaicML, 2023); MPT, whose plain MLP of 4 D is written here as a
gated one of as many parameters. torchtitan: docs/performance.md (2024), benchmarks/llama3_h100_202412_torchtitan.md;
its H100s have 96 GB at 2.4 TB/s and a limit of 500 W, and it recomputes a part of the activations, here taken as
none.
"""

import math
from dataclasses import dataclass, replace

from cluster.hardware.fleet import GPUS
from trainers.model.shape import ModelConfig
from trainers.planning.throughput import Strategy, step_time


@dataclass(frozen=True)
class Published:
    source: str
    model: str
    gpu: str
    num_gpus: int
    seq_len: int
    micro_batch_rows: int
    micro_batches: int
    recomputes: bool
    tokens_per_second: float
    """Of one GPU."""
    compiled: bool = False


def mpt(width: int, layers: int, heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=50_368,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=8 * width // 3,
        tie_embeddings=True,
    )


def llama3(width: int, layers: int, heads: int, inner: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=128_256,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        intermediate_size=inner,
    )


MODELS = {
    "MPT 760M": mpt(1536, 24, 12),
    "MPT 1B": mpt(2048, 24, 16),
    "MPT 3B": mpt(2560, 32, 20),
    "MPT 7B": mpt(4096, 32, 32),
    "MPT 13B": mpt(5120, 40, 40),
    "MPT 30B": mpt(7168, 48, 56),
    "MPT 70B": mpt(8192, 80, 64),
    "Llama 3 8B": llama3(4096, 32, 32, 14_336),
    "Llama 3 70B": llama3(8192, 80, 64, 28_672),
}
FOUNDRY, TITAN = "llm-foundry", "torchtitan"
ROWS = (
    Published(FOUNDRY, "MPT 760M", "h100-80gb", 8, 2048, 24, 2, False, 63_147),
    Published(FOUNDRY, "MPT 760M", "h100-80gb", 32, 2048, 24, 1, False, 67_971),
    Published(FOUNDRY, "MPT 1B", "h100-80gb", 8, 2048, 14, 1, False, 45_455),
    Published(FOUNDRY, "MPT 1B", "h100-80gb", 64, 2048, 20, 1, False, 44_402),
    Published(FOUNDRY, "MPT 1B", "h100-80gb", 8, 8192, 3, 4, False, 29_157),
    Published(FOUNDRY, "MPT 3B", "h100-80gb", 16, 2048, 10, 3, False, 24_142),
    Published(FOUNDRY, "MPT 3B", "h100-80gb", 64, 2048, 6, 3, False, 22_525),
    Published(FOUNDRY, "MPT 7B", "h100-80gb", 8, 2048, 6, 1, False, 10_643),
    Published(FOUNDRY, "MPT 7B", "h100-80gb", 8, 4096, 16, 2, True, 8_611),
    Published(FOUNDRY, "MPT 7B", "h100-80gb", 8, 8192, 8, 2, True, 6_935),
    Published(FOUNDRY, "MPT 13B", "h100-80gb", 64, 2048, 2, 1, False, 4_800),
    Published(FOUNDRY, "MPT 13B", "h100-80gb", 8, 4096, 10, 3, True, 4_717),
    Published(FOUNDRY, "MPT 30B", "h100-80gb", 32, 2048, 14, 3, True, 2_308),
    Published(FOUNDRY, "MPT 70B", "h100-80gb", 64, 2048, 8, 4, True, 1_039),
    Published(FOUNDRY, "MPT 760M", "a100-80gb", 8, 2048, 24, 2, False, 32_434),
    Published(FOUNDRY, "MPT 1B", "a100-80gb", 8, 2048, 14, 4, False, 20_513),
    Published(FOUNDRY, "MPT 3B", "a100-80gb", 8, 2048, 10, 2, False, 10_811),
    Published(FOUNDRY, "MPT 7B", "a100-80gb", 8, 2048, 6, 2, False, 4_641),
    Published(FOUNDRY, "MPT 7B", "a100-80gb", 8, 8192, 8, 2, True, 3_206),
    Published(FOUNDRY, "MPT 13B", "a100-80gb", 8, 4096, 10, 3, True, 2_060),
    Published(FOUNDRY, "MPT 30B", "a100-80gb", 8, 2048, 3, 21, True, 916),
    Published(FOUNDRY, "MPT 70B", "a100-80gb", 64, 2048, 8, 4, True, 410),
    Published(FOUNDRY, "MPT 7B", "a100-40gb", 128, 2048, 18, 1, True, 3_623),
    Published(FOUNDRY, "MPT 13B", "a100-40gb", 128, 2048, 16, 1, True, 1_972),
    Published(TITAN, "Llama 3 8B", "h100-80gb", 8, 8192, 2, 1, False, 5_762),
    Published(TITAN, "Llama 3 8B", "h100-80gb", 8, 8192, 2, 1, False, 6_667, compiled=True),
    Published(TITAN, "Llama 3 8B", "a100-80gb", 64, 8192, 1, 1, False, 2_876),
    Published(TITAN, "Llama 3 70B", "a100-80gb", 64, 8192, 1, 1, True, 323),
)


def estimated(row: Published) -> float:
    """Tokens/s of one GPU by the model, for a published row."""
    gpu = GPUS[row.gpu]
    if row.source == TITAN and row.gpu == "h100-80gb":
        gpu = replace(gpu, memory_bandwidth=2.4e12)
    strategy = Strategy(
        zero_stage=3,
        micro_batch_rows=row.micro_batch_rows,
        activation_checkpointing=row.recomputes,
        compiled=row.compiled,
        overlapped=True,
    )
    seconds = step_time(MODELS[row.model], row.seq_len, row.micro_batches, strategy, gpu, row.num_gpus).total
    return row.micro_batches * row.micro_batch_rows * row.seq_len / seconds


def errors() -> list[tuple[Published, float]]:
    """(row, estimate / published - 1), the worst first."""
    found = [(row, estimated(row) / row.tokens_per_second - 1) for row in ROWS]
    return sorted(found, key=lambda pair: -abs(math.log1p(pair[1])))
