"""Cross entropy of a large vocabulary, never holding all logits.

Legend: N targets, C targets of a chunk, D model width, V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.model.compiling import compiled

MIN_CHUNK_TOKENS = 128
"""A matrix product over fewer tokens no longer fills the matrix units (AMX tiles of 32, tensor cores of 128)."""
LOGITS_PER_HIDDEN = 4
"""Elements of a chunk's logits for each of all hidden states: a layer keeps about 20, and a weight's gradient, read and
written once a chunk in float32, costs more the smaller the chunks are."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    bias_V: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the cross entropies of `hidden @ weight.T + bias` (differentiable) and each
    token's (not).

    Both are float32, in nats. Chunks of tokens are taken through loss and gradient in the forward pass, as in
    Liger Kernel (Hsu et al. 2024, section 3.2), so no logits are kept and none computed twice. torch 2.13 has
    F.linear_cross_entropy, whose chunked form takes no token weights and breaks a compiled graph.
    """
    wants_gradient = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    total, losses_N, *_ = _loss_and_gradients(
        hidden_ND, weight_VD, bias_V, targets_N, weights_N, wants_gradient, torch.compiler.is_compiling()
    )
    return total, losses_N.detach()


def chunk_tokens(num_tokens: int, width: int, vocab_size: int) -> int:
    """Tokens a chunk, such that it has about LOGITS_PER_HIDDEN logits for each element of all hidden states."""
    even = math.ceil(num_tokens / math.ceil(vocab_size / width / LOGITS_PER_HIDDEN))
    return math.ceil(even / MIN_CHUNK_TOKENS) * MIN_CHUNK_TOKENS


def _chunk(
    logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The weighted losses, and their gradient with respect to the logits."""
    targets_C1, weights_C1 = targets_C[:, None], weights_C[:, None]
    log_CV = torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
    log_C1 = log_CV.gather(-1, targets_C1)
    losses_C = (-log_C1 * weights_C1).squeeze(-1)
    if not wants_gradient:
        return losses_C, logits_CV.new_empty(0)
    grad_CV = log_CV.exp_().mul_(weights_C1).to(logits_CV.dtype)
    # A probability near 1 less the target's 1 would cancel.
    grad_C1 = torch.expm1(log_C1) * weights_C1
    return losses_C, grad_CV.scatter_(-1, targets_C1, grad_C1.to(grad_CV.dtype))


@functools.cache
def _fused_chunk() -> Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]:
    """Made when first asked for: it loads the compiler, 2 s in every process that never compiles."""
    return compiled(_chunk)


# An operator of its own, into which the compiler of the model does not look: it would compute the logits of all chunks
# before the first loss, and add up the weight's gradients after the last.
@torch.library.custom_op("pretraining::linear_cross_entropy", mutates_args=())
def _loss_and_gradients(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    weights_N: Tensor,
    wants_gradient: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the sum of the losses, the losses, and the sum's gradients: of hidden states, weight and bias."""
    chunk, size = _fused_chunk() if fused else _chunk, chunk_tokens(len(hidden_ND), *weight_VD.shape[::-1])
    losses_N = weights_N.new_empty(len(hidden_ND), dtype=torch.float32)
    grad_hidden_ND, grad_weight_VD, grad_bias_V = _unfilled(hidden_ND, weight_VD, bias_V, wants_gradient)
    # Summed in float32: chunk sums of bf16 would lose the small ones.
    sum_VD = torch.zeros_like(grad_weight_VD, dtype=torch.float32)
    sum_V = torch.zeros_like(grad_bias_V, dtype=torch.float32)
    for start in range(0, len(hidden_ND), size):
        part = slice(start, start + size)
        logits_CV = F.linear(hidden_ND[part], weight_VD, bias_V)
        losses_N[part], grad_CV = chunk(logits_CV, targets_N[part], weights_N[part], wants_gradient)
        if not wants_gradient:
            continue
        torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[part])
        sum_VD += grad_CV.T @ hidden_ND[part]
        if bias_V is not None:
            sum_V += grad_CV.sum(dim=0, dtype=torch.float32)
    grad_weight_VD.copy_(sum_VD)
    grad_bias_V.copy_(sum_V)
    return losses_N.sum(), losses_N, grad_hidden_ND, grad_weight_VD, grad_bias_V


def _unfilled(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, wants_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, of no elements where there are none."""
    none = hidden_ND.new_empty(0)
    if not wants_gradient:
        return none, none.clone(), none.clone()
    return (
        torch.empty_like(hidden_ND, memory_format=torch.contiguous_format),
        torch.empty_like(weight_VD),
        none if bias_V is None else torch.empty_like(bias_V),
    )


@_loss_and_gradients.register_fake
def _(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    weights_N: Tensor,
    wants_gradient: bool,
    fused: bool,
) -> tuple[Tensor, ...]:
    losses_N = weights_N.new_empty(len(hidden_ND), dtype=torch.float32)
    return losses_N.sum(), losses_N, *_unfilled(hidden_ND, weight_VD, bias_V, wants_gradient)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.has_bias = inputs[2] is not None


def _scale_gradients(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias = (grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors)
    return hidden, weight, bias if ctx.has_bias else None, None, None, None, None


_loss_and_gradients.register_autograd(_scale_gradients, setup_context=_keep_gradients)
