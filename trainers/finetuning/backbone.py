"""The backbone of a fine-tuning run: read, held against the task before a worker is asked for, known by a digest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer

from cluster.configuration.keys import nearest
from cluster.configuration.stored_file import read_json
from cluster.console.errors import ConfigError
from cluster.storage.uris import Store, open_store
from data.tokens.tokenizer import special_ids
from data.tokens.tokenizer_file import parse_tokenizer
from trainers.exported.folder import Exported, load_exported
from trainers.exported.formats import boundary_of, fits_tokenizer, pretraining_of, read_stored
from trainers.exported.local_copy import local_copy
from trainers.exported.model_digest import FORMER_LENGTH, content_digest, hashed, listing_digest
from trainers.exported.model_files import weight_files
from trainers.finetuning.config import FinetuneConfig
from trainers.model.backbone import Backbone, initialize
from trainers.model.shape import ModelConfig
from trainers.stored.run_files import PUT_BACK
from trainers.tasks.encoding import Encoder, framed
from trainers.tasks.heads import AdaptConfig
from trainers.tasks.task import TaskConfig

ORIGIN = "origin.json"
"""Of a run or a sweep: digests of what it learns, and from which weights."""


class OtherBackboneError(ConfigError):
    """What lies behind `backbone.uri` is not what the run was started from."""


@dataclass(frozen=True)
class BackboneFacts:
    """What encoding records takes of a backbone: all but its weights."""

    shape: ModelConfig
    tokenizer: Tokenizer
    boundary_id: int
    names_tokenizer: bool = False
    """Whether the folder says which tokenizer it was trained with; else only the number of entries tells."""


def facts_of(exported: Exported) -> BackboneFacts:
    return BackboneFacts(exported.model.config, exported.tokenizer, exported.boundary_id)


def read_facts(config: FinetuneConfig) -> BackboneFacts:
    """The same as of the loaded backbone, without its weights: a driver needs none.

    Raises:
        ConfigError: there is no backbone, or not with the tokenizer that it was trained with.
    """
    uri = config.backbone.uri
    try:
        stored = read_stored(open_store(uri))
        serialised = stored.source.read("tokenizer.json")
        origin = f"{stored.source.uri}/tokenizer.json"
        ids, tokenizer = special_ids(serialised, origin=origin), parse_tokenizer(serialised, origin)
        boundary_id = boundary_of(stored.fields, ids, stored.config.vocab_size, stored.source.uri)
        fits_tokenizer(tokenizer, stored.fields, stored.config.vocab_size, boundary_id, stored.source.uri)
    except FileNotFoundError as error:
        raise ConfigError([f"backbone.uri={uri} holds no exported model: {error}"]) from None
    except ValueError as error:
        raise ConfigError([f"backbone.uri={uri} cannot be adapted: {error}"]) from None
    names_tokenizer = "tokenizer" in pretraining_of(stored.fields)
    return BackboneFacts(stored.config, tokenizer, boundary_id, names_tokenizer)


def load_backbone(config: FinetuneConfig, seed: int, digest: str = "") -> Exported:
    """The pretrained model, or one of its shape with initial weights.

    Args:
        digest: What the bytes that are loaded must have; empty: whatever there is.

    Raises:
        ConfigError: there is none, or not with the tokenizer that it was trained with.
        OtherBackboneError: it is another one.
    """
    uri = config.backbone.uri
    try:
        source = hashed(local_copy(open_store(uri)))
        exported = load_exported(source)
    except FileNotFoundError as error:
        raise ConfigError([f"backbone.uri={uri} holds no exported model: {error}"]) from None
    except ValueError as error:
        raise ConfigError([f"backbone.uri={uri} cannot be adapted: {error}"]) from None
    if digest and (found := source.digest()) != digest:
        raise OtherBackboneError(
            [
                f"backbone.uri={uri} was replaced while the run goes on: {digest} there, {found} here; put that one "
                "back, or choose a new run.name"
            ]
        )
    if config.backbone.from_scratch:
        initialize(exported.model, seed)
    return exported


def backbone_digest(config: FinetuneConfig) -> str:
    """Names what lies behind `backbone.uri` now, by the content of each file that is read of it: 32 hexadecimal digits.

    Raises:
        ConfigError: there is no backbone.
    """
    uri = config.backbone.uri
    try:
        return content_digest(local_copy(open_store(uri)))
    except FileNotFoundError as error:
        raise ConfigError([f"backbone.uri={uri} holds no exported model: {error}"]) from None
    except ValueError as error:
        raise ConfigError([f"backbone.uri={uri} cannot be adapted: {error}"]) from None


def backbone_name(begun: Store, config: FinetuneConfig, digest: str) -> str:
    """How a run or a sweep knows the backbone: by its digest, or as it was begun, by sizes and times."""
    before = read_json(begun, ORIGIN, dict[str, str], PUT_BACK) if begun.exists(ORIGIN) else {}
    if len(before.get("backbone", "")) != FORMER_LENGTH:
        return digest
    source = open_store(config.backbone.uri)
    read = {"config.json", "tokenizer.json", *weight_files(source)}
    return listing_digest([info for info in source.list() if info.path in read])


def make_encoder(
    config: FinetuneConfig,
    task: TaskConfig,
    backbone: Exported | BackboneFacts,
    scale: tuple[float, float] = (0.0, 1.0),
) -> Encoder:
    """How this backbone takes records. Raises `ConfigError` where it does not fit the task or the configuration."""
    facts = facts_of(backbone) if isinstance(backbone, Exported) else backbone
    if problems := list(misfits(config, task, facts)):
        raise ConfigError(problems)
    causal = facts.shape.attention == "causal"
    tokenizer, pad_id = framed(facts.tokenizer, facts.boundary_id, causal)
    return Encoder(
        task=task,
        tokenizer=tokenizer,
        pad_id=pad_id,
        max_tokens=config.batch.max_tokens or facts.shape.max_positions,
        truncate=config.batch.truncate,
        causal=causal,
        scale=scale,
    )


def misfits(config: FinetuneConfig, task: TaskConfig, facts: BackboneFacts) -> Iterator[str]:
    """A line for each thing that backbone, task and configuration do not have in common."""
    shape, uri = facts.shape, config.backbone.uri
    if config.batch.max_tokens > shape.max_positions:
        yield (
            f"batch.max_tokens={config.batch.max_tokens:,} is more than the backbone's {shape.max_positions:,} "
            "positions"
        )
    if task.kind == "generation" and shape.attention != "causal":
        yield f"kind=generation needs a decoder; backbone.uri={uri} is an encoder"
    if task.kind == "generation" and config.adapt.train == "head":
        yield "adapt.train=head trains nothing: kind=generation has no new head; nearest: adapt.train=lora"
    if config.adapt.train == "lora":
        yield from lora_misfits(config.adapt.lora_targets, shape)


def lora_misfits(targets: Sequence[str], shape: ModelConfig) -> Iterator[str]:
    """A line for each target that no backbone has, or one where this backbone has none of them."""
    names = linear_names(shape)
    known = sorted(names | set(AdaptConfig.lora_targets))
    for target in targets:
        if target not in known:
            remedy = nearest(target, known) or f"one of {', '.join(known)}"
            yield f"adapt.lora_targets names {target}, which is no linear layer of a block; nearest: {remedy}"
    if not names & set(targets):
        yield (
            f"adapt.lora_targets={list(targets)} are no layers of this backbone: nothing would be adapted; it has "
            f"{', '.join(sorted(names))}"
        )


def linear_names(shape: ModelConfig) -> set[str]:
    """Names of the linear layers in the backbone's blocks."""
    with torch.device("meta"):
        blocks = Backbone(replace(shape, num_layers=1)).layers
    return {
        name.rpartition(".")[2] for name, part in blocks.named_modules() if isinstance(part, torch.nn.Linear)
    }
