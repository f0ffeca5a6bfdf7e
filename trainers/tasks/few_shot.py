"""A task without training: a prompt with a few solved records, and what the model finds likeliest after it.

A label is chosen by the log-likelihood of its text: summed, per token (Brown et al. 2020, section 2.4), and by option
calibrated, less its log-likelihood after a prompt without content (Zhao et al. 2021, section 5), which takes off what
the model would say anyway. Generation and question answering write their answers; an answer from a context is scored by
SQuAD's F1, whether it stands in the context or not.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cluster.console.errors import ConfigError
from trainers.exported.folder import Exported
from trainers.exported.sampling import SamplingConfig, complete
from trainers.model.diverged import DivergedModelError
from trainers.tasks.bootstrap import judged_interval
from trainers.tasks.encoding import prompt_of
from trainers.tasks.heads import is_causal
from trainers.tasks.metrics import measure
from trainers.tasks.records import Example, Target
from trainers.tasks.splits import PreparedTask, choose_budget
from trainers.tasks.task import TaskConfig

CONTENT_FREE = ("N/A", "...", "[MASK]")
"""Texts without content, whose log-likelihoods are averaged."""
WRITTEN = ("generation", "question_answering")
"""Kinds whose answers are written freely."""


@dataclass(frozen=True)
class FewShotConfig:
    """How a task is put to a model."""

    shots: int = 0
    """Solved records before each question, drawn from train; the same for all questions."""
    seed: int = 0
    """Of the draw."""
    max_rows: int = 500
    """Records of the split, the first ones of a keyed draw; 0: all."""
    rows_per_batch: int = 16
    """Prompts with an answer that are scored at a time."""
    calibrate: bool = False
    """Also choose labels by calibrated scores."""


def evaluate_few_shot(exported: Exported, prepared: PreparedTask, config: FewShotConfig) -> dict[str, Any]:
    """Metrics on the validation split, each with a 95 % bootstrap interval of the task's metric.

    Raises:
        ConfigError: a kind that has no prompt, an encoder, or prompts that are longer than the model's positions.
    """
    task = prepared.task
    if problems := list(cannot_be_asked(exported, task, config)):
        raise ConfigError(problems)
    examples, shots = choose_asked(prepared, config), choose_shots(prepared, config)
    if task.kind in WRITTEN:
        ways = {"written": written(exported, task, shots, examples)}
    else:
        scores = choice_scores(exported, task, shots, examples, config.rows_per_batch, config.calibrate)
        ways = {way: [task.labels[best] for best in found.argmax(axis=1)] for way, found in scores.items()}
    return {
        "task": task.name,
        "shots": config.shots,
        "seed": config.seed,
        "records": len(examples),
        **{way: judged(task, examples, answers) for way, answers in ways.items()},
    }


def cannot_be_asked(exported: Exported, task: TaskConfig, config: FewShotConfig) -> Iterator[str]:
    """A line for each reason why the model cannot be asked this task."""
    if task.kind not in ("classification", "pairs", *WRITTEN) or task.multi_label:
        yield f"kind={task.kind} (multi_label={task.multi_label}) cannot be asked by a prompt"
    if not is_causal(exported.model):
        yield "zero- and few-shot evaluation needs a decoder; this model is an encoder"
    if task.judged_by == "loss":
        yield "metric=loss needs training; name another for few-shot evaluation"
    if task.kind in ("pairs", "question_answering") and "{pair" not in task.prompt.template:
        yield f"prompt.template={task.prompt.template!r} has no {{pair}}: {task.columns.pair} would not be asked about"
    if task.kind in WRITTEN and not task.prompt.separator:
        yield "prompt.separator='' would end each answer before it begins; write what stands between two shots"
    if config.calibrate and task.kind in WRITTEN:
        yield f"--calibrate is for labels; kind={task.kind} writes its answer"


def judged(task: TaskConfig, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Any]:
    """All metrics, and the interval of the task's own."""
    found = measure(task, examples, answers)
    return {"metrics": found, "interval": judged_interval(task, examples, answers)}


def choose_asked(prepared: PreparedTask, config: FewShotConfig) -> list[Example]:
    """The records that are asked, of validation: the same for every number of shots."""
    return choose_budget(prepared.task, prepared.read("validation"), config.max_rows, seed=0)


def choose_shots(prepared: PreparedTask, config: FewShotConfig) -> list[Example]:
    """Solved records from train, labels in turn, in random order: the last one weighs most.

    Raises:
        ConfigError: there are not so many.
    """
    if not config.shots:
        return []
    train = prepared.read("train")
    if config.shots > len(train):
        raise ConfigError(
            [f"--shots {config.shots:,} are more than the {len(train):,} records of train; ask with fewer"]
        )
    drawn = choose_budget(prepared.task, train, config.shots, config.seed, "balanced")
    random.Random(config.seed).shuffle(drawn)
    return drawn


def answer_text(task: TaskConfig, target: Target) -> str:
    """How an answer is written after its prompt."""
    text: str = target["text"] if task.kind == "question_answering" else target
    return task.prompt.before_answer + task.prompt.answers.get(text, text)


def full_prompt(task: TaskConfig, shots: Sequence[Example], text: str) -> str:
    """Solved records, and the prompt of the one that is asked."""
    solved = [prompt_of(task, shot) + answer_text(task, shot.target) for shot in shots]
    return task.prompt.separator.join([*solved, text])


def questions(
    task: TaskConfig, shots: Sequence[Example], examples: Sequence[Example]
) -> tuple[list[str], list[str]]:
    """Prompts, one for each example, and the answers to choose from, one for each label, as they are written."""
    prompts = [full_prompt(task, shots, prompt_of(task, example)) for example in examples]
    return prompts, [answer_text(task, label) for label in task.labels]


def choice_scores(
    exported: Exported,
    task: TaskConfig,
    shots: Sequence[Example],
    examples: Sequence[Example],
    rows_per_batch: int,
    calibrate: bool = False,
) -> dict[str, np.ndarray]:
    """Scores of each label after each prompt, [records, labels], by each way of scoring."""
    free_texts = CONTENT_FREE if calibrate else ()
    blank = [Example("", text, text, [], None) for text in free_texts]
    prompts, answers = questions(task, shots, [*examples, *blank])
    sums, lengths = log_likelihoods(exported, prompts, answers, rows_per_batch)
    asked, free = sums[: len(examples)], sums[len(examples) :]
    plain = {"sum": asked, "per_token": asked / lengths[: len(examples)]}
    return plain | ({"calibrated": asked - free.mean(axis=0)} if calibrate else {})


@torch.inference_mode()
def log_likelihoods(
    exported: Exported, prompts: Sequence[str], answers: Sequence[str], rows_per_batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood of each answer after each prompt, and its number of tokens there, both [prompts, answers].

    Raises:
        ConfigError: a prompt and its answer share a token, or are longer than the model's positions.
        DivergedModelError: a log-likelihood is not finite.
    """
    model = exported.model
    rows, starts = encoded(exported, prompts, answers)
    longest = max(len(row) for of_prompt in rows for row in of_prompt)
    if longest > model.config.max_positions:
        raise ConfigError(
            [
                f"the longest prompt takes {longest:,} tokens with its answer, the model has "
                f"{model.config.max_positions:,} positions; ask with fewer --shots"
            ]
        )
    pairs = sorted(
        ((p, a) for p in range(len(prompts)) for a in range(len(answers))),
        key=lambda pair: len(rows[pair[0]][pair[1]]),
    )
    found = np.zeros((len(prompts), len(answers)))
    device = model.embed_tokens.weight.device
    for start in range(0, len(pairs), rows_per_batch):
        some = pairs[start : start + rows_per_batch]
        width = max(len(rows[p][a]) for p, a in some)
        tokens_BT = torch.zeros(len(some), width, dtype=torch.long)
        weights_BT = torch.zeros(len(some), width)
        for index, (p, a) in enumerate(some):
            row = rows[p][a]
            tokens_BT[index, : len(row)] = torch.tensor(row)
            weights_BT[index, starts[p] : len(row)] = 1
        tokens_BT, weights_BT = tokens_BT.to(device), weights_BT.to(device)
        nats_B = model(tokens_BT[:, :-1], None, None, tokens_BT[:, 1:], weights_BT[:, 1:].contiguous())[1]
        for (p, a), nats in zip(some, nats_B.tolist(), strict=True):
            found[p, a] = -nats
    if diverged := int((~np.isfinite(found)).any(axis=1).sum()):
        raise DivergedModelError(
            f"the model's log-likelihoods of answers to {diverged:,} of {len(prompts):,} prompts are not finite: it "
            "has diverged; take another"
        )
    return found, np.array([[len(row) - start for row in rows[p]] for p, start in enumerate(starts)])


def encoded(
    exported: Exported, prompts: Sequence[str], answers: Sequence[str]
) -> tuple[list[list[list[int]]], list[int]]:
    """Tokens of each prompt with each answer, [prompts][answers], and where in them the answers start, [prompts].

    Prompt and answer are encoded as the one text that they are, and spaces that end a prompt count to the answer: by
    itself an answer may have other tokens than the model saw in training (EleutherAI's lm-eval does the same).
    """

    def encode(texts: Sequence[str]) -> list[list[int]]:
        encodings = exported.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [[exported.boundary_id, *encoding.ids] for encoding in encodings]

    heads = encode([prompt.rstrip() for prompt in prompts])
    flat = encode([prompt + answer for prompt in prompts for answer in answers])
    rows = [flat[start : start + len(answers)] for start in range(0, len(flat), len(answers))]
    for prompt, head, of_prompt in zip(prompts, heads, rows, strict=True):
        for answer, row in zip(answers, of_prompt, strict=True):
            if row[: len(head)] != head or len(row) == len(head):
                raise ConfigError(
                    [
                        f"a token spans the end of the prompt {prompt[-20:]!r} and the start of its answer "
                        f"{answer!r}; let prompt.before_answer start with a space"
                    ]
                )
    return rows, [len(head) for head in heads]


def written(
    exported: Exported, task: TaskConfig, shots: Sequence[Example], examples: Sequence[Example]
) -> list[str]:
    """What the model writes after each prompt, up to the separator; of a context's answer up to the end of its line."""
    stop = (task.prompt.separator, *(("\n",) if task.kind == "question_answering" else ()))
    sampling = SamplingConfig(temperature=0, max_new_tokens=64, stop=stop)
    prompts = [full_prompt(task, shots, prompt_of(task, example)) for example in examples]
    found = []
    for start in range(0, len(prompts), 16):
        found += [one.text.strip() for one in complete(exported, prompts[start : start + 16], sampling)]
    return found
