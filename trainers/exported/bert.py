"""The encoder as transformers' BertForPreTraining has it: names of its weights, keys of its config.json."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from data.tokens.tokenizer import SpecialIds
from trainers.exported.model_files import Fields, ModelFolderError
from trainers.model.shape import ModelConfig

SWITCHES: dict[str, Any] = {
    "attention": "bidirectional",
    "positions": "learned",
    "norm": "layernorm",
    "norm_place": "post",
    "activation": "gelu",
    "biases": True,
    "head": "transform",
}
"""What makes the backbone BERT (Devlin et al. 2018), beside token types."""

# Ours and theirs, as prefixes of `.weight` and `.bias`.
_TOP = {
    "embed_tokens": "bert.embeddings.word_embeddings",
    "embed_positions": "bert.embeddings.position_embeddings",
    "embed_types": "bert.embeddings.token_type_embeddings",
    "embed_norm": "bert.embeddings.LayerNorm",
    "lm_head.dense": "cls.predictions.transform.dense",
    "lm_head.norm": "cls.predictions.transform.LayerNorm",
    "lm_head": "cls.predictions.decoder",
    "pair_head.pooler": "bert.pooler.dense",
    "pair_head.classifier": "cls.seq_relationship",
}
_IN_LAYER = {
    "self_attn.o_proj": "attention.output.dense",
    "post_attention_layernorm": "attention.output.LayerNorm",
    "mlp.up_proj": "intermediate.dense",
    "mlp.down_proj": "output.dense",
    "post_mlp_layernorm": "output.LayerNorm",
}
_QKV = ("attention.self.query", "attention.self.key", "attention.self.value")
_PAIR_HEAD = ("bert.pooler.", "cls.seq_relationship.")
_HEAD_BIAS, _DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"


def fits_bert(config: ModelConfig) -> bool:
    """Whether BERT's classes in transformers have this shape."""
    return (
        all(getattr(config, key) == value for key, value in SWITCHES.items())
        and config.num_token_types > 0
        and config.kv_heads == config.num_heads
    )


def to_bert(pairs: Iterable[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters under BERT's names, query, key and value cut apart."""
    for name, tensor in pairs:
        if name == "lm_head.bias":
            yield _HEAD_BIAS, tensor
            if not config.tie_embeddings:  # nor does transformers tie the bias then, but it has both
                yield _DECODER_BIAS, tensor.clone()
        elif ".qkv_proj." in name:
            layer, _, kind = name.partition(".self_attn.qkv_proj.")
            for part, rows in zip(_QKV, tensor.chunk(3), strict=True):
                yield f"bert.encoder.{layer.replace('layers', 'layer')}.{part}.{kind}", rows
        else:
            yield _renamed(name), tensor


def _renamed(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("layers."):
        _, number, part = stem.split(".", 2)
        return f"bert.encoder.layer.{number}.{_IN_LAYER[part]}.{kind}"
    return f"{_TOP[stem]}.{kind}"


def from_bert(found: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the encoder's parameters out of BERT's; what it ties or does not train is left out.

    Raises:
        ValueError: query, key or value of a layer is missing.
    """
    by_name = {_today(name): tensor for name, tensor in found.items()}
    by_name.pop("bert.embeddings.position_ids", None)  # 0, 1, 2, … in folders that old versions wrote
    if not config.pair_head:  # of BertForMaskedLM, whose folder may hold what its class does not use
        by_name = {name: tensor for name, tensor in by_name.items() if not name.startswith(_PAIR_HEAD)}
    # A folder holds one of the bias's names or both; the decoder's is the one that transformers computes with.
    head_bias = by_name.pop(_HEAD_BIAS, None)
    head_bias = by_name.pop(_DECODER_BIAS, head_bias)
    if config.tie_embeddings:
        by_name.pop("cls.predictions.decoder.weight", None)
    for layer in range(config.num_layers):
        for kind in ("weight", "bias"):
            names = [f"bert.encoder.layer.{layer}.{part}.{kind}" for part in _QKV]
            if absent := [name for name in names if name not in by_name]:
                raise ValueError(f"{absent[0]} is missing")
            fused = torch.cat([by_name.pop(name) for name in names])
            yield f"layers.{layer}.self_attn.qkv_proj.{kind}", fused
    if head_bias is not None:
        yield "lm_head.bias", head_bias
    for name, tensor in by_name.items():
        yield _ours(name), tensor


_OURS = {theirs: ours for ours, theirs in _TOP.items()}
_OURS_IN_LAYER = {theirs: ours for ours, theirs in _IN_LAYER.items()}


def _today(name: str) -> str:
    """A name as transformers writes it today: folders converted from TensorFlow call a norm's parts gamma and beta."""
    for before, now in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        name = name.replace(before, now)
    return name


def _ours(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("bert.encoder.layer."):
        number, _, part = stem.removeprefix("bert.encoder.layer.").partition(".")
        return f"layers.{number}.{_OURS_IN_LAYER.get(part, part)}.{kind}"
    return f"{_OURS.get(stem, stem)}.{kind}"


def bert_fields(config: ModelConfig, ids: SpecialIds, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json."""
    return {
        "architectures": ["BertForPreTraining" if config.pair_head else "BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": "gelu",
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.num_token_types,
        "layer_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        # The backbone has no dropout; whoever trains on in transformers may want some.
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": ids.boundary,
        "pad_token_id": ids.pad,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def config_from_bert(fields: Mapping[str, Any], uri: str) -> ModelConfig:
    """Return the shape that config.json describes; ModelFolderError for what the encoder does not have."""
    found = Fields(fields, f"{uri}/config.json")
    architectures = fields.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else architectures
    for key, value, wanted in (
        ("hidden_act", fields.get("hidden_act", "gelu"), ("gelu",)),
        ("position_embedding_type", fields.get("position_embedding_type", "absolute"), ("absolute",)),
        ("is_decoder", fields.get("is_decoder", False), (False,)),
        ("architectures[0]", architecture, ("BertForPreTraining", "BertForMaskedLM")),
    ):
        if value not in wanted:
            accepted = " or ".join(map(repr, wanted))
            raise ModelFolderError(f"{found.at}: {key}={value!r} cannot be loaded, only {accepted} can")
    # The defaults are those of transformers' BertConfig: its folders may leave them out.
    return ModelConfig(
        vocab_size=found.whole("vocab_size", 30_522),
        hidden_size=found.whole("hidden_size", 768),
        num_layers=found.whole("num_hidden_layers", 12),
        num_heads=found.whole("num_attention_heads", 12),
        intermediate_size=found.whole("intermediate_size", 3_072),
        max_positions=found.whole("max_position_embeddings", 512),
        num_token_types=found.whole("type_vocab_size", 2),
        norm_eps=found.number("layer_norm_eps", 1e-12),
        pair_head=architecture == "BertForPreTraining",
        tie_embeddings=found.flag("tie_word_embeddings", True),
        **SWITCHES,
    )
