"""From checked examples to tokens and targets, and from those to padded batches.

A text is framed as in pretraining: a decoder's as boundary, text, boundary, so that the closing boundary has seen
all of it; an encoder's as [CLS] text [SEP]. The framing goes into the tokenizer itself and so into the exported folder.

Legend: B rows, T positions, C labels.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from cluster.console.errors import ConfigError
from trainers.tasks.records import Example
from trainers.tasks.task import TaskConfig

IGNORED = -100
"""Target of a position that carries no loss, as in torch and transformers."""
PADS = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
UNKNOWNS, ENDS = ("[UNK]", "<unk>"), ("[CLS]", "[SEP]", "<s>", "</s>")


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example as the model takes it."""

    ids: list[int]
    types: list[int]
    """0 in the first text, 1 in the second."""
    target: Any
    """Label index; float32 [C] of several labels; a number; label indices [T]; (first, last) position of the
    answer; or, for generation, the position that the answer starts at. None if it is not known."""
    spans: list[tuple[int, int]]
    """Characters of each token in its text; only where a target lies in the text."""
    truncated: bool


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass, padded on the right."""

    tokens_BT: Tensor
    mask_BT: Tensor
    """True where a token is, False where padding is."""
    types_BT: Tensor
    targets: Tensor | None
    """Labels [B], several labels [B, C], numbers [B], tags [B, T], first and last [B, 2], or of generation the
    weight of each token as a target [B, T]; None if they are not known."""

    def to(self, device: torch.device) -> "Batch":
        targets = None if self.targets is None else self.targets.to(device)
        return Batch(self.tokens_BT.to(device), self.mask_BT.to(device), self.types_BT.to(device), targets)


@dataclass(frozen=True)
class Encoder:
    """Encodes examples of one task for one backbone. `scale` is mean and deviation of a regression's train
    targets."""

    task: TaskConfig
    tokenizer: Tokenizer
    pad_id: int
    max_tokens: int
    truncate: bool
    causal: bool
    scale: tuple[float, float] = (0.0, 1.0)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """Encode all, with their targets.

        Raises:
            ConfigError: examples that are longer than `max_tokens`, unless they may be truncated.
        """
        if self.task.kind == "generation":
            encodings = self.tokenizer.encode_batch([prompt_of(self.task, example) for example in examples])
            found = [
                self._generation(e, encoding.ids) for e, encoding in zip(examples, encodings, strict=True)
            ]
        else:
            pairs = [(e.text, e.pair) if e.pair else e.text for e in examples]
            encodings = self.tokenizer.encode_batch(pairs)
            found = [
                self._encoded(example, encoding, text)
                for example, encoding, text in zip(examples, encodings, pairs, strict=True)
            ]
        self._refuse_cut(examples, found, [len(encoding.ids) for encoding in encodings], self.max_tokens)
        return found

    def ask(self, examples: Sequence[Example], new_tokens: int) -> list[Encoded]:
        """Encode prompts alone, each with room for an answer of `new_tokens`: neither the target nor other prompts have
        a say in what an answer follows.

        Raises:
            ConfigError: prompts that are longer than what is left of `max_tokens`, unless they may be truncated.
        """
        room = max(1, self.max_tokens - new_tokens)
        encodings = self.tokenizer.encode_batch([prompt_of(self.task, example) for example in examples])
        prompts = [encoding.ids[:-1] for encoding in encodings]
        found = []
        for prompt in prompts:
            ids = end_of(prompt, room)
            found.append(Encoded(ids, [0] * len(ids), len(ids), [], len(ids) < len(prompt)))
        beside = f" beside an answer of {new_tokens:,}"
        self._refuse_cut(examples, found, [len(prompt) for prompt in prompts], room, beside)
        return found

    def _refuse_cut(
        self,
        examples: Sequence[Example],
        found: Sequence[Encoded],
        lengths: Sequence[int],
        room: int,
        beside: str = "",
    ) -> None:
        cut = [example for example, one in zip(examples, found, strict=True) if one.truncated]
        if cut and not self.truncate:
            raise ConfigError(
                [
                    f"{len(cut):,} of {len(examples):,} records of {self.task.name} are longer than {room:,} tokens"
                    f"{beside} (the longest has {max(lengths):,}; first: {cut[0].id}); set batch.truncate=true to "
                    "cut them, or take a backbone of more positions"
                ]
            )

    @cached_property
    def _cutting(self) -> Tokenizer:
        """The tokenizer, that cuts to `max_tokens`: the longer one of two texts first, and never the framing, for a
        decoder's answer stands on the closing token."""
        cutting = copy.deepcopy(self.tokenizer)
        cutting.encode_special_tokens = self.tokenizer.encode_special_tokens  # which a copy forgets
        cutting.enable_truncation(self.max_tokens, strategy="longest_first")
        return cutting

    def _encoded(self, example: Example, encoding: Any, text: str | tuple[str, str]) -> Encoded:
        cut = len(encoding.ids) > self.max_tokens
        if cut:
            (encoding,) = self._cutting.encode_batch([text])
        spans: list[tuple[int, int]] = []
        if self.task.kind in ("token_classification", "question_answering"):
            wanted = 1 if self.task.kind == "question_answering" else 0
            spans = [
                span if part == wanted and span[1] > span[0] else (-1, -1)
                for span, part in zip(encoding.offsets, encoding.sequence_ids, strict=True)
            ]
        return Encoded(encoding.ids, encoding.type_ids, self._target(example, spans), spans, cut)

    def _generation(self, example: Example, framed_prompt: list[int]) -> Encoded:
        """Prompt, answer and closing boundary in one row; the loss is on what follows the prompt."""
        prompt = framed_prompt[:-1]  # without the closing boundary, which would end the document
        answer = [] if example.target is None else self._answer(example.target) + framed_prompt[-1:]
        asked = end_of(prompt, max(1, self.max_tokens - len(answer)))
        ids = (asked + answer)[: self.max_tokens]
        cut = len(asked) < len(prompt) or len(ids) < len(asked) + len(answer)
        return Encoded(ids, [0] * len(ids), len(asked), [], cut)

    def _answer(self, text: str) -> list[int]:
        return self.tokenizer.encode(self.task.prompt.before_answer + text, add_special_tokens=False).ids

    def _target(self, example: Example, spans: Sequence[tuple[int, int]]) -> Any:
        target, labels = example.target, self.task.labels
        if target is None:
            return None
        if self.task.kind == "regression":
            mean, deviation = self.scale
            return (target - mean) / deviation
        if self.task.kind == "token_classification":
            tags = np.full(len(spans), IGNORED, np.int64)
            for position, tag in zip(word_positions(example.words, spans, self.causal), target, strict=True):
                if position is not None:
                    tags[position] = labels.index(tag)
            return tags
        if self.task.kind == "question_answering":
            start, stop = target["start"], target["start"] + len(target["text"])
            inside = [i for i, (a, b) in enumerate(spans) if a < stop and b > start]
            return (inside[0], inside[-1]) if inside else (0, 0)  # an answer that was cut off: nowhere
        if self.task.multi_label:
            return np.array([label in target for label in labels], np.float32)
        return labels.index(target)


def end_of(prompt: list[int], room: int) -> list[int]:
    """A prompt that fits: its end asks, so its beginning goes, but for the opening token."""
    return prompt if len(prompt) <= room else [prompt[0], *prompt[len(prompt) - room + 1 :]]


def word_positions(words: Sequence[str], spans: Sequence[tuple[int, int]], causal: bool) -> list[int | None]:
    """The token that stands for each word: its first piece, or under causal attention its last, which alone
    has seen all of the word. None for words that were cut off."""
    positions: list[int | None] = []
    begin, at = 0, 0
    for word in words:
        end = begin + len(word)
        pieces = []
        while at < len(spans) and spans[at][0] < end:  # those that hold no text have (-1, -1)
            if spans[at][1] > begin and spans[at][0] >= 0:
                pieces.append(at)
            at += 1
        positions.append(pieces[-1 if causal else 0] if pieces else None)
        begin = end + 1
    return positions


def prompt_of(task: TaskConfig, example: Example) -> str:
    """The text that the answer follows, without the blank before the answer."""
    return task.prompt.template.format(text=example.text, pair=example.pair)


def framed(tokenizer: Tokenizer, boundary_id: int, causal: bool) -> tuple[Tokenizer, int]:
    """A copy of the tokenizer that frames each text, and the id of its padding.

    A tokenizer of an encoder that already frames keeps its own way.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a record that spells out a special token does not get it
    pad = pad_of(tokenizer, boundary_id)
    separators = [name for name in ("[CLS]", "[SEP]") if tokenizer.token_to_id(name) is not None]
    if causal or len(separators) < 2:
        boundary = tokenizer.id_to_token(boundary_id)
        assert boundary is not None, f"{boundary_id} is not in the tokenizer"
        opening, closing = boundary, boundary
    else:
        opening, closing = separators
        if tokenizer.post_processor is not None and tokenizer.encode("a").tokens[0] == opening:
            return tokenizer, pad
    tokenizer.post_processor = TemplateProcessing(
        single=f"{opening} $A {closing}",
        pair=f"{opening} $A {closing} $B:1 {closing}:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in {opening, closing}],
    )
    return tokenizer, pad


def pad_of(tokenizer: Tokenizer, boundary_id: int) -> int:
    """Id of the padding: a token for it, else a special one that no text ends with, else the boundary."""
    special = {
        added.content: number
        for number, added in tokenizer.get_added_tokens_decoder().items()
        if added.special
    }
    for name in (*PADS, *UNKNOWNS, *special):
        found = tokenizer.token_to_id(name)
        if found is not None and found != boundary_id and name not in ENDS:
            return found
    return boundary_id


def collate(task: TaskConfig, rows: Sequence[Encoded], pad_id: int) -> Batch:
    """Pad rows to the longest."""
    longest = max(len(row.ids) for row in rows)
    lengths = torch.tensor([len(row.ids) for row in rows])
    mask_BT = torch.arange(longest) < lengths[:, None]
    tokens = [row.ids + [pad_id] * (longest - len(row.ids)) for row in rows]
    types = [row.types + [0] * (longest - len(row.ids)) for row in rows]
    targets = None if rows[0].target is None else _targets(task, rows, longest)
    return Batch(torch.tensor(tokens), mask_BT, torch.tensor(types), targets)


def _targets(task: TaskConfig, rows: Sequence[Encoded], longest: int) -> Tensor:
    if task.kind == "token_classification":
        tags = [np.pad(row.target, (0, longest - len(row.target)), constant_values=IGNORED) for row in rows]
        return torch.from_numpy(np.stack(tags))
    if task.kind == "generation":
        weights = np.zeros((len(rows), longest), np.float32)
        for index, row in enumerate(rows):
            weights[index, row.target : len(row.ids)] = 1
        return torch.from_numpy(weights)
    dtype = torch.float32 if task.multi_label or task.kind == "regression" else torch.long
    return torch.from_numpy(np.array([row.target for row in rows])).to(dtype)


def by_length(lengths: Sequence[int], rows_per_batch: int) -> list[list[int]]:
    """Batches for evaluation: all records, the longest first, so that what does not fit fails at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    return [order[i : i + rows_per_batch] for i in range(0, len(order), rows_per_batch)]
