"""What a model is trained for: from rows of tokens to a loss, never holding all logits in float32.

Legend: B rows, T target tokens a row, N = B * T, C tokens of a chunk, D model width, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_CHUNK_TOKENS = 128
"""A matrix product over fewer tokens no longer fills the matrix units (AMX tiles of 32, tensor cores of 128)."""


class LossSum(NamedTuple):
    """Sums, not means: the caller divides by the target tokens of the global batch."""

    total: Tensor
    """float32 scalar, in nats; the gradient flows through this one."""
    num_targets: Tensor
    """float32 scalar: the sum of the targets' weights."""
    per_row_B: Tensor
    """float32, detached: the sum of each row in nats, so that a guard can name the documents of a bad step.
    """


def causal_lm(
    model: Callable[..., Any],
    rows_BT1: Tensor,
    weights: Tensor,
    boundary_id: int,
    document_mask: bool = False,
) -> LossSum:
    """Predict each token from those before it.

    `rows_BT1` holds T + 1 tokens a row (any integer type). `weights` is float32, of shape [B], or [B, T] for
    each target: 0 leaves out filler rows and padding. With `document_mask` no token attends to an earlier
    document; a document starts at each `boundary_id`.
    """
    rows_BT1 = rows_BT1.long()
    tokens_BT, targets_BT = rows_BT1[:, :-1], rows_BT1[:, 1:]
    weights_BT = (weights if weights.dim() == 2 else weights[:, None]).float().expand_as(targets_BT)
    segments_BT = document_segments(tokens_BT, boundary_id) if document_mask else None
    total, per_row_B = model(tokens_BT, segments_BT, targets_BT=targets_BT, weights_BT=weights_BT)
    return LossSum(total, weights_BT.sum(), per_row_B)


def document_segments(tokens_BT: Tensor, boundary_id: int) -> Tensor:
    """Number the documents of each row; a boundary token opens its document."""
    return (tokens_BT == boundary_id).cumsum(dim=1)


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the cross entropies of `hidden @ weight.T` (differentiable) and each token's
    (not).

    Both are float32, in nats. Chunks of tokens are taken through loss and gradient in the forward pass, as in
    Liger Kernel (Hsu et al. 2024, section 3.2), so no logits are kept and none computed twice. torch 2.13 has
    F.linear_cross_entropy, whose chunked form takes no token weights and breaks a compiled graph.
    """
    wants_gradient = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, weights_N, wants_gradient)


def chunk_tokens(num_tokens: int, width: int, vocab_size: int) -> int:
    """Tokens a chunk, such that a chunk's logits have about as many elements as all hidden states."""
    even = math.ceil(num_tokens / math.ceil(vocab_size / width))
    return math.ceil(even / MIN_CHUNK_TOKENS) * MIN_CHUNK_TOKENS


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        size = chunk_tokens(len(hidden_ND), hidden_ND.shape[1], weight_VD.shape[0])
        losses, grads_hidden = [], []
        grad_weight_VD = None
        for hidden_CD, targets_C, weights_C in zip(
            hidden_ND.split(size), targets_N.split(size), weights_N.split(size), strict=True
        ):
            product_CV = hidden_CD @ weight_VD.T  # bf16 under bf16 weights or autocast
            logits_CV = product_CV.float()
            log_normalizer_C = logits_CV.logsumexp(dim=-1)
            picked_C = logits_CV.gather(-1, targets_C[:, None]).squeeze(-1)
            losses.append((log_normalizer_C - picked_C) * weights_C)
            if not wants_gradient:
                continue
            grad_CV = torch.exp(logits_CV - log_normalizer_C[:, None])
            grad_CV = grad_CV.scatter_add(-1, targets_C[:, None], grad_CV.new_full((len(targets_C), 1), -1.0))
            grad_CV = (grad_CV * weights_C[:, None]).to(product_CV.dtype)
            grads_hidden.append((grad_CV @ weight_VD).to(hidden_ND.dtype))
            # Summed in float32: chunk sums of bf16 would lose the small ones.
            part_VD = (grad_CV.T @ hidden_CD).float()
            grad_weight_VD = part_VD if grad_weight_VD is None else grad_weight_VD + part_VD
        losses_N = torch.cat(losses)
        if wants_gradient:
            assert grad_weight_VD is not None
            ctx.save_for_backward(torch.cat(grads_hidden), grad_weight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(losses_N)
        return losses_N.sum(), losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        scale = grads[0]
        return (
            grad_hidden_ND * scale.to(grad_hidden_ND.dtype),
            grad_weight_VD * scale.to(grad_weight_VD.dtype),
            None,
            None,
            None,
        )
