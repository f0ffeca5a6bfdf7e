"""What a run starts from instead of random weights: a model's folder, of this project or of Hugging Face.

`run.init_from` gives shape, weights and tokenizer. The run is a new one, with a schedule that warms up again, so this
is how training goes on with newer text: name old and new text under `corpus.sources` and the share of the old one, that
is replayed against forgetting, under `order.weights` (Ibrahim et al. 2024).
"""

from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from cluster.console.errors import ConfigError
from cluster.storage.uris import open_store
from data.preparing.assemble import given_tokenizer
from data.tokens.tokenizer import fix_tokenizer
from trainers.exported.formats import read_stored
from trainers.exported.growing import begun_values
from trainers.exported.model_digest import hashed
from trainers.model.shape import ModelConfig
from trainers.pretraining.config import PretrainConfig

# What need not be as in the folder: not part of the shape, or may grow.
FREE = ("vocab_size", "init_std", "document_mask", "pair_head")


def with_initial(config: PretrainConfig) -> PretrainConfig:
    """Take shape and tokenizer from `run.init_from`; without it, the configuration as it is.

    The vocabulary grows where the tokenizer has more entries than the folder's embedding, as when the boundary of
    documents is new to it. A pair head is added or left out as the objective needs it; what is new starts at random.

    Raises:
        ConfigError: a key is given that the folder has otherwise, or the folder cannot be started from.
    """
    uri = config.run.init_from
    if not uri:
        return config
    source = open_store(uri)
    try:
        shape = read_stored(source).config
        serialised = source.read("tokenizer.json")
        own = fix_tokenizer(serialised, f"{source.uri}/tokenizer.json", config.corpus.tokenizer.boundary)
    except (FileNotFoundError, ValueError) as unusable:
        raise ConfigError([f"run.init_from={uri}: {unusable}"]) from unusable
    if problems := list(_contradictions(config.model, shape, uri)):
        raise ConfigError(problems)
    tokenizer = config.corpus.tokenizer
    given = given_tokenizer(config.corpus)
    if given and given.fingerprint != own.fingerprint:
        raise ConfigError(
            [
                f"corpus.tokenizer.path={tokenizer.path} is the tokenizer {given.fingerprint}, but the model of "
                f"run.init_from={uri} was trained with {own.fingerprint}; leave the path empty to take that one"
            ]
        )
    merged = replace(
        config,
        model=replace(
            shape,
            vocab_size=max(shape.vocab_size, own.vocab_size, config.model.vocab_size),
            init_std=config.model.init_std,
            document_mask=config.model.document_mask,
            pair_head=config.objective.has_pairs,
        ),
        corpus=replace(
            config.corpus,
            tokenizer=replace(tokenizer, path=tokenizer.path or f"{source.uri}/tokenizer.json"),
        ),
    )
    if problems := [*merged.model.problems("model"), *merged.model_problems()]:
        raise ConfigError(problems)
    return merged


def _contradictions(given: ModelConfig, shape: ModelConfig, uri: str) -> Iterator[str]:
    """A line for each key that is neither left alone nor as in the folder."""
    for field in fields(ModelConfig):
        value, stored = getattr(given, field.name), getattr(shape, field.name)
        if field.name not in FREE and value not in (field.default, stored):
            yield f"model.{field.name}={value!r}, but run.init_from={uri} has {stored!r}; leave it out"


def initial_values(
    config: PretrainConfig, shape: ModelConfig, digest: str = ""
) -> Callable[[str, torch.Size], Tensor]:
    """`begun_values` of `run.init_from`.

    Args:
        digest: What the files that are loaded must have; empty: whatever there is.

    Raises:
        ConfigError: they are others.
        ValueError: as of `begun_values`.
    """
    uri = config.run.init_from
    source = hashed(open_store(uri))
    values = begun_values(shape, config.run.seed, read_stored(source))
    source.read("tokenizer.json")  # which the digest is of too
    if digest and (found := source.digest()) != digest:
        raise ConfigError(
            [
                f"run.init_from={uri} holds another model than the run was started from: {digest} there, {found} here; "
                "put that one back, or choose a new run.name"
            ]
        )
    return values
