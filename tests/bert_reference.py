"""transformers' BertForPreTraining with the weights of our backbone, put in by hand."""

import torch
from transformers import BertConfig, BertForPreTraining

from trainers.model.backbone import Backbone
from trainers.model.shape import ModelConfig

SMALL = dict(vocab_size=97, hidden_size=48, num_layers=3, num_heads=4, intermediate_size=80, max_positions=64)
BERT = ModelConfig(
    **SMALL,
    attention="bidirectional",
    positions="learned",
    num_token_types=2,
    norm="layernorm",
    norm_place="post",
    norm_eps=1e-12,
    activation="gelu",
    biases=True,
    head="transform",
    pair_head=True,
    tie_embeddings=True,
)


def bert_of(model: Backbone) -> BertForPreTraining:
    """transformers' own model with the same weights, put in by hand."""
    shape = model.config
    reference = BertForPreTraining(
        BertConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            intermediate_size=shape.intermediate_size,
            max_position_embeddings=shape.max_positions,
            type_vocab_size=shape.num_token_types,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=None,  # or token 0 would get no gradient from the embedding
        )
    ).eval()
    missing, unexpected = reference.load_state_dict(
        to_reference(dict(model.named_parameters()), shape), strict=False
    )
    assert not unexpected and set(missing) <= {
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
    }
    reference.tie_weights()
    return reference


def to_reference(values: dict[str, torch.Tensor], shape: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights, or their gradients, under the reference's names."""
    names = {
        "embed_tokens": "bert.embeddings.word_embeddings",
        "embed_types": "bert.embeddings.token_type_embeddings",
    }
    names |= {
        "embed_positions": "bert.embeddings.position_embeddings",
        "embed_norm": "bert.embeddings.LayerNorm",
    }
    names |= {
        "lm_head.dense": "cls.predictions.transform.dense",
        "lm_head.norm": "cls.predictions.transform.LayerNorm",
    }
    names |= {"pair_head.pooler": "bert.pooler.dense", "pair_head.classifier": "cls.seq_relationship"}
    for i in range(shape.num_layers):
        ours, theirs = f"layers.{i}", f"bert.encoder.layer.{i}"
        names |= {f"{ours}.self_attn.o_proj": f"{theirs}.attention.output.dense"}
        names |= {f"{ours}.post_attention_layernorm": f"{theirs}.attention.output.LayerNorm"}
        names |= {f"{ours}.mlp.up_proj": f"{theirs}.intermediate.dense"}
        names |= {f"{ours}.mlp.down_proj": f"{theirs}.output.dense"}
        names |= {f"{ours}.post_mlp_layernorm": f"{theirs}.output.LayerNorm"}
    state = {}
    for name, tensor in values.items():
        stem, _, kind = name.rpartition(".")
        if stem.endswith("qkv_proj"):
            layer = stem.split(".")[1]
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                state[f"bert.encoder.layer.{layer}.attention.self.{part}.{kind}"] = rows
        else:
            state["cls.predictions.bias" if name == "lm_head.bias" else f"{names[stem]}.{kind}"] = tensor
    return state


def lively(model: Backbone) -> Backbone:
    """Weights far from their even start, so that a wrong order of heads, or a bias left out, would show."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
