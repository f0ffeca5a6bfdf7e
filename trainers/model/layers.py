"""The backbone's layers: attention with rotary positions and a cache, MLPs, and blocks with norms before or after.

Legend: B rows, T positions, S positions attended to, D model width, N heads, K key/value heads, H head width, F width
inside the MLP, L layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.model.attention import attend
from trainers.model.shape import ModelConfig

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines [T, 1, H / 2]."""


class Cache:
    """Keys and values of the tokens seen so far, for each layer; room for `capacity` tokens."""

    def __init__(self, config: ModelConfig, num_rows: int, capacity: int, like: Tensor) -> None:
        shape = (config.num_layers, num_rows, config.kv_heads, capacity, config.head_width)
        self.keys_LBKSH = like.new_empty(shape)
        self.values_LBKSH = like.new_empty(shape)
        self.segments_BS = torch.zeros(num_rows, capacity, dtype=torch.long, device=like.device)
        self.length = 0

    def extend(self, layer: int, keys_BKTH: Tensor, values_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens of a layer and return all its keys and values, [B, K, S, H] each."""
        stop = self.length + keys_BKTH.shape[2]
        self.keys_LBKSH[layer, :, :, self.length : stop] = keys_BKTH
        self.values_LBKSH[layer, :, :, self.length : stop] = values_BKTH
        return self.keys_LBKSH[layer, :, :, :stop], self.values_LBKSH[layer, :, :, :stop]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.causal = layer, config.attention == "causal"
        self.head_width = config.head_width
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        self.qkv_proj = nn.Linear(
            config.hidden_size,
            (self.num_heads + 2 * self.num_kv_heads) * self.head_width,
            bias=config.biases,
        )
        self.o_proj = nn.Linear(self.num_heads * self.head_width, config.hidden_size, bias=config.biases)

    def forward(
        self, x_BTD: Tensor, rotation: Rotation | None, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        heads_BTAH = self.qkv_proj(x_BTD).view(B, T, -1, self.head_width)
        q_BTNH, k_BTKH, v_BTKH = heads_BTAH.split(
            [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2
        )
        if rotation is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, *rotation), rotate(k_BTKH, *rotation)
        q, k, v = q_BTNH.transpose(1, 2), k_BTKH.transpose(1, 2), v_BTKH.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        mixed_BNTH = attend(q, k, v, mask, self.causal)
        return self.o_proj(mixed_BNTH.transpose(1, 2).reshape(B, T, -1))


class GatedMLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.biases)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.biases)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.gate_up_proj(x_BTD).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate_BTF) * up_BTF)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.biases)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.biases)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x_BTD)))


def norm_of(config: ModelConfig) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(config.hidden_size, config.norm_eps)


def inner_parts(config: ModelConfig, layer: int) -> tuple[nn.Module, nn.Module]:
    mlp = GatedMLP(config) if config.activation == "swiglu" else MLP(config)
    return Attention(config, layer), mlp


class Block(nn.Module):
    """Norms before attention and MLP, as in Llama."""

    zero_unit = True
    """ZeRO stage 3 gathers its parameters together, and torch.compile compiles it as a whole then."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = norm_of(config)
        self.self_attn, mlp = inner_parts(config, layer)
        self.post_attention_layernorm = norm_of(config)
        self.mlp = mlp

    def forward(
        self, x_BTD: Tensor, rotation: Rotation | None, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotation, mask, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class PostNormBlock(nn.Module):
    """Norms after each sum, as in BERT."""

    zero_unit = True

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn, mlp = inner_parts(config, layer)
        self.post_attention_layernorm = norm_of(config)
        self.mlp = mlp
        self.post_mlp_layernorm = norm_of(config)

    def forward(
        self, x_BTD: Tensor, rotation: Rotation | None, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        x_BTD = self.post_attention_layernorm(x_BTD + self.self_attn(x_BTD, rotation, mask, cache))
        return self.post_mlp_layernorm(x_BTD + self.mlp(x_BTD))


def rotary_table(config: ModelConfig, start: int, num_positions: int, like: Tensor) -> Rotation:
    """Return cosines and sines [T, 1, H / 2] (RoFormer, Su et al. 2021), in halves as transformers' Llama has
    them.

    Computed in float32 at each call: a buffer would be cast to bf16 by the engine and lost on the meta
    device.
    """
    exponents = (
        torch.arange(0, config.head_width, 2, device=like.device, dtype=torch.float32) / config.head_width
    )
    positions = torch.arange(start, start + num_positions, device=like.device, dtype=torch.float32)
    angles = torch.outer(positions, 1.0 / config.rope_theta**exponents)
    return angles.cos()[:, None].to(like.dtype), angles.sin()[:, None].to(like.dtype)


def rotate(x_BTNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # Each half is one fused expression: the compiler does not vectorise a join within an expression.
    first, second = x_BTNH.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention_mask(
    segments_BT: Tensor | None,
    cache: Cache | None,
    like_BTD: Tensor,
    causal: bool,
    sees_all_B: Tensor | None = None,
) -> Tensor | None:
    """Return what is added to the scores, [B, 1, T, S], or None where plain attention does.

    Additive and in the compute type, made once for all layers: fused kernels take it as it is, on CPU and
    CUDA. Plain attention, causal or not, needs no mask and takes the faster kernel.
    """
    if segments_BT is None and sees_all_B is None:
        assert cache is None, "a cache needs segments"
        return None
    num_rows, num_new = like_BTD.shape[:2]
    keys_BS = segments_BT
    if cache is not None and segments_BT is not None:
        cache.segments_BS[:, cache.length : cache.length + num_new] = segments_BT
        keys_BS = cache.segments_BS[:, : cache.length + num_new]
    num_keys = num_new if keys_BS is None else keys_BS.shape[1]
    visible_BTS = torch.ones(num_rows, num_new, num_keys, dtype=torch.bool, device=like_BTD.device)
    if causal:
        visible_BTS = visible_BTS.tril(num_keys - num_new)
        if sees_all_B is not None:
            visible_BTS = visible_BTS | sees_all_B[:, None, None]
    if segments_BT is not None and keys_BS is not None:
        visible_BTS = visible_BTS & (segments_BT[:, :, None] == keys_BS[:, None, :])
    visible_B1TS = visible_BTS[:, None]
    return torch.zeros_like(visible_B1TS, dtype=like_BTD.dtype).masked_fill(~visible_B1TS, -torch.inf)
