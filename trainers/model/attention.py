"""Attention through torch's fused kernels, with a backward pass of large matrix products on the CPU.

The CPU kernel of torch 2.13 takes four to six times its forward time for the backward pass, since it
multiplies float32 tiles of scores; products of whole bf16 blocks keep the matrix units (AMX) busy. Measured
by `benchmarks/bench_model.py`.

Legend: B rows, T positions, N heads, K key/value heads, H head width, Z = B * N, S key positions of a block,
Q query positions that see the block.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_POSITIONS = 512
"""Keys whose scores with all later queries are held at a time."""


def attend(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask: Tensor | None, causal: bool = True
) -> Tensor:
    """Return the mixed values, [B, N, T, H].

    A `mask` is added to the scores and says all. Without one a position attends to those up to its own, or to
    all if not `causal`; one single position attends to all.
    """
    causal = causal and mask is None and q_BNTH.shape[2] > 1
    grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
    # Uncompiled, the elementwise part of our backward pass would cost more than the products save.
    if causal and torch.compiler.is_compiling() and q_BNTH.is_cpu and q_BNTH.dtype == torch.bfloat16:
        if grouped:
            group = q_BNTH.shape[1] // k_BKSH.shape[1]
            k_BKSH, v_BKSH = (x.repeat_interleave(group, dim=1) for x in (k_BKSH, v_BKSH))
        return CausalOnCPU.apply(q_BNTH, k_BKSH, v_BKSH)
    return F.scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


class CausalOnCPU(torch.autograd.Function):
    """Causal attention of as many key heads as query heads; forward is the kernel that torch chooses, too."""

    @staticmethod
    def forward(ctx: Any, q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor) -> Tensor:
        out_BNTH, log_normalizer_BNT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BNTH, k_BNTH, v_BNTH, is_causal=True
        )
        ctx.save_for_backward(q_BNTH, k_BNTH, v_BNTH, out_BNTH, log_normalizer_BNT)
        return out_BNTH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Recompute the probabilities from the saved normaliser, a block of keys at a time.

        FlashAttention-2 (Dao 2023, algorithm 2) with blocks so large that they are plain matrix products;
        scores are kept transposed, keys first, so that only one of the five products reads a transposed
        matrix.
        """
        q_BNTH, _, _, out_BNTH, log_normalizer_BNT = ctx.saved_tensors
        shape, num_positions = q_BNTH.shape, q_BNTH.shape[2]
        q, k, v, grad = (x.reshape(-1, *x.shape[2:]) for x in (*ctx.saved_tensors[:3], grads[0]))
        log_normalizer = log_normalizer_BNT.reshape(-1, 1, num_positions)
        delta = (grads[0].float() * out_BNTH.float()).sum(dim=-1).reshape(-1, 1, num_positions)
        scale = 1 / math.sqrt(shape[-1])
        grad_q = torch.zeros_like(q, dtype=torch.float32)
        grads_k, grads_v = [], []
        for start in range(0, num_positions, BLOCK_POSITIONS):
            keys, queries = slice(start, start + BLOCK_POSITIONS), slice(start, None)
            scores_ZSQ = (k[:, keys] @ q[:, queries].mT).float() * scale
            earlier_SQ = torch.full(scores_ZSQ.shape[1:], -math.inf, device=q.device).tril(-1)
            probabilities_ZSQ = torch.exp(scores_ZSQ - log_normalizer[:, :, queries] + earlier_SQ)
            grad_probabilities_ZSQ = (v[:, keys] @ grad[:, queries].mT).float()
            grad_scores_ZSQ = probabilities_ZSQ * (grad_probabilities_ZSQ - delta[:, :, queries]) * scale
            grad_scores_ZSQ = grad_scores_ZSQ.to(q.dtype)
            grads_v.append(probabilities_ZSQ.to(q.dtype) @ grad[:, queries])
            grads_k.append(grad_scores_ZSQ @ q[:, queries])
            grad_q = grad_q + F.pad((grad_scores_ZSQ.mT @ k[:, keys]).float(), (0, 0, start, 0))
        parts = (grad_q.to(q.dtype), torch.cat(grads_k, dim=1), torch.cat(grads_v, dim=1))
        return tuple(part.view(shape) for part in parts)
