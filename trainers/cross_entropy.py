"""Cross entropy of a large vocabulary, never holding all logits in float32.

Legend: N targets, C targets of a chunk, D model width, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor

MIN_CHUNK_TOKENS = 128
"""A matrix product over fewer tokens no longer fills the matrix units (AMX tiles of 32, tensor cores of 128)."""


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
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, bias_V, targets_N, weights_N, wants_gradient)


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
        bias_V: Tensor | None,
        targets_N: Tensor,
        weights_N: Tensor,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        size = chunk_tokens(len(hidden_ND), hidden_ND.shape[1], weight_VD.shape[0])
        losses, grads_hidden = [], []
        grad_weight_VD, grad_bias_V = None, None if bias_V is None else torch.zeros_like(bias_V).float()
        for hidden_CD, targets_C, weights_C in zip(
            hidden_ND.split(size), targets_N.split(size), weights_N.split(size), strict=True
        ):
            product_CV = hidden_CD @ weight_VD.T  # bf16 under bf16 weights or autocast
            logits_CV = product_CV.float() if bias_V is None else product_CV.float() + bias_V.float()
            log_normalizer_C = logits_CV.logsumexp(dim=-1)
            picked_C = logits_CV.gather(-1, targets_C[:, None]).squeeze(-1)
            losses.append((log_normalizer_C - picked_C) * weights_C)
            if not wants_gradient:
                continue
            grad_CV = torch.exp(logits_CV - log_normalizer_C[:, None])
            grad_CV = grad_CV.scatter_add(-1, targets_C[:, None], grad_CV.new_full((len(targets_C), 1), -1.0))
            grad_CV = grad_CV * weights_C[:, None]
            if grad_bias_V is not None:
                grad_bias_V = grad_bias_V + grad_CV.sum(dim=0)
            grad_CV = grad_CV.to(product_CV.dtype)
            grads_hidden.append((grad_CV @ weight_VD).to(hidden_ND.dtype))
            # Summed in float32: chunk sums of bf16 would lose the small ones.
            part_VD = (grad_CV.T @ hidden_CD).float()
            grad_weight_VD = part_VD if grad_weight_VD is None else grad_weight_VD + part_VD
        losses_N = torch.cat(losses)
        if wants_gradient:
            assert grad_weight_VD is not None
            if bias_V is not None and grad_bias_V is not None:
                grad_bias_V = grad_bias_V.to(bias_V.dtype)
            ctx.save_for_backward(torch.cat(grads_hidden), grad_weight_VD.to(weight_VD.dtype), grad_bias_V)
        ctx.mark_non_differentiable(losses_N)
        return losses_N.sum(), losses_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD, grad_bias_V = ctx.saved_tensors
        scale = grads[0]
        return (
            grad_hidden_ND * scale.to(grad_hidden_ND.dtype),
            grad_weight_VD * scale.to(grad_weight_VD.dtype),
            None if grad_bias_V is None else grad_bias_V * scale.to(grad_bias_V.dtype),
            None,
            None,
            None,
        )
