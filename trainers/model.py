"""The backbone: a decoder shaped as Llama (Touvron et al. 2023), with few and large parameters.

Query, key and value projections are one matrix, gate and up projections another: ZeRO's hooks cost host time
per parameter. `trainers/export.py` splits them. Positions go on across the documents of a row, as in the
exported model.

Legend: B rows, T positions, S positions attended to, D model width, N heads, K key/value heads, H head width,
F width inside the MLP, V vocabulary, L layers.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainers.attention import attend
from trainers.objectives import linear_cross_entropy
from trainers.shape import ModelConfig


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
        self.layer = layer
        self.head_width = config.head_width
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        self.qkv_proj = nn.Linear(
            config.hidden_size, (self.num_heads + 2 * self.num_kv_heads) * self.head_width, bias=False
        )
        self.o_proj = nn.Linear(self.num_heads * self.head_width, config.hidden_size, bias=False)

    def forward(
        self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        heads_BTAH = self.qkv_proj(x_BTD).view(B, T, -1, self.head_width)
        q_BTNH, k_BTKH, v_BTKH = heads_BTAH.split(
            [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2
        )
        q = rotate(q_BTNH, *rotation).transpose(1, 2)
        k = rotate(k_BTKH, *rotation).transpose(1, 2)
        v = v_BTKH.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        mixed_BNTH = attend(q, k, v, mask)
        return self.o_proj(mixed_BNTH.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.gate_up_proj(x_BTD).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate_BTF) * up_BTF)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotation, mask, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Head(nn.Linear):
    """Output projection, with the loss inside: ZeRO stage 3 gathers a weight for the forward pass of its
    module."""

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, targets_BT: Tensor | None = None, weights_BT: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits [B, T, V], or with targets the loss sum and each row's sum [B]."""
        if targets_BT is None:
            return F.linear(x_BTD, self.weight)
        if weights_BT is None:
            weights_BT = torch.ones_like(targets_BT, dtype=torch.float32)
        total, losses_N = linear_cross_entropy(
            x_BTD.flatten(0, 1), self.weight, targets_BT.flatten(), weights_BT.flatten()
        )
        return total, losses_N.view(targets_BT.shape).sum(dim=1)


class Decoder(nn.Module):
    """Token ids in; hidden states, or with targets the loss, out.

    Under `torch.device("meta")` it holds no memory. `build` makes one with initial weights.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size > 0, "model.vocab_size=0: fill in the tokenizer's size first"
        self.config = config
        self.activation_checkpointing = False
        """Compute a block's activations again in the backward pass instead of keeping them."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Share embedding and head where configured; needed again after `to_empty`, which separates them."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        cache: Cache | None = None,
        targets_BT: Tensor | None = None,
        weights_BT: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return hidden states [B, T, D]; with `targets_BT` the loss sum (float32, nats) and each row's sum
        [B].

        A position attends to the earlier ones of its segment; without `segments_BT` to all earlier ones.
        `weights_BT` (float32, default 1) multiplies each target's loss. A `cache` supplies the earlier
        positions and takes in the new ones.
        """
        x_BTD = self.embed_tokens(tokens_BT)
        start = cache.length if cache is not None else 0
        rotation = rotary_table(self.config, start, tokens_BT.shape[1], x_BTD)
        mask = attention_mask(segments_BT, cache, x_BTD)
        for block in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, rotation, mask, cache, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rotation, mask, cache)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        x_BTD = self.norm(x_BTD)
        return x_BTD if targets_BT is None else self.lm_head(x_BTD, targets_BT, weights_BT)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Return the scores of every next token, [B, T, V]."""
        return self.lm_head(hidden_BTD)


def rotary_table(config: ModelConfig, start: int, num_positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
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


def attention_mask(segments_BT: Tensor | None, cache: Cache | None, like: Tensor) -> Tensor | None:
    """Return what is added to the scores, [B, 1, T, S], or None where plain causal attention does.

    Additive and in the compute type, made once for all layers: fused kernels take it as it is, on CPU and
    CUDA. Plain causal attention needs no mask and takes the faster kernel.
    """
    if segments_BT is None:
        assert cache is None, "a cache needs segments"
        return None
    num_new = segments_BT.shape[1]
    keys_BS = segments_BT
    if cache is not None:
        cache.segments_BS[:, cache.length : cache.length + num_new] = segments_BT
        keys_BS = cache.segments_BS[:, : cache.length + num_new]
    same_BTS = segments_BT[:, :, None] == keys_BS[:, None, :]
    num_keys = keys_BS.shape[1]
    causal_TS = torch.ones(num_new, num_keys, dtype=torch.bool, device=like.device).tril(num_keys - num_new)
    visible_B1TS = (same_BTS & causal_TS)[:, None]
    return torch.zeros_like(visible_B1TS, dtype=like.dtype).masked_fill(~visible_B1TS, -torch.inf)


def build(
    config: ModelConfig,
    seed: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool = False,
) -> Decoder:
    """Make a decoder with the initial weights of `seed`."""
    model = build_empty(config, device=device, dtype=dtype)
    model.activation_checkpointing = activation_checkpointing
    initialize(model, seed)
    return model


def build_empty(
    config: ModelConfig, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Decoder:
    """Make a decoder whose memory is not filled yet, sparing torch's default initialisation."""
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    model.to_empty(device=device)
    model.tie()
    return model


def initialize(model: Decoder, seed: int) -> None:
    """Set every parameter to its initial value."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(model.config, seed, name, parameter.shape))


def initial_value(config: ModelConfig, seed: int, name: str, shape: torch.Size) -> Tensor:
    """Return a parameter's initial value, float32 on the CPU.

    Normal with `init_std`; output projections of attention and MLP divided by sqrt(2 L), as in GPT-2 (Radford
    et al. 2019, section 2.3); norms one. A pure function of (seed, name): any shard can be made anywhere, in
    any order.
    """
    if len(shape) == 1:
        return torch.ones(shape)
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    writes_to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = config.init_std / math.sqrt(2 * config.num_layers) if writes_to_residual else config.init_std
    return torch.randn(shape, generator=generator) * std
