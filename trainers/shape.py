"""The decoder's shape as configured, and what follows from it: parameters and floating-point operations."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and initialisation of the decoder."""

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
    """Width inside the gated MLP."""
    max_positions: int = 2_048
    """Longest row that the exported configuration promises, in tokens."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
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
        for key in ("rope_theta", "norm_eps", "init_std"):
            if getattr(self, key) <= 0:
                yield f"{at}.{key}={getattr(self, key)} must be above 0"
        if self.vocab_size < 0:
            yield f"{at}.vocab_size={self.vocab_size} must be positive, or 0 to take the tokenizer's"
        if self.num_heads < 1 or self.hidden_size < 1:
            return
        if self.hidden_size % self.num_heads:
            nearest = _nearest_divisor(self.hidden_size, self.num_heads)
            yield (
                f"{at}.num_heads={self.num_heads} does not divide {at}.hidden_size={self.hidden_size}; "
                f"nearest: {nearest}"
            )
        elif self.head_width % 2:
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
    """Embedding, and output head where it is not tied."""
    non_embedding: int
    total: int


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count by formula, without building the model."""
    D, H = config.hidden_size, config.head_width
    attention = D * (config.num_heads + 2 * config.kv_heads) * H + config.num_heads * H * D
    mlp = 3 * D * config.intermediate_size
    non_embedding = config.num_layers * (attention + mlp + 2 * D) + D
    embedding = config.vocab_size * D * (1 if config.tie_embeddings else 2)
    return ParameterCount(embedding, non_embedding, embedding + non_embedding)


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return the floating-point operations of one training token, forward and backward.

    6 for each weight of a matrix product and 12 L N H T for attention, the causal half counted as if it were
    computed (PaLM, Chowdhery et al. 2022, appendix B), so that MFU compares with published figures.
    """
    D, V = config.hidden_size, config.vocab_size
    norms = (2 * config.num_layers + 1) * D
    matrices = count_parameters(config).non_embedding - norms + V * D
    return 6.0 * matrices + 12.0 * config.num_layers * config.num_heads * config.head_width * seq_len
