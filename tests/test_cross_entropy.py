import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.sessions.session import PROJECT
from trainers.model.cross_entropy import chunk_tokens, linear_cross_entropy


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.integers(1, 40), st.integers(2, 600), st.floats(0.1, 50), st.booleans())
def test_value_and_gradient_are_those_of_torch_cross_entropy(num_tokens, width, vocab_size, scale, biased):
    torch.manual_seed(num_tokens)
    hidden = (torch.randn(num_tokens, width) * scale).requires_grad_()
    weight = torch.randn(vocab_size, width).requires_grad_()
    targets = torch.randint(vocab_size, (num_tokens,))
    weights = torch.rand(num_tokens) * (torch.rand(num_tokens) > 0.3)
    bias = (torch.randn(vocab_size) * biased).requires_grad_()
    total, losses = linear_cross_entropy(hidden, weight, targets, weights, bias if biased else None)
    leaves = (hidden, weight, bias) if biased else (hidden, weight)
    found, factors = torch.autograd.grad(total * 0.37, leaves), (weight, hidden, torch.ones(1))[: len(leaves)]

    expected = F.cross_entropy(hidden @ weight.T + bias, targets, reduction="none") * weights
    wanted = torch.autograd.grad(expected.sum() * 0.37, leaves)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-5, atol=1e-4)
    # A probability near 1 less the target's 1 cancels: what is left has the error of a float32 near 1, times what the
    # gradient is multiplied with.
    for ours, theirs, factor in zip(found, wanted, factors, strict=True):
        cancelled = 1e-6 * factor.abs().max().item() * len(targets)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item() + cancelled)


@pytest.mark.parametrize("biased", [False, True])
def test_within_a_compiled_model_value_and_gradient_are_the_same(biased):
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 40, requires_grad=True), torch.randn(600, 40, requires_grad=True)
    bias = torch.randn(600, requires_grad=True) if biased else None
    targets, weights = torch.randint(600, (700,)), torch.rand(700)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]

    def step():
        total, losses = linear_cross_entropy(torch.tanh(hidden), weight, targets, weights, bias)
        return total * 0.37, losses

    def found(step):
        total, losses = step()
        return total, losses, *torch.autograd.grad(total, leaves)

    explained = torch._dynamo.explain(step)()
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    for ours, theirs in zip(found(torch.compile(step)), found(step), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 10**6), st.integers(1, 10**4), st.integers(1, 2 * 10**5))
def test_a_chunk_has_at_most_four_logits_for_each_element_of_the_hidden_states(num_tokens, width, vocab_size):
    """Up to rounding the tokens up to 128, below which a matrix product is inefficient."""
    size = chunk_tokens(num_tokens, width, vocab_size)
    assert size % 128 == 0
    assert (size - 128) * vocab_size <= 4 * num_tokens * width


# Without a threshold that grows, what is freed goes back to the system and counts no more.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
PEAK = """
import sys, torch
from trainers.model.cross_entropy import linear_cross_entropy
N, D, V = 8_192, 64, 16_384
hidden = torch.randn(N, D, dtype=torch.bfloat16, requires_grad=True)
weight = torch.randn(V, D, dtype=torch.bfloat16, requires_grad=True)
targets, weights = torch.randint(V, (N,)), torch.ones(N)

def loss(hidden, weight):
    return linear_cross_entropy(torch.tanh(hidden), weight, targets, weights)[0]

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

loss = torch.compile(loss) if sys.argv[1] == "compiled" else loss
loss(hidden, weight).backward()  # loads the kernels
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = kilobytes("VmRSS")
loss(hidden, weight).backward()
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_peak_memory_stays_far_below_whole_logits(how):
    command = [sys.executable, "-c", PEAK, how]
    grown = int(
        subprocess.run(
            command, env=os.environ | RETURNED, cwd=PROJECT, capture_output=True, check=True, text=True
        ).stdout
    )
    assert grown < 8_192 * 16_384 * 2 / 4, f"{grown / 2**20:.0f} MiB; whole logits in bfloat16 take 256"
