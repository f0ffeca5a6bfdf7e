"""Answers of a task model, whoever shares the work."""

import torch
from task_files import SHAPE, small_tokenizer
from tokenizers import Tokenizer

from trainers.model import build
from trainers.task import TaskConfig, TaskPrompt
from trainers.task_encoding import Encoder, framed
from trainers.task_evaluation import answers_to
from trainers.task_model import AdaptConfig, TaskModel
from trainers.task_records import Example

CPU = torch.device("cpu")


def generator(max_tokens: int = 128) -> tuple[TaskModel, Encoder]:
    task = TaskConfig(name="t", kind="generation", prompt=TaskPrompt(template="Q: {text}\nA:"))
    tokenizer, pad = framed(Tokenizer.from_str(small_tokenizer().json), 0, causal=True)
    model = TaskModel(build(SHAPE, seed=3), task, AdaptConfig(), seed=0).eval()
    with torch.no_grad():  # so that answers depend on their prompts
        for parameter in model.parameters():
            parameter.mul_(3)
    return model, Encoder(task, tokenizer, pad, max_tokens, True, True)


def answers(model: TaskModel, encoder: Encoder, examples: list[Example], **options) -> list[str]:
    encoded = encoder.encode(examples)
    with torch.inference_mode():
        found, _, _ = answers_to(model, encoder, examples, encoded, rows_per_batch=4, device=CPU, **options)
    return [one.value for one in found]


def test_a_worker_without_a_record_answers_none():
    assert answers(*generator(), []) == []
