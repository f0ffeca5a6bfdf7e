"""How a model lies in a folder: as Llama or BERT where transformers has its shape, else under our own names."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cluster.storage import Store
from data.tokens import SpecialIds
from trainers.bert import bert_fields, config_from_bert, fits_bert, from_bert, to_bert
from trainers.llama import config_from_llama, fits_llama, from_llama, llama_config, to_llama
from trainers.model import Backbone
from trainers.shape import ModelConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
TASK = "task.json"
"""Beside a fine-tuned model: what transformers' config.json has no place for."""
OWN = "ray-pretraining"
"""`model_type` of shapes that transformers has no class for."""
PRETRAINING = "pretraining"
"""Key of config.json beside those of transformers: tokenizer's fingerprint, objective, what was hidden as a whole."""

Pairs = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Format:
    """How names and shape are written down."""

    fits: Callable[[ModelConfig], bool]
    to: Callable[[Pairs, ModelConfig], Iterator[tuple[str, Tensor]]]
    """From our parameters to those of the folder."""
    back: Callable[[Mapping[str, Tensor], ModelConfig], Iterator[tuple[str, Tensor]]]
    fields: Callable[[ModelConfig, SpecialIds, torch.dtype], dict[str, Any]]
    """The content of config.json."""
    config: Callable[[Mapping[str, Any], str], ModelConfig]
    """The shape by the content of config.json and the folder's URI; ValueError for one that we lack."""


def _llama_fields(config: ModelConfig, ids: SpecialIds, dtype: torch.dtype) -> dict[str, Any]:
    assert ids.boundary is not None, "special ids without the boundary of documents"
    return llama_config(config, ids.boundary, dtype)


def _own_fields(config: ModelConfig, ids: SpecialIds, dtype: torch.dtype) -> dict[str, Any]:
    return {"model_type": OWN, "bos_token_id": ids.boundary, **asdict(config)}


def _own_config(found: Mapping[str, Any], uri: str) -> ModelConfig:
    # A key that came later has its default in older folders: what they were made with.
    return ModelConfig(
        **{field.name: found[field.name] for field in fields(ModelConfig) if field.name in found}
    )


FORMATS = {
    "llama": Format(fits_llama, to_llama, from_llama, _llama_fields, config_from_llama),
    "bert": Format(fits_bert, to_bert, from_bert, bert_fields, config_from_bert),
    OWN: Format(
        lambda config: True,
        lambda pairs, config: iter(pairs),
        lambda found, config: iter(found.items()),
        _own_fields,
        _own_config,
    ),
}
"""By `model_type` of config.json; the first that fits is written."""


def format_of(config: ModelConfig) -> Format:
    """The format that a model of this shape is written in."""
    return next(each for each in FORMATS.values() if each.fits(config))


@dataclass(frozen=True)
class Stored:
    """A model in a folder, its weights not read yet."""

    source: Store
    fields: Mapping[str, Any]
    """The content of config.json."""
    config: ModelConfig

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Read all weights, from safetensors only, as our parameters.

        Raises:
            ValueError: a parameter is missing, or is not one of this shape.
        """
        found: dict[str, Tensor] = {}
        for file in weight_files(self.source):
            found |= safetensors.torch.load(self.source.read(file))
        back = FORMATS[self.fields["model_type"]].back
        try:
            yield from checked(back(found, self.config), self.config)
        except ValueError as other:
            raise ValueError(f"{self.source.uri}: {other}") from other


def read_stored(source: Store) -> Stored:
    """Read what a folder holds, of this project or of Hugging Face.

    Raises:
        FileNotFoundError: it holds no model, or no safetensors.
        ValueError: it holds a model of a kind or shape that the backbone does not have.
    """
    found = json.loads(source.read("config.json"))
    kind = found.get("model_type")
    if kind not in FORMATS:
        raise ValueError(
            f"{source.uri}/config.json: model_type={kind!r} cannot be loaded, only {', '.join(FORMATS)} can"
        )
    for file in weight_files(source):
        if not source.exists(file):
            raise FileNotFoundError(
                f"{source.uri} holds no {file}; save it again with transformers' save_pretrained, "
                "which writes safetensors (pickled weights are not read)"
            )
    return Stored(source, found, FORMATS[kind].config(found, source.uri))


def weight_files(source: Store) -> list[str]:
    """The files that hold the weights, by their index where there are several."""
    if not source.exists(INDEX):
        return [WEIGHTS]
    return sorted(set(json.loads(source.read(INDEX))["weight_map"].values()))


def checked(pairs: Pairs, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Pass the parameters on; ValueError for one that `config` does not have, has otherwise, or misses."""
    with torch.device("meta"):
        expected = {name: parameter.shape for name, parameter in Backbone(config).named_parameters()}
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
