"""A model as a folder that transformers loads as Llama or BERT: written and read."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from cluster.storage.uris import Store
from data.tokens.tokenizer import SpecialIds, fix_tokenizer, special_ids
from data.tokens.tokenizer_file import parse_tokenizer
from trainers.exported.formats import (
    CONFIG,
    PRETRAINING,
    boundary_of,
    checked,
    fits_tokenizer,
    format_of,
    pretraining_of,
    read_stored,
)
from trainers.exported.model_files import INDEX, WEIGHTS
from trainers.exported.replacing import replacing
from trainers.model.backbone import Backbone, build_empty
from trainers.model.shape import ModelConfig
from trainers.objectives.kinds import ObjectiveConfig

MAX_FILE_BYTES = 2 << 30
"""Of one weight file: it is held in memory while it is written, and S3 takes 5 GiB in one put."""


@dataclass(frozen=True)
class Exported:
    """What generation and evaluation need of an exported folder."""

    model: Backbone
    tokenizer: Tokenizer
    boundary_id: int
    """Opens every document in training, so it opens every prompt and ends every text."""
    objective: str | None = None
    """What it was trained for, where the folder says so."""


def export(
    model_state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    tokenizer_json: bytes,
    boundary_id: int,
    target: Store,
    *,
    objective: ObjectiveConfig | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """Write weights, configuration and tokenizer; config.json last, so that a cut export does not load.

    `objective` is kept beside the shape, for whoever asks the model something. `model_state` holds the model's
    parameters by name; one that yields them one at a time, in the order of their names, is not held as a whole.

    Raises:
        ValueError: names or shapes are not those of `config`; or, without `overwrite`, another's model is there.
    """
    pairs = model_state.items() if isinstance(model_state, Mapping) else model_state
    form = format_of(config)
    ids, tokenizer = (
        replace(special_ids(tokenizer_json), boundary=boundary_id),
        parse_tokenizer(tokenizer_json, "tokenizer.json"),
    )
    boundary = tokenizer.id_to_token(boundary_id)
    if boundary is None:
        raise ValueError(f"boundary_id={boundary_id} is not in the tokenizer; give the one of the manifest")
    trained: dict[str, str] = {"objective": objective.kind, "words": objective.words} if objective else {}
    trained["tokenizer"] = fix_tokenizer(tokenizer_json, "tokenizer.json", boundary).fingerprint
    files = files_of(form.to(empty_parameters(config), config), dtype)
    with replacing(target, [*set(files.values()), *index_of(files)], overwrite=overwrite):
        named = form.to(checked(pairs, config), config)
        write_weights(((name, tensor.detach().to("cpu", dtype)) for name, tensor in named), files, target)
        if config.attention == "causal":
            target.put("tokenizer.json", tokenizer_json)
            put_json(target, "tokenizer_config.json", tokenizer_config(config, boundary))
            put_json(target, "generation_config.json", generation_config(boundary_id))
        else:
            target.put("tokenizer.json", framing(tokenizer, ids).to_str().encode())
            put_json(target, "tokenizer_config.json", encoder_tokenizer_config(config, tokenizer, ids))
        put_json(target, CONFIG, form.fields(config, ids, dtype) | {PRETRAINING: trained})


def load_exported(source: Store) -> Exported:
    """Read an exported folder into float32 weights on the CPU.

    Raises:
        FileNotFoundError: the folder holds no exported model.
        ValueError: it holds a model of a kind or shape that the backbone does not have, or another's tokenizer, or is
            damaged.
    """
    stored = read_stored(source)
    model = build_empty(stored.config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in stored.parameters():
            parameters[name].copy_(tensor)
    tokenizer_json = source.read("tokenizer.json")
    origin = f"{source.uri}/tokenizer.json"
    ids, tokenizer = special_ids(tokenizer_json, origin=origin), parse_tokenizer(tokenizer_json, origin)
    boundary_id = boundary_of(stored.fields, ids, stored.config.vocab_size, source.uri)
    fits_tokenizer(tokenizer, stored.fields, stored.config.vocab_size, boundary_id, source.uri)
    return Exported(model.eval(), tokenizer, boundary_id, pretraining_of(stored.fields).get("objective"))


def empty_parameters(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Names and shapes of a model's parameters, without memory, in the order of a checkpoint: by name."""
    with torch.device("meta"):
        yield from sorted(Backbone(config).named_parameters(), key=itemgetter(0))


def files_of(named: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, str]:
    """The file of each tensor, named as transformers does; of MAX_FILE_BYTES at most, unless one tensor is larger."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, tensor in named:
        num_bytes = tensor.numel() * dtype.itemsize
        if groups[-1] and held + num_bytes > MAX_FILE_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += num_bytes
    if len(groups) == 1:
        return dict.fromkeys(groups[0], WEIGHTS)
    return {
        name: f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        for number, group in enumerate(groups, start=1)
        for name in group
    }


def index_of(files: Mapping[str, str]) -> list[str]:
    """The name of the index, where several files need one."""
    return [INDEX] if len(set(files.values())) > 1 else []


def write_weights(named: Iterable[tuple[str, Tensor]], files: Mapping[str, str], target: Store) -> None:
    """Write each safetensors file once its tensors are there, and the index where there are several files."""
    left, total = Counter(files.values()), 0
    held: dict[str, dict[str, Tensor]] = {file: {} for file in left}
    for name, tensor in named:
        file = files[name]
        held[file][name] = tensor.contiguous()
        total += tensor.nbytes
        if len(held[file]) == left[file]:
            target.put(file, safetensors.torch.save(held.pop(file), metadata={"format": "pt"}))
    assert not held, f"tensors that were never given: {held.keys()}"
    for index in index_of(files):
        put_json(target, index, {"metadata": {"total_size": total}, "weight_map": dict(files)})


def framing(tokenizer: Tokenizer, ids: SpecialIds) -> Tokenizer:
    """The tokenizer as it puts the texts of an encoder between special tokens, where it has these."""
    if ids.cls is not None and ids.sep is not None:
        opening, closing = tokenizer.id_to_token(ids.cls), tokenizer.id_to_token(ids.sep)
        tokenizer.post_processor = TemplateProcessing(
            single=f"{opening} $A {closing}",
            pair=f"{opening} $A {closing} $B:1 {closing}:1",
            special_tokens=[(opening, ids.cls), (closing, ids.sep)],
        )
    return tokenizer


def tokenizer_config(config: ModelConfig, boundary: str) -> dict[str, Any]:
    """What transformers' tokenizers need to know of a decoder's beside tokenizer.json."""
    return {
        **_shared_tokenizer_config(config),
        "bos_token": boundary,
        "eos_token": boundary,
        "pad_token": boundary,
        "padding_side": "left",
    }


def encoder_tokenizer_config(config: ModelConfig, tokenizer: Tokenizer, ids: SpecialIds) -> dict[str, Any]:
    """The same of an encoder's: which special token plays which role."""
    by_role = {"pad": ids.pad, "cls": ids.cls, "sep": ids.sep, "mask": ids.mask}
    named = {f"{role}_token": tokenizer.id_to_token(i) for role, i in by_role.items() if i is not None}
    inputs = ["input_ids", "attention_mask"] + ["token_type_ids"] * (config.num_token_types > 0)
    return {**_shared_tokenizer_config(config), "model_input_names": inputs, **named}


def _shared_tokenizer_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_positions,
        "clean_up_tokenization_spaces": False,
    }


def generation_config(boundary_id: int) -> dict[str, Any]:
    return {"bos_token_id": boundary_id, "eos_token_id": boundary_id, "pad_token_id": boundary_id}


def put_json(target: Store, path: str, content: Mapping[str, Any]) -> None:
    target.put(path, json.dumps(content, indent=2, allow_nan=False).encode())
