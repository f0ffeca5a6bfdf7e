"""How a model lies in a folder: as Llama or BERT where transformers has its shape, else under our own names."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from cluster.configuration.config import from_dict
from cluster.console.errors import ConfigError
from cluster.storage.uris import Store
from data.tokens.tokenizer import SpecialIds, fix_tokenizer
from trainers.exported.bert import bert_fields, config_from_bert, fits_bert, from_bert, to_bert
from trainers.exported.llama import config_from_llama, fits_llama, from_llama, llama_config, to_llama
from trainers.exported.model_files import ModelFolderError, read_header, read_json, read_weights, weight_files
from trainers.model.backbone import Backbone
from trainers.model.shape import ModelConfig, count_parameters

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
    """The shape by the content of config.json and the folder's URI; ModelFolderError for one that we lack."""


def _llama_fields(config: ModelConfig, ids: SpecialIds, dtype: torch.dtype) -> dict[str, Any]:
    assert ids.boundary is not None, "special ids without the boundary of documents"
    return llama_config(config, ids.boundary, dtype)


def _own_fields(config: ModelConfig, ids: SpecialIds, dtype: torch.dtype) -> dict[str, Any]:
    return {"model_type": OWN, "bos_token_id": ids.boundary, **asdict(config)}


def _own_config(found: Mapping[str, Any], uri: str) -> ModelConfig:
    # A key that came later has its default in older folders: what they were made with.
    given = {field.name: found[field.name] for field in fields(ModelConfig) if field.name in found}
    try:
        return from_dict(ModelConfig, given)
    except ConfigError as wrong:
        raise ModelFolderError(f"{uri}/config.json: {'; '.join(wrong.problems)}") from None


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
            ModelFolderError: a parameter is missing, or is not one of this shape.
        """
        found: dict[str, Tensor] = {}
        for file in weight_files(self.source):
            found |= read_weights(self.source, file)
        return self.named(found)

    def named(self, found: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The folder's tensors as our parameters; raises as `parameters` does."""
        back = FORMATS[self.fields["model_type"]].back
        try:
            yield from checked(back(found, self.config), self.config)
        except (ValueError, RuntimeError) as other:  # torch's, where shapes cannot be joined
            raise ModelFolderError(f"{self.source.uri}: {other}") from None


def read_stored(source: Store) -> Stored:
    """Read what a folder holds, of this project or of Hugging Face, and hold names and shapes of its weights, which are
    not read yet, against its config.json.

    Raises:
        FileNotFoundError: it holds no model, or no safetensors.
        ModelFolderError: it holds a model of a kind or shape that the backbone does not have, or is damaged.
    """
    found = read_json(source, CONFIG)
    stored = Stored(source, found, stored_shape(found, source.uri))
    for _ in stored.named(read_headers(source, stored.config)):
        pass
    return stored


def stored_shape(found: Mapping[str, Any], uri: str) -> ModelConfig:
    """The backbone's shape by config.json. Raises ModelFolderError for one that the backbone does not have."""
    kind = found.get("model_type")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise ModelFolderError(
            f"{uri}/config.json: model_type={kind!r} cannot be loaded, only {', '.join(FORMATS)} can"
        )
    config = FORMATS[kind].config(found, uri)
    if problems := [*config.problems("model")] or ["model.vocab_size is missing"] * (not config.vocab_size):
        raise ModelFolderError(f"{uri}/config.json: {'; '.join(problems)}")
    return config


def read_headers(source: Store, config: ModelConfig) -> dict[str, Tensor]:
    """All tensors of the weight files, without memory.

    Raises:
        FileNotFoundError: a file is missing.
        ModelFolderError: a file is no safetensors, or they hold fewer weights than `config` has: a model is made by its
            config.json, so that a wrong number there would take any amount of memory.
    """
    found: dict[str, Tensor] = {}
    for file in weight_files(source):
        if not source.exists(file):
            raise FileNotFoundError(
                f"{source.uri} holds no {file}; save it again with transformers' save_pretrained, "
                "which writes safetensors (pickled weights are not read)"
            )
        found |= read_header(source, file)
    least = count_parameters(config).matrices + config.vocab_size * config.hidden_size
    there = sum(tensor.numel() for tensor in found.values())
    if least > there or config.num_layers > len(found):
        raise ModelFolderError(
            f"{source.uri}: config.json describes a model of {config.num_layers:,} layers and {least:,} weights or "
            f"more, its files hold {len(found):,} tensors of {there:,}"
        )
    return found


def checked(pairs: Pairs, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Pass the parameters on; ValueError for one that `config` does not have, has otherwise, or misses."""
    with torch.device("meta"):
        expected = {name: parameter.shape for name, parameter in Backbone(config).named_parameters()}
    for name, tensor in pairs:
        shape = expected.pop(name, None)
        if shape is not None and not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} holds {tensor.dtype}, no floating-point numbers")
        if shape != tensor.shape:
            wanted = tuple(shape) if shape is not None else "no such parameter, or stood there twice"
            raise ValueError(
                f"{name} is of shape {tuple(tensor.shape)}; this model.* configuration has {wanted}"
            )
        yield name, tensor
    if expected:
        raise ValueError(f"{len(expected)} parameters are missing, the first: {next(iter(expected))}")


def boundary_of(fields: Mapping[str, Any], ids: SpecialIds, vocab_size: int, uri: str) -> int:
    """The token that opens a text. BERT's own folders name none that does; what ends one stands nearest.

    Raises:
        ModelFolderError: there is none.
    """
    openers = (fields.get("bos_token_id"), ids.boundary, ids.sep)
    found = next((each for each in openers if each is not None), None)
    if found is None:
        raise ModelFolderError(f"{uri}/config.json: bos_token_id is missing, and no token can stand for it")
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < vocab_size:
        raise ModelFolderError(f"{uri}/config.json: bos_token_id={found!r} is no id of its {vocab_size:,}")
    return found


def fits_tokenizer(
    tokenizer: Tokenizer, fields: Mapping[str, Any], vocab_size: int, boundary_id: int, uri: str
) -> None:
    """Raise ModelFolderError for another tokenizer than the one that config.json says the model was trained with, or
    for one with more entries than the model's embedding."""
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if size > vocab_size:
        raise ModelFolderError(
            f"{uri}/tokenizer.json has {size:,} entries, its embedding {vocab_size:,}: it is not the tokenizer that "
            "the model was trained with; put that one there"
        )
    trained = pretraining_of(fields).get("tokenizer")
    boundary = tokenizer.id_to_token(boundary_id)
    if trained is None or boundary is None:
        return
    found = fix_tokenizer(tokenizer.to_str(), f"{uri}/tokenizer.json", boundary).fingerprint
    if found != trained:
        raise ModelFolderError(
            f"{uri}/tokenizer.json is the tokenizer {found}, but the model was trained with {trained}; export it again"
        )


def pretraining_of(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of the training; empty in a folder of others."""
    found = fields.get(PRETRAINING)
    return found if isinstance(found, dict) else {}
