"""How fast a step would be on CPUs: a measured rate of matrix products, and constants for everything else.

One thread of an AMD EPYC without AMX (450 GFLOP/s of bf16), seconds of its CPU, forward and backward pass, 2026-11-30:
six shapes of 128 to 768 wide, 128 to 2,048 positions, 4,096 and 32,000 tokens, eager and compiled, lie within 10 % of
what the constants below give, which were fitted to them; three runs of README's table took 5 % less to 19 % more
(tests/test_cpu_speed.py). Elementwise work does not shrink where matrix units are faster, so a share of the peak is
right on one processor alone.
"""

from trainers.model.shape import ModelConfig, count_parameters, flops_per_token
from trainers.optim.optimizer import OptimizerConfig

ATTENTION_SHARE = 0.43
"""Of the rate of matrix products, scores and their use, all of both halves counted."""
ELEMENT_SECONDS = {False: 3.9e-9, True: 1.6e-9}
"""For each element that a layer keeps, eager and compiled."""
LOGIT_SECONDS = {False: 5.2e-9, True: 3.8e-9}
"""For each logit, beside the head's matrix products."""
UPDATE_SECONDS = 5e-9
"""For each parameter that a worker updates: some 30 bytes at 6 GB/s."""
EXCHANGE_BANDWIDTH = 1e9
"""Bytes/s that gloo reduces or gathers on one host, assumed."""
BF16 = 2


def cpu_step_seconds(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    *,
    tokens: int,
    seq_len: int,
    target_share: float,
    workers: int,
    zero_stage: int,
    compiled: bool,
    recomputes: bool,
    flops_per_second: float,
) -> float:
    """Estimate a step of so many tokens on each worker, which reaches this rate in matrix products on its threads."""
    again = 4 / 3 if recomputes else 1.0
    attention = 12.0 * model.num_layers * model.num_heads * model.head_width * seq_len
    matrices = flops_per_token(model, seq_len, target_share) - attention
    width, kv = model.hidden_size, model.kv_heads * model.head_width
    gates = 4 if model.activation == "swiglu" else 2
    elements = model.num_layers * (6 * width + 2 * kv + gates * model.intermediate_size)
    per_token = (
        again * (matrices + attention / ATTENTION_SHARE) / flops_per_second
        + again * ELEMENT_SECONDS[compiled] * elements
        + LOGIT_SECONDS[compiled] * target_share * model.vocab_size
    )
    parameters = count_parameters(model).total
    share = workers if zero_stage else 1
    updating = UPDATE_SECONDS * parameters / share + muon_flops(model, optimizer) / workers / flops_per_second
    exchanging = 3 * BF16 * parameters * (workers - 1) / workers / EXCHANGE_BANDWIDTH
    return tokens * per_token + updating + exchanging


def muon_flops(model: ModelConfig, optimizer: OptimizerConfig) -> float:
    """Of one update of all matrices: in each iteration of Newton-Schulz X Xt, its square, and their product with X."""
    if optimizer.kind != "muon":
        return 0.0
    D, Q = model.hidden_size, model.num_heads * model.head_width
    K, F = model.kv_heads * model.head_width, model.intermediate_size
    gates = 2 if model.activation == "swiglu" else 1
    shapes = [(D, Q), (D, Q), (D, K), (D, K), *[(D, F)] * (gates + 1)]
    each = sum(4.0 * min(shape) ** 2 * max(shape) + 2.0 * min(shape) ** 3 for shape in shapes)
    return model.num_layers * optimizer.muon_iterations * each
