"""A trained decoder as a folder that transformers loads as Llama, and back.

python trainers/export.py --run runs/NAME --step best --output exports/NAME
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor

from cluster.storage import Store
from trainers.model import Decoder, ModelConfig, build_empty

MAX_FILE_BYTES = 2 << 30
"""Of one weight file: it is held in memory while it is written, and S3 takes 5 GiB in one put."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def export(
    model_state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    tokenizer_json: bytes,
    boundary_id: int,
    target: Store,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write weights, configuration and tokenizer to `target`; config.json last, so that a cut export does not
    load.

    `model_state` holds the decoder's parameters by name; one that yields them one at a time is not held as a
    whole. Raises ValueError if its names or shapes are not those of `config`.
    """
    pairs = model_state.items() if isinstance(model_state, Mapping) else model_state
    llama = to_llama(checked(pairs, config), config)
    target.delete("config.json")
    write_weights(((name, tensor.detach().to("cpu", dtype)) for name, tensor in llama), target)
    boundary = Tokenizer.from_buffer(tokenizer_json).id_to_token(boundary_id)
    if boundary is None:
        raise ValueError(f"boundary_id={boundary_id} is not in the tokenizer; give the one of the manifest")
    target.put("tokenizer.json", tokenizer_json)
    put_json(target, "tokenizer_config.json", tokenizer_config(config, boundary))
    put_json(target, "generation_config.json", generation_config(boundary_id))
    put_json(target, "config.json", llama_config(config, boundary_id, dtype))


def load_exported(source: Store) -> "Exported":
    """Read an exported folder into float32 weights on the CPU.

    Raises:
        FileNotFoundError: the folder holds no exported model.
        ValueError: it holds a model of another shape than this project's decoder.
    """
    fields = json.loads(source.read("config.json"))
    config = config_from_llama(fields, source.uri)
    model = build_empty(config)
    parameters = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for file in weight_files(source):
        found |= safetensors.torch.load(source.read(file))
    with torch.no_grad():
        for name, tensor in checked(from_llama(found, config), config):
            parameters[name].copy_(tensor)
    tokenizer = Tokenizer.from_buffer(source.read("tokenizer.json"))
    return Exported(model.eval(), tokenizer, fields["bos_token_id"])


@dataclass(frozen=True)
class Exported:
    """What generation and evaluation need of an exported folder."""

    model: Decoder
    tokenizer: Tokenizer
    boundary_id: int
    """Opens every document in training, so it opens every prompt and ends every text."""


# --- weights ---


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
    """Yield the decoder's parameters out of LlamaForCausalLM's."""
    by_name = dict(found)
    for name in list(found):
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


def checked(pairs: Iterable[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Pass the parameters on; ValueError for one that `config` does not have, has otherwise, or misses."""
    with torch.device("meta"):
        expected = {name: parameter.shape for name, parameter in Decoder(config).named_parameters()}
    for name, tensor in pairs:
        shape = expected.pop(name, None)
        if shape != tensor.shape:
            wanted = tuple(shape) if shape is not None else "no such parameter, or stood there twice"
            raise ValueError(
                f"{name} is of shape {tuple(tensor.shape)}; this model.* configuration has {wanted}"
            )
        yield name, tensor
    if expected:
        raise ValueError(f"{len(expected)} parameters are missing, the first: {next(iter(expected))}")


def write_weights(named: Iterable[tuple[str, Tensor]], target: Store) -> None:
    """Write safetensors files of at most MAX_FILE_BYTES, and their index where there are several."""
    index: dict[str, str] = {}
    total = 0
    file: dict[str, Tensor] = {}

    def flush(name: str) -> None:
        target.put(name, safetensors.torch.save(file, metadata={"format": "pt"}))
        index.update(dict.fromkeys(file, name))
        file.clear()

    def held() -> int:
        return sum(tensor.nbytes for tensor in file.values())

    for name, tensor in named:
        if file and held() + tensor.nbytes > MAX_FILE_BYTES:
            flush(f"model-{len(set(index.values())) + 1:05d}.safetensors")
        file[name] = tensor.contiguous()
        total += tensor.nbytes
    if index:
        flush(f"model-{len(set(index.values())) + 1:05d}.safetensors")
        put_json(target, INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    else:
        flush(WEIGHTS)
    for info in target.list("model"):  # of an earlier export with other files, which would be read instead
        if info.path not in index.values() and (info.path != INDEX or WEIGHTS in index.values()):
            target.delete(info.path)


def weight_files(source: Store) -> list[str]:
    if not source.exists(INDEX):
        return [WEIGHTS]
    return sorted(set(json.loads(source.read(INDEX))["weight_map"].values()))


# --- configuration ---


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
    """Return the shape that config.json describes; ValueError for what the decoder does not have."""
    rope = fields.get("rope_parameters") or {"rope_theta": fields.get("rope_theta", 10_000.0)}
    head_width = fields["hidden_size"] // fields["num_attention_heads"]
    for key, value, wanted in (
        ("model_type", fields.get("model_type"), "llama"),
        ("hidden_act", fields.get("hidden_act", "silu"), "silu"),
        ("attention_bias", fields.get("attention_bias", False), False),
        ("mlp_bias", fields.get("mlp_bias", False), False),
        ("rope_scaling", fields.get("rope_scaling"), None),
        ("rope_parameters.rope_type", rope.get("rope_type", "default"), "default"),
        ("head_dim", fields.get("head_dim") or head_width, head_width),
    ):
        if value != wanted:
            raise ValueError(f"{uri}/config.json: {key}={value!r} cannot be loaded, only {wanted!r} can")
    return ModelConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        num_kv_heads=fields.get("num_key_value_heads") or 0,
        intermediate_size=fields["intermediate_size"],
        max_positions=fields["max_position_embeddings"],
        rope_theta=rope["rope_theta"],
        norm_eps=fields["rms_norm_eps"],
        tie_embeddings=fields.get("tie_word_embeddings", False),
    )


def tokenizer_config(config: ModelConfig, boundary: str) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": boundary,
        "eos_token": boundary,
        "pad_token": boundary,
        "padding_side": "left",
        "model_max_length": config.max_positions,
        "clean_up_tokenization_spaces": False,
    }


def generation_config(boundary_id: int) -> dict[str, Any]:
    return {"bos_token_id": boundary_id, "eos_token_id": boundary_id, "pad_token_id": boundary_id}


def put_json(target: Store, path: str, content: Mapping[str, Any]) -> None:
    target.put(path, json.dumps(content, indent=2).encode())
