"""The decoder as transformers' LlamaForCausalLM has it: names of its weights, keys of its config.json."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trainers.exported.model_files import Fields, ModelFolderError
from trainers.model.shape import ModelConfig

_SWITCHES = (
    "attention",
    "positions",
    "num_token_types",
    "norm",
    "norm_place",
    "activation",
    "biases",
    "head",
    "pair_head",
)
_DECODER = ModelConfig()


def to_llama(pairs: Iterable[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters under the names of LlamaForCausalLM, the fused matrices cut up; views of their
    rows."""
    for name, tensor in pairs:
        if name == "lm_head.weight":
            yield name, tensor
            continue
        fused = next((key for key in fused_rows(config) if f".{key}." in name), None)
        if fused is None:
            yield f"model.{name}", tensor
            continue
        parts = fused_rows(config)[fused]
        for part, rows in zip(parts, tensor.split(list(parts.values())), strict=True):
            yield f"model.{name.replace(fused, part)}", rows


def from_llama(found: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the decoder's parameters out of LlamaForCausalLM's; what it ties or computes is left out."""
    by_name = {name: tensor for name, tensor in found.items() if not name.endswith(".rotary_emb.inv_freq")}
    if config.tie_embeddings:
        by_name.pop("lm_head.weight", None)
    for name in list(by_name):
        for fused, parts in fused_rows(config).items():
            first, *others = parts
            if f".{first}." in name and all(name.replace(first, other) in by_name for other in others):
                by_name[name.replace(first, fused)] = torch.cat(
                    [by_name.pop(name.replace(first, part)) for part in parts]
                )
    for name, tensor in by_name.items():
        yield name.removeprefix("model."), tensor


def fused_rows(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Rows of each part of a fused matrix, in order."""
    q, kv, mlp = (
        config.num_heads * config.head_width,
        config.kv_heads * config.head_width,
        config.intermediate_size,
    )
    return {
        "qkv_proj": {"q_proj": q, "k_proj": kv, "v_proj": kv},
        "gate_up_proj": {"gate_proj": mlp, "up_proj": mlp},
    }


def rows_of_fused(config: ModelConfig, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Rows of each part, by the name of each parameter that is several of Llama's in one."""
    fused = fused_rows(config).items()
    return {name: tuple(parts.values()) for name in names for key, parts in fused if f".{key}." in name}


def fits_llama(config: ModelConfig) -> bool:
    """Whether LlamaForCausalLM has this shape."""
    return all(getattr(config, key) == getattr(_DECODER, key) for key in _SWITCHES)


def llama_config(config: ModelConfig, boundary_id: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json; `rope_theta` for transformers 4, `rope_parameters` for 5."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": boundary_id,
        "eos_token_id": boundary_id,
        "pad_token_id": None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def config_from_llama(fields: Mapping[str, Any], uri: str) -> ModelConfig:
    """Return the shape that config.json describes; ModelFolderError for what the decoder does not have."""
    found = Fields(fields, f"{uri}/config.json")
    rope = found.section("rope_parameters")
    hidden_size, num_heads = found.whole("hidden_size", 4_096), found.whole("num_attention_heads", 32)
    head_width = hidden_size // num_heads
    for key, value, wanted in (
        ("hidden_act", fields.get("hidden_act", "silu"), "silu"),
        ("attention_bias", fields.get("attention_bias", False), False),
        ("mlp_bias", fields.get("mlp_bias", False), False),
        ("rope_scaling", fields.get("rope_scaling"), None),
        ("rope_parameters.rope_type", rope.values.get("rope_type", "default"), "default"),
        ("head_dim", fields.get("head_dim") or head_width, head_width),
    ):
        if value != wanted:
            raise ModelFolderError(f"{found.at}: {key}={value!r} cannot be loaded, only {wanted!r} can")
    # The defaults are those of transformers' LlamaConfig: its folders may leave them out.
    return ModelConfig(
        vocab_size=found.whole("vocab_size", 32_000),
        hidden_size=hidden_size,
        num_layers=found.whole("num_hidden_layers", 32),
        num_heads=num_heads,
        num_kv_heads=found.whole("num_key_value_heads") if fields.get("num_key_value_heads") else 0,
        intermediate_size=found.whole("intermediate_size", 11_008),
        max_positions=found.whole("max_position_embeddings", 2_048),
        rope_theta=rope.number("rope_theta", found.number("rope_theta", 10_000.0)),
        norm_eps=found.number("rms_norm_eps", 1e-6),
        tie_embeddings=found.flag("tie_word_embeddings", False),
    )
