"""A model that starts from an exported one: a larger vocabulary, heads that it lacked."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from trainers.exported.formats import Stored
from trainers.model.backbone import Backbone, build_empty, initial_value
from trainers.model.shape import ModelConfig


def grown(stored: Stored, vocab_size: int) -> Backbone:
    """A folder's model in float32 on the CPU, with as many entries as a tokenizer that got a boundary.

    What is new is as in a run with `run.seed` 0 that starts from the folder.
    """
    config = replace(stored.config, vocab_size=max(vocab_size, stored.config.vocab_size))
    return begun(config, 0, stored).eval()


def begun(config: ModelConfig, seed: int, stored: Stored) -> Backbone:
    """A model in float32 on the CPU with a folder's weights; see `begun_values`."""
    model, values = build_empty(config), begun_values(config, seed, stored)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values(name, parameter.shape))
    return model


def begun_values(config: ModelConfig, seed: int, stored: Stored) -> Callable[[str, torch.Size], Tensor]:
    """Read a folder's weights; returns what gives each parameter's first value, float32 on the CPU, once.

    The vocabulary may be larger than the folder's, and a pair head be there or not: what is new starts as `seed` says.

    Raises:
        ValueError: the folder lacks a weight, or its shape is another one.
    """
    found = dict(stored.parameters())

    def value(name: str, shape: torch.Size) -> Tensor:
        tensor = found.pop(name, None)
        if tensor is not None and tensor.shape == shape:
            return tensor.float()
        whole = initial_value(config, seed, name, shape)
        if tensor is not None:
            whole[: len(tensor)] = tensor
        return whole

    return value
