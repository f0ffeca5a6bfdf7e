"""A trained model as a folder that transformers loads as Llama or BERT, and back.

python trainers/export.py --run runs/NAME --step best --output exports/NAME
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import safetensors.torch
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from cluster.config import from_dict, run_entry
from cluster.storage import Store, open_store
from cluster.strict_yaml import read_yaml
from data.manifest import read_manifest
from data.tokens import SpecialIds, fix_tokenizer, read_tokenizer, special_ids
from trainers.checkpoint import checkpoint_at
from trainers.checkpoint_reader import CheckpointReader
from trainers.formats import INDEX, PRETRAINING, WEIGHTS, checked, format_of, read_stored
from trainers.model import Backbone, build_empty
from trainers.objectives import ObjectiveConfig
from trainers.shape import ModelConfig

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
) -> None:
    """Write weights, configuration and tokenizer; config.json last, so that a cut export does not load.

    `objective` is kept beside the shape, for whoever asks the model something. `model_state` holds the model's
    parameters by name; one that yields them one at a time is not held as a whole. Raises ValueError if its names or
    shapes are not those of `config`.
    """
    pairs = model_state.items() if isinstance(model_state, Mapping) else model_state
    form = format_of(config)
    target.delete("config.json")
    named = form.to(checked(pairs, config), config)
    write_weights(((name, tensor.detach().to("cpu", dtype)) for name, tensor in named), target)
    ids, tokenizer = (
        replace(special_ids(tokenizer_json), boundary=boundary_id),
        Tokenizer.from_buffer(tokenizer_json),
    )
    boundary = tokenizer.id_to_token(boundary_id)
    if boundary is None:
        raise ValueError(f"boundary_id={boundary_id} is not in the tokenizer; give the one of the manifest")
    if config.attention == "causal":
        target.put("tokenizer.json", tokenizer_json)
        put_json(target, "tokenizer_config.json", tokenizer_config(config, boundary))
        put_json(target, "generation_config.json", generation_config(boundary_id))
    else:
        target.put("tokenizer.json", framing(tokenizer, ids).to_str().encode())
        put_json(target, "tokenizer_config.json", encoder_tokenizer_config(config, tokenizer, ids))
    trained: dict[str, str] = {"objective": objective.kind, "words": objective.words} if objective else {}
    fixed = fix_tokenizer(tokenizer_json.decode(), "tokenizer.json", boundary)
    trained["tokenizer"] = fixed.fingerprint
    put_json(target, "config.json", form.fields(config, ids, dtype) | {PRETRAINING: trained})


def load_exported(source: Store) -> Exported:
    """Read an exported folder into float32 weights on the CPU.

    Raises:
        FileNotFoundError: the folder holds no exported model.
        ValueError: it holds a model of a kind or shape that the backbone does not have, or another's tokenizer.
    """
    stored = read_stored(source)
    model = build_empty(stored.config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in stored.parameters():
            parameters[name].copy_(tensor)
    tokenizer_json = source.read("tokenizer.json")
    ids = special_ids(tokenizer_json)
    # BERT's own folders name no token that opens a text; what ends one stands nearest.
    openers = (stored.fields.get("bos_token_id"), ids.boundary, ids.sep)
    boundary_id = next((each for each in openers if each is not None), None)
    if boundary_id is None:
        raise ValueError(f"{source.uri}/config.json: bos_token_id is missing, and no token can stand for it")
    tokenizer, trained = Tokenizer.from_buffer(tokenizer_json), stored.fields.get(PRETRAINING, {})
    boundary = tokenizer.id_to_token(boundary_id)
    if "tokenizer" in trained and boundary:
        found = fix_tokenizer(tokenizer_json.decode(), f"{source.uri}/tokenizer.json", boundary).fingerprint
        if found != trained["tokenizer"]:
            raise ValueError(
                f"{source.uri}/tokenizer.json is the tokenizer {found}, but the model was trained with "
                f"{trained['tokenizer']}; export it again"
            )
    return Exported(model.eval(), tokenizer, boundary_id, trained.get("objective"))


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
    target.put(path, json.dumps(content, indent=2).encode())


def export_run(run: Store, which: int | Literal["best", "last"], target: Store) -> str:
    """Export a checkpoint of a run's folder; returns its name.

    Raises:
        FileNotFoundError: `run` is not the folder of a run, or its prepared corpus is gone.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    sections = read_yaml(run, "config.yaml")
    corpus = open_store(sections["corpus"]["prepared"])
    manifest = read_manifest(corpus, json.loads(run.read("manifest.json"))["digest"])
    config = from_dict(ModelConfig, sections["model"])
    config = replace(config, vocab_size=config.vocab_size or manifest.vocab_size)
    record = checkpoint_at(run, which)
    tokenizer = read_tokenizer(corpus, manifest.tokenizer)
    objective = from_dict(ObjectiveConfig, sections.get("objective", {}))
    values = CheckpointReader(run, record).values()
    export(values, config, tokenizer, manifest.boundary_id, target, objective=objective)
    return record.name


def main(argv: Sequence[str] | None = None) -> None:
    """Export a checkpoint of a run from the command line."""
    parser = argparse.ArgumentParser(description="Export a checkpoint of a run for transformers.")
    parser.add_argument(
        "--run", required=True, metavar="URI", help="the run's folder: a path, file://, s3://, gs://"
    )
    parser.add_argument(
        "--step", default="best", help="best (default), last, or the number of finished steps"
    )
    parser.add_argument("--output", required=True, metavar="URI", help="folder to write")
    arguments = parser.parse_args(argv)
    which = arguments.step
    if which not in ("best", "last"):
        if not which.isdecimal():
            parser.error(f"--step {which} is none of best, last and a number of steps")
        which = int(which)
    target = open_store(arguments.output)
    print(f"{export_run(open_store(arguments.run), which, target)} is exported to {target.uri}")


if __name__ == "__main__":
    run_entry(main, ValueError)  # a model of another shape
