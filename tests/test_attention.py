import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.model import attention
from trainers.model.attention import CausalOnCPU, attend


def heads(num_positions: int, width: int, scale: float = 1.0) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output, bf16, in the layout that the projections give."""
    generator = torch.Generator().manual_seed(num_positions)
    packed = torch.randn(2, num_positions, 4 * 3, width, generator=generator) * scale
    return [x.transpose(1, 2).bfloat16() for x in packed.split(3, dim=2)]


def gradients(attention, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    *inputs, grad = (part.detach() for part in parts)
    leaves = [x.requires_grad_() for x in inputs]
    return list(torch.autograd.grad(attention(*leaves), leaves, grad))


def rounding_bounds(q, k, v, grad) -> list[torch.Tensor]:
    """How far the gradients may be off for scores that pass through bf16 between two products, where torch keeps those
    of a tile in float32. Score, probability and product are rounded by 2^-9 each, no term is cancelled by another,
    and a rounded score changes its probability by as much as the score is large.
    """
    q, k, v, grad = (part.double() for part in (q, k, v, grad))
    scale = q.shape[-1] ** -0.5
    later = torch.full(q.shape[2:3] * 2, -torch.inf, dtype=torch.double).triu(1)
    scores = q @ k.mT * scale
    weights = (scores + later).softmax(dim=-1) * (1 + scores.abs())
    terms = weights * (grad.abs() @ v.abs().mT) * scale
    bounds = (terms @ k.abs(), terms.mT @ q.abs(), weights.mT @ grad.abs())
    return [3 * 2**-9 * bound.norm() for bound in bounds]


def reference(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("block", [16, 512])
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.sampled_from([2, 8, 64]), st.floats(0.1, 3))
def test_gradient_is_as_near_to_the_float64_one_as_that_of_torchs_kernel(block, num_positions, width, scale):
    parts = heads(num_positions, width, scale)
    exact = gradients(reference, [part.double() for part in parts])
    before, attention.BLOCK_POSITIONS = attention.BLOCK_POSITIONS, block
    try:
        ours = gradients(CausalOnCPU.apply, parts)
    finally:
        attention.BLOCK_POSITIONS = before
    torchs = gradients(reference, parts)
    for own, theirs, true, rounding in zip(ours, torchs, exact, rounding_bounds(*parts), strict=True):
        assert own.dtype == torch.bfloat16
        assert (own - true).norm() <= 2 * (theirs - true).norm() + rounding


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.slow
def test_compiled_attention_of_grouped_heads_equals_the_uncompiled_one(kv_heads):
    torch.manual_seed(0)
    q, grad = (torch.randn(2, 4, 33, 16).bfloat16() for _ in range(2))
    k, v = (torch.randn(2, kv_heads, 33, 16).bfloat16() for _ in range(2))

    def plain(q, k, v):
        return attend(q, k, v, None)

    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    eager, ours = gradients(plain, [q, k, v, grad]), gradients(compiled, [q, k, v, grad])
    for own, theirs in zip(ours, eager, strict=True):
        torch.testing.assert_close(own, theirs, rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_forward_is_torchs_own_to_the_bit():
    q, k, v, _ = heads(100, 32)
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, None), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q.requires_grad_(), k, v), reference(q, k, v))


def test_a_single_position_attends_to_all_keys():
    q, k, v, _ = heads(10, 16)
    expected = F.scaled_dot_product_attention(q[:, :, -1:], k, v)
    assert torch.equal(attend(q[:, :, -1:], k, v, None), expected)
    torch.testing.assert_close(expected, reference(q, k, v)[:, :, -1:])
