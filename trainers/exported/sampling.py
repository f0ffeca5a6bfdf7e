"""Sampling: prompts continued token by token.

Legend: B prompts, T positions, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainers.exported.folder import Exported
from trainers.model.backbone import Backbone
from trainers.model.diverged import DivergedModelError
from trainers.model.layers import Cache
from trainers.model.shape import ModelConfig

PADDING_SEGMENT, PROMPT_SEGMENT = -1, 0


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen, and when a text ends."""

    max_new_tokens: int = 128
    """Tokens after the prompt, at most."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together reach this probability."""
    seed: int = 0
    """Of the random choices; the n-th prompt of a batch has a stream of its own."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation, and are not part of it."""

    def problems(self, at: str) -> Iterator[str]:
        """Yield a line for each value that cannot be used."""
        if self.max_new_tokens < 1:
            yield f"{at}.max_new_tokens={self.max_new_tokens} must be at least 1"
        if self.temperature < 0:
            yield f"{at}.temperature={self.temperature} must be 0 (always the likeliest) or more"
        if self.top_k < 0:
            yield f"{at}.top_k={self.top_k} must be 0 (all tokens) or more"
        if not 0 < self.top_p <= 1:
            yield f"{at}.top_p={self.top_p} must be above 0 and at most 1"
        if "" in self.stop:
            yield f"{at}.stop holds an empty text, which would stop at once; remove it"


@dataclass(frozen=True)
class Completion:
    """What follows a prompt."""

    text: str
    tokens: list[int]
    ended_by: Literal["stop", "length"]
    """stop: a stop text, or the model closed the document; length: max_new_tokens."""


def complete(exported: Exported, prompts: Sequence[str], sampling: SamplingConfig) -> list[Completion]:
    """Continue each prompt as the beginning of a document; one batch, whatever the lengths.

    Raises:
        ValueError: a prompt and its continuation need more positions than the model has, or it is an encoder.
        DivergedModelError: its scores of the next token are not finite.
    """
    if exported.model.config.attention != "causal":
        raise ValueError("the model is an encoder, which continues no text; see trainers/fill_mask.py")
    tokenizer, boundary_id = exported.tokenizer, exported.boundary_id

    def ends(tokens: Sequence[int]) -> bool:
        return tokens[-1] == boundary_id or cut(tokenizer.decode(tokens), sampling.stop) is not None

    encoded = [encoded_prompt(prompt, exported) for prompt in prompts]
    completions = []
    for prompt, tokens in zip(prompts, generate(exported.model, encoded, sampling, ends), strict=True):
        if tokens is None:
            raise DivergedModelError(
                f"the model's scores of what follows {prompt[:40]!r} are not finite: it has diverged; take another"
            )
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        before_stop = cut(text, sampling.stop)
        completions.append(
            Completion(
                text if before_stop is None else before_stop, tokens, "stop" if ends(tokens) else "length"
            )
        )
    return completions


def encoded_prompt(prompt: str, exported: Exported) -> list[int]:
    """A prompt's tokens as the beginning of a document."""
    return [exported.boundary_id, *exported.tokenizer.encode(prompt, add_special_tokens=False).ids]


def room_after(prompt: str, exported: Exported) -> int:
    """Positions that are left for the continuation of a prompt; negative where the prompt alone is too long."""
    return exported.model.config.max_positions - len(encoded_prompt(prompt, exported))


def cut(text: str, stops: Sequence[str]) -> str | None:
    """Return what stands before the first of `stops`; None if none is in `text`."""
    found = [text.index(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else None


@torch.inference_mode()
def generate(
    model: Backbone,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    ends: Callable[[Sequence[int]], bool] = lambda tokens: False,
) -> list[list[int] | None]:
    """Return the tokens that follow each prompt, None where a token's scores are not finite; a row is closed once
    `ends` is true of its new tokens.

    Shorter prompts are padded on the left with a segment of their own, which nothing else attends to; rotary
    positions are relative, so a prompt's place in its row does not matter.
    """
    check_lengths(model.config, prompts, sampling.max_new_tokens)
    device = model.embed_tokens.weight.device
    longest = max(map(len, prompts))
    tokens_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    segments_BT = torch.full_like(tokens_BT, PADDING_SEGMENT)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        segments_BT[row, longest - len(prompt) :] = PROMPT_SEGMENT
    tokens_BT, segments_BT = tokens_BT.to(device), segments_BT.to(device)
    cache = Cache(
        model.config, len(prompts), longest + sampling.max_new_tokens, like=model.embed_tokens.weight
    )
    streams = [torch.Generator().manual_seed(sampling.seed + row) for row in range(len(prompts))]
    written: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    diverged_rows: set[int] = set()
    for _ in range(sampling.max_new_tokens):
        hidden_BTD = model(tokens_BT, segments_BT, cache)
        logits_BV = model.logits(hidden_BTD[:, -1:]).squeeze(1)
        finite_B = logits_BV.isfinite().all(dim=-1)
        # Any token will do for a row whose answer is dropped, but no generator draws from NaN.
        chosen_B = choose(logits_BV.where(finite_B[:, None], 0.0), sampling, streams)
        diverged_rows |= open_rows - set(finite_B.nonzero().flatten().tolist())
        open_rows -= diverged_rows
        for row, token in enumerate(chosen_B.tolist()):
            if row in open_rows:
                written[row].append(token)
        open_rows = {row for row in open_rows if not ends(written[row])}
        if not open_rows:
            break
        tokens_BT = chosen_B[:, None].to(device)
        segments_BT = torch.full_like(tokens_BT, PROMPT_SEGMENT)
    return [None if row in diverged_rows else tokens for row, tokens in enumerate(written)]


def check_lengths(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if not prompts or not all(prompts):
        raise ValueError("a prompt has no tokens; give each at least the boundary token")
    longest, room = max(map(len, prompts)), config.max_positions
    if longest + max_new_tokens > room:
        raise ValueError(
            f"max_new_tokens={max_new_tokens:,} after a prompt of {longest:,} tokens exceed the model's "
            f"{room:,} positions; use at most {max(0, room - longest):,}, or a shorter prompt"
        )


def choose(logits_BV: Tensor, sampling: SamplingConfig, streams: Sequence[torch.Generator]) -> Tensor:
    """Return the next token of each row, int64 [B], on the CPU."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1).cpu()
    probabilities_BV = candidates(
        logits_BV.float() / sampling.temperature, sampling.top_k, sampling.top_p
    ).cpu()
    picks = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities_BV, streams, strict=True)]
    return torch.cat(picks)


def candidates(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return the probabilities with all but the candidates at zero, not normalised again.

    First the `top_k` likeliest (0: all), then of these the fewest that reach `top_p` of their joint
    probability (nucleus sampling, Holtzman et al. 2020).
    """
    values_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    if top_k:
        values_BV[:, top_k:] = -torch.inf
    sorted_BV = values_BV.softmax(dim=-1)
    likelier_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    sorted_BV[likelier_BV >= top_p] = 0
    return torch.zeros_like(sorted_BV).scatter(-1, order_BV, sorted_BV)
