"""A task model's answers to records, and what they are worth; by one worker, or shared by all."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from trainers.engine.collectives import Workers
from trainers.exported.sampling import SamplingConfig, generate
from trainers.tasks.encoding import Encoded, Encoder, by_length, collate
from trainers.tasks.heads import TaskModel, likelihoods, loss_sum, target_weight
from trainers.tasks.labels import labels_in
from trainers.tasks.metrics import NOT_FINITE, Answer, measure, read_scores
from trainers.tasks.records import Example
from trainers.tasks.task import TaskConfig


@dataclass(frozen=True)
class TaskScore:
    """How good a model is on a set of records."""

    score: float
    """The task's metric, turned so that more is better; NaN where there is none, as of a diverged model."""
    metrics: dict[str, float]
    """Those that are finite; none where the model's outputs, or its loss, are not."""
    records: int

    @property
    def is_score(self) -> bool:
        return math.isfinite(self.score)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def answers_to(
    model: TaskModel,
    encoder: Encoder,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    *,
    rows_per_batch: int,
    device: torch.device,
    max_new_tokens: int = 64,
) -> tuple[list[Answer], float, float]:
    """Answer each example, in the order given; also the sum of the losses and what it is to be divided by (0
    without targets). The model is in evaluation mode, gradients off."""
    found: list[Answer] = [Answer(None, math.nan)] * len(examples)
    losses = weights = 0.0
    for rows in by_length([len(row.ids) for row in encoded], rows_per_batch):
        batch = collate(encoder.task, [encoded[row] for row in rows], encoder.pad_id).to(device)
        if encoder.task.kind == "generation":
            if examples[rows[0]].target is not None:
                losses += float(model(batch.tokens_BT, batch.mask_BT, batch.types_BT, batch.targets))
        else:
            scores = model(batch.tokens_BT, batch.mask_BT, batch.types_BT)
            if batch.targets is not None:
                losses += float(loss_sum(encoder.task.kind, scores, batch.targets, batch.mask_BT, None))
            likely = likelihoods(encoder.task, scores.float()).cpu().numpy()
            # Of scores, not of probabilities: the sigmoid of an infinite score is 1.
            finite = scores.isfinite().cpu().numpy()
            for row, of_row, is_finite in zip(rows, likely, finite, strict=True):
                within: Any = slice(len(encoded[row].ids)) if of_row.ndim == 2 else ...
                found[row] = (
                    read_scores(
                        encoder.task,
                        examples[row],
                        encoded[row],
                        of_row[within],
                        encoder.scale,
                        encoder.causal,
                    )
                    if is_finite[within].all()
                    else NOT_FINITE
                )
        if batch.targets is not None and examples[rows[0]].target is not None:
            weights += target_weight(encoder.task.kind, batch, None)
    if encoder.task.kind == "generation" and max_new_tokens:
        found = written_answers(model, encoder, examples, rows_per_batch, max_new_tokens)
    return found, losses, weights


def written_answers(
    model: TaskModel, encoder: Encoder, examples: Sequence[Example], rows_per_batch: int, max_new_tokens: int
) -> list[Answer]:
    """What the model writes after each prompt, the likeliest token at a time."""
    if not examples:
        return []  # a worker without a share of the records
    backbone: Any = model.backbone
    new_tokens = answer_tokens(max_new_tokens, encoder.max_tokens)
    prompts = [prompt.ids for prompt in encoder.ask(examples, new_tokens)]
    sampling = SamplingConfig(temperature=0, max_new_tokens=new_tokens)
    found = [NOT_FINITE] * len(prompts)
    closing = prompts[0][0]  # the boundary, which opens each prompt, also ends an answer
    for rows in by_length([len(prompt) for prompt in prompts], rows_per_batch):
        written = generate(backbone, [prompts[row] for row in rows], sampling, lambda new: new[-1] == closing)
        for row, tokens in zip(rows, written, strict=True):
            if tokens is not None:
                text = encoder.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                found[row] = Answer(text, math.nan)
    return found


def answer_tokens(max_new_tokens: int, max_tokens: int) -> int:
    """Tokens that an answer may take of a record's: half of them at most, so that something is asked."""
    return max(1, min(max_new_tokens, max_tokens // 2))


def asked(
    encoder: Encoder, examples: Sequence[Example], encoded: Sequence[Encoded], max_new_tokens: int
) -> Sequence[Encoded]:
    """The rows that answers follow: those of `encode`, but of generation prompts, which leave room for an answer."""
    if encoder.task.kind != "generation":
        return encoded
    return encoder.ask(examples, answer_tokens(max_new_tokens, encoder.max_tokens))


def score_of(
    task: TaskConfig, examples: Sequence[Example], answers: Sequence[Answer], losses: float, weights: float
) -> TaskScore:
    """Judge answers. Generated answers that were not written (metric: loss) have no other metrics. One record without
    finite scores takes the score away: the others' would make a diverged model the best."""
    if not math.isfinite(losses) or not all(answer.is_finite for answer in answers):
        return TaskScore(math.nan, {}, len(examples))
    written = [answer.value for answer in answers]
    metrics = {} if written and written[0] is None else measure(task, examples, written)
    if weights:
        metrics["loss"] = losses / weights
    metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return TaskScore(task.oriented(metrics.get(task.judged_by, math.nan)), metrics, len(examples))


def evaluate_together(
    model: TaskModel,
    encoder: Encoder,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    workers: Workers,
    *,
    rows_per_batch: int,
    device: torch.device,
    max_new_tokens: int,
) -> TaskScore:
    """Each worker answers its share of the records; all get the score of the whole."""
    mine = range(workers.rank, len(examples), workers.world_size)
    share = answers_to(
        model,
        encoder,
        [examples[i] for i in mine],
        [encoded[i] for i in mine],
        rows_per_batch=rows_per_batch,
        device=device,
        max_new_tokens=max_new_tokens,
    )
    answers: list[Answer] = [Answer(None, math.nan)] * len(examples)
    losses = weights = 0.0
    for rank, (found, loss, weight) in enumerate(workers.gather(share)):
        answers[rank :: workers.world_size] = found
        losses, weights = losses + loss, weights + weight
    return score_of(encoder.task, examples, answers, losses, weights)


def class_weights(task: TaskConfig, examples: Sequence[Example]) -> Tensor:
    """Weight of each label, inverse to its frequency and 1 on average over the examples, [C]; where an example has any
    number of labels, of not having and having each one, [2, C]. Both are scikit-learn's "balanced": all examples over
    classes that there are times those of the class."""
    counts = labels_in(task, examples)
    having = torch.tensor([float(counts[label]) for label in task.labels])
    if not task.multi_label:
        return having.sum() / (having.count_nonzero() * having.clamp(min=1))
    both = torch.stack([len(examples) - having, having])
    return len(examples) / (2 * both.clamp(min=1))
