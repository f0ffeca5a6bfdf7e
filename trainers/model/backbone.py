"""The backbone: a stack of attention and MLP blocks, by `ModelConfig` a decoder shaped as Llama (Touvron et al.
2023), an encoder as BERT (Devlin et al. 2018), or what lies between. Few and large parameters.

Query, key and value projections are one matrix, gate and up projections another: ZeRO's hooks cost host time
per parameter. `trainers/export.py` splits them. Positions go on across the documents of a row, as in the
exported model. There is no dropout: in BERT's place, masks differ in each epoch.

Legend: B rows, T positions, S positions attended to, P positions with a target, D model width, N heads, K
key/value heads, H head width, F width inside the MLP, V vocabulary, L layers.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainers.model.cross_entropy import linear_cross_entropy
from trainers.model.layers import Block, Cache, PostNormBlock, Rotation, attention_mask, norm_of, rotary_table
from trainers.model.shape import ModelConfig


class Head(nn.Linear):
    """Output projection, with the loss inside: ZeRO stage 3 gathers a weight for the forward pass of its
    module."""

    def __init__(self, config: ModelConfig) -> None:
        transforms = config.head == "transform"
        super().__init__(config.hidden_size, config.vocab_size, bias=transforms)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size) if transforms else None
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps) if transforms else None

    def forward(  # type: ignore[override]
        self, x_BPD: Tensor, targets_BP: Tensor | None = None, weights_BP: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits [B, P, V], or with targets the loss sum and each row's sum [B]."""
        if self.dense is not None and self.norm is not None:
            x_BPD = self.norm(F.gelu(self.dense(x_BPD)))
        if targets_BP is None:
            return F.linear(x_BPD, self.weight, self.bias)
        if weights_BP is None:
            weights_BP = torch.ones_like(targets_BP, dtype=torch.float32)
        total, losses_N = linear_cross_entropy(
            x_BPD.flatten(0, 1), self.weight, targets_BP.flatten(), weights_BP.flatten(), self.bias
        )
        return total, losses_N.view(targets_BP.shape).sum(dim=1)


class PairHead(nn.Module):
    """BERT's pooler, and the classifier of sentence pairs on it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, 2)

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.classifier(torch.tanh(self.pooler(x_BD)))


class Backbone(nn.Module):
    """Token ids in; hidden states, or with targets the loss, out.

    Under `torch.device("meta")` it holds no memory. `build` makes one with initial weights.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size > 0, "model.vocab_size=0: fill in the tokenizer's size first"
        self.config = config
        self.activation_checkpointing = False
        """Compute a block's activations again in the backward pass instead of keeping them."""
        width, post = config.hidden_size, config.norm_place == "post"
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        learned, types = config.positions == "learned", config.num_token_types
        self.embed_positions = nn.Embedding(config.max_positions, width) if learned else None
        self.embed_types = nn.Embedding(types, width) if types else None
        self.embed_norm = norm_of(config) if post else None
        block = PostNormBlock if post else Block
        self.layers = nn.ModuleList(block(config, layer) for layer in range(config.num_layers))
        self.norm = None if post else norm_of(config)
        self.lm_head = Head(config)
        self.pair_head = PairHead(config) if config.pair_head else None
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
        targets_BP: Tensor | None = None,
        weights_BP: Tensor | None = None,
        *,
        types_BT: Tensor | None = None,
        slots_BP: Tensor | None = None,
        sees_all_B: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return hidden states [B, T, D]; with `targets_BP` the loss sum (float32, nats), each row's sum [B]
        and, where there is a pair head, its logits [B, 2].

        A position attends to those of its segment, without `segments_BT` to all; under causal attention to the
        earlier ones alone, but in rows that `sees_all_B` (bool) names. `types_BT` are token types, default 0.
        A `cache` supplies the earlier positions and takes in the new ones. `slots_BP` are the positions whose
        hidden states the targets are for, without it all in turn. `weights_BP` (float32, default 1) multiplies
        each target's loss.
        """
        x_BTD, rotation = self.embed(tokens_BT, types_BT, cache.length if cache is not None else 0)
        mask = attention_mask(segments_BT, cache, x_BTD, self.config.attention == "causal", sees_all_B)
        for block in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, rotation, mask, cache, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rotation, mask, cache)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        if targets_BP is None:
            return x_BTD
        x_BPD = x_BTD if slots_BP is None else at_slots(x_BTD, slots_BP)
        losses = self.lm_head(x_BPD, targets_BP, weights_BP)
        return losses if self.pair_head is None else (*losses, self.pair_head(x_BTD[:, 0]))

    def embed(self, tokens_BT: Tensor, types_BT: Tensor | None, start: int) -> tuple[Tensor, Rotation | None]:
        """What the first block gets: the sum of the embeddings [B, T, D], and the rotation of the positions."""
        num_positions = tokens_BT.shape[1]
        x_BTD = self.embed_tokens(tokens_BT)
        if self.embed_types is not None:
            x_BTD = x_BTD + self.embed_types(torch.zeros_like(tokens_BT) if types_BT is None else types_BT)
        rotation = None
        if self.embed_positions is None:
            rotation = rotary_table(self.config, start, num_positions, x_BTD)
        else:
            x_BTD = x_BTD + self.embed_positions(
                torch.arange(start, start + num_positions, device=tokens_BT.device)
            )
        return (x_BTD if self.embed_norm is None else self.embed_norm(x_BTD)), rotation

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Return each position's scores of every token, [B, T, V]: under causal attention of the next one."""
        return self.lm_head(hidden_BTD)

    def pair_logits(self, hidden_BTD: Tensor) -> Tensor:
        """Return the scores [B, 2] of 0: the second text goes on with the first, 1: it does not."""
        assert self.pair_head is not None, "model.pair_head=false"
        return self.pair_head(hidden_BTD[:, 0])


def at_slots(hidden_BTD: Tensor, slots_BP: Tensor) -> Tensor:
    """The hidden states at the given positions of each row, [B, P, D]."""
    return hidden_BTD.gather(1, slots_BP[:, :, None].expand(-1, -1, hidden_BTD.shape[2]))


def build(
    config: ModelConfig,
    seed: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Backbone:
    """Make a backbone with the initial weights of `seed`."""
    model = build_empty(config, device=device, dtype=dtype)
    initialize(model, seed)
    return model


def build_empty(
    config: ModelConfig, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Backbone:
    """Make a backbone whose memory is not filled yet, sparing torch's default initialisation."""
    with torch.device("meta"):
        model = Backbone(config).to(dtype)
    model.to_empty(device=device)
    model.tie()
    return model


def build_hollow(config: ModelConfig) -> Backbone:
    """Make a backbone whose parameters have their shapes and next to no memory, for values that come later."""
    with torch.device("meta"):
        model = Backbone(config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # Not on the meta device, from which `data` cannot be set to a real one.
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(parameter.shape)))
    model.tie()
    return model


def initialize(model: Backbone, seed: int) -> None:
    """Set every parameter to its initial value."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(model.config, seed, name, parameter.shape))


def initial_value(config: ModelConfig, seed: int, name: str, shape: torch.Size) -> Tensor:
    """Return a parameter's initial value, float32 on the CPU.

    Normal with `init_std`; where norms come first, output projections of attention and MLP divided by
    sqrt(2 L), as in GPT-2 (Radford et al. 2019, section 2.3); norms one, biases zero. A pure function of (seed,
    name): any shard can be made anywhere, in any order.
    """
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    adds_to_sum = config.norm_place == "pre" and name.endswith(("o_proj.weight", "down_proj.weight"))
    std = config.init_std / math.sqrt(2 * config.num_layers) if adds_to_sum else config.init_std
    return torch.randn(shape, generator=generator) * std
