"""The backbone's shape as configured, and what follows from it: parameters and floating-point operations.

The defaults are a decoder shaped as Llama (Touvron et al. 2023). `attention: bidirectional`, `positions: learned`,
`num_token_types: 2`, `norm: layernorm`, `norm_place: post`, `activation: gelu`, `biases: true` and
`head: transform` make BERT (Devlin et al. 2018); an encoder of today keeps the defaults but the first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

WIDEST = 1 << 20
"""More is a mistake, whose nearest divisor would be looked for without end."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and initialisation of the backbone."""

    vocab_size: int = 0
    """Entries of the embedding; 0 takes the tokenizer's."""
    hidden_size: int = 384
    """Width of the residual stream."""
    num_layers: int = 6
    """Blocks of attention and MLP."""
    num_heads: int = 6
    """Query heads; hidden_size / num_heads is the head width."""
    num_kv_heads: int = 0
    """Key and value heads, shared by groups of query heads; 0 gives each query head its own."""
    intermediate_size: int = 1_024
    """Width inside the MLP."""
    max_positions: int = 2_048
    """Longest row, in tokens: learned positions end there, and the exported configuration promises it."""
    attention: Literal["causal", "bidirectional"] = "causal"
    """What a position sees: itself and those before it, or all."""
    positions: Literal["rotary", "learned"] = "rotary"
    """Rotated queries and keys (Su et al. 2021), or an embedding of the position (Devlin et al. 2018)."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    num_token_types: int = 0
    """Entries of an embedding that tells the first text of a pair from the second; 0: none."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm."""
    norm_place: Literal["pre", "post"] = "pre"
    """Before attention and MLP and after the last block, or after each sum and after the embedding."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm, to the variance in LayerNorm."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """Of the MLP: a gate and three matrices (Shazeer 2020), or GELU and two."""
    biases: bool = False
    """Let projections of attention and MLP add a bias."""
    head: Literal["linear", "transform"] = "linear"
    """Output head: one matrix, or BERT's: dense, GELU, LayerNorm, matrix and bias."""
    pair_head: bool = False
    """Have BERT's pooler and a classifier of sentence pairs on the first position."""
    tie_embeddings: bool = False
    """Use the embedding as the output head too."""
    document_mask: bool = False
    """Keep attention within a document."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; those that write to the residual stream have it / sqrt(2 L).
    """

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_heads

    def problems(self, at: str) -> Iterator[str]:
        """Yield a line for each value that no model can have."""
        for key in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions"):
            if getattr(self, key) < 1:
                yield f"{at}.{key}={getattr(self, key)} must be at least 1"
        if self.num_token_types < 0:
            yield f"{at}.num_token_types={self.num_token_types} must not be negative; 0 has none"
        for key in ("rope_theta", "norm_eps", "init_std"):
            if getattr(self, key) <= 0:
                yield f"{at}.{key}={getattr(self, key)} must be above 0"
        if self.vocab_size < 0:
            yield f"{at}.vocab_size={self.vocab_size} must be positive, or 0 to take the tokenizer's"
        for key in ("hidden_size", "num_heads"):
            if getattr(self, key) > WIDEST:
                yield f"{at}.{key}={getattr(self, key):,} is beyond {WIDEST:,}; the widest models have some 10,000"
        if not 1 <= self.num_heads <= WIDEST or not 1 <= self.hidden_size <= WIDEST:
            return
        if self.hidden_size % self.num_heads:
            nearest = _nearest_divisor(self.hidden_size, self.num_heads)
            yield (
                f"{at}.num_heads={self.num_heads} does not divide {at}.hidden_size={self.hidden_size}; "
                f"nearest: {nearest}"
            )
        elif self.positions == "rotary" and self.head_width % 2:
            yield (
                f"{at}.hidden_size={self.hidden_size} / {at}.num_heads={self.num_heads} gives heads of odd "
                f"width {self.head_width}, which rotary positions cannot halve; nearest {at}.hidden_size: "
                f"{self.num_heads * (self.head_width + 1)}"
            )
        if self.num_kv_heads < 0 or self.num_heads % self.kv_heads:
            nearest = _nearest_divisor(self.num_heads, self.num_kv_heads)
            yield (
                f"{at}.num_kv_heads={self.num_kv_heads} does not divide {at}.num_heads={self.num_heads}; "
                f"nearest: {nearest}"
            )


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = (d for d in range(1, number + 1) if number % d == 0)
    return min(divisors, key=lambda d: abs(d - wanted))


class ParameterCount(NamedTuple):
    embedding: int
    """Embeddings of tokens, positions and token types, and the output matrix where it is not tied."""
    non_embedding: int
    total: int
    vectors: int
    """Norms and biases, part of `non_embedding`."""
    head: int
    """Matrices of the heads beside the output matrix, part of `non_embedding`."""

    @property
    def matrices(self) -> int:
        """Elements of the matrices inside the blocks."""
        return self.non_embedding - self.vectors - self.head


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count by formula, without building the model."""
    D, F, V, L = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_layers
    query, key_value = config.num_heads * config.head_width, 2 * config.kv_heads * config.head_width
    up = 2 * F if config.activation == "swiglu" else F
    matrices = L * (D * (query + key_value) + query * D + D * up + F * D)
    norm = D if config.norm == "rmsnorm" else 2 * D
    vectors = (2 * L + 1) * norm + config.biases * L * (query + key_value + D + up + D)
    head = 0
    if config.head == "transform":
        head, vectors = head + D * D, vectors + D + 2 * D + V  # LayerNorm whatever `norm` is
    if config.pair_head:
        head, vectors = head + D * D + 2 * D, vectors + D + 2
    rows = config.max_positions * (config.positions == "learned") + config.num_token_types
    embedding = D * (V * (1 if config.tie_embeddings else 2) + rows)
    non_embedding = matrices + vectors + head
    return ParameterCount(embedding, non_embedding, embedding + non_embedding, vectors, head)


def matrix_products(config: ModelConfig, tokens: int) -> tuple[tuple[int, int, int], ...]:
    """(m, k, n) of the matrix products that a forward pass over so many tokens consists of, attention's own left out:
    [m, k] is multiplied by a weight [k, n]."""
    D, F = config.hidden_size, config.intermediate_size
    query, key_value = config.num_heads * config.head_width, 2 * config.kv_heads * config.head_width
    up = 2 * F if config.activation == "swiglu" else F
    weights = ((D, query + key_value), (query, D), (D, up), (F, D), (D, config.vocab_size))
    return tuple(dict.fromkeys((tokens, k, n) for k, n in weights))


def flops_per_token(config: ModelConfig, seq_len: int, target_share: float = 1.0) -> float:
    """Return the floating-point operations of one training token, forward and backward.

    6 for each weight of a matrix product and 12 L N H T for attention, the causal half counted as if it were
    computed (PaLM, Chowdhery et al. 2022, appendix B), so that MFU compares with published figures. The output
    head counts for `target_share` of the positions; pooler and pair classifier see one position of a row.
    """
    D, V = config.hidden_size, config.vocab_size
    head = D * D * (config.head == "transform") + V * D
    pair = config.pair_head * (D * D + 2 * D) / seq_len
    matrices = count_parameters(config).matrices + target_share * head + pair
    return 6.0 * matrices + 12.0 * config.num_layers * config.num_heads * config.head_width * seq_len
