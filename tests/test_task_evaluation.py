"""Answers of a task model, whoever shares the work."""

from dataclasses import replace

import pytest
import torch
from task_files import SHAPE, small_tokenizer
from tokenizers import Tokenizer

from cluster.console.errors import ConfigError
from trainers.model.backbone import build
from trainers.tasks.encoding import Encoder, framed
from trainers.tasks.evaluation import answers_to
from trainers.tasks.heads import AdaptConfig, TaskModel
from trainers.tasks.records import Example
from trainers.tasks.task import TaskConfig, TaskPrompt

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


def asked(*texts: str, target: str | None = None) -> list[Example]:
    return [Example(str(number), text, "", [], target) for number, text in enumerate(texts)]


def test_neither_the_truth_nor_other_prompts_change_an_answer():
    model, encoder = generator()
    question, long = "What is a module and what is it for?", "word " * 90
    (alone,) = answers(model, encoder, asked(question), max_new_tokens=60)
    assert len(alone) > 20
    for others in ([], [long], [long, "short"]):
        for target in ("yes", "a long and winding answer " * 10):
            found = answers(model, encoder, asked(question, *others, target=target), max_new_tokens=60)
            assert found[0] == alone, (others, target)


def test_a_prompt_that_leaves_no_room_for_the_answer_is_refused_unless_it_may_be_cut():
    _, encoder = generator()
    long = asked("word " * 90)
    (cut,) = encoder.ask(long, 60)
    assert len(cut.ids) == 128 - 60 and cut.truncated and cut.ids[0] == 0
    assert encoder.tokenizer.decode(cut.ids[-8:]).endswith("word \nA:")  # the end of a prompt asks
    with pytest.raises(ConfigError, match="longer than 68 tokens beside an answer of 60 "):
        replace(encoder, truncate=False).ask(long, 60)
