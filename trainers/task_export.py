"""A task model as a folder that transformers loads, and that this project reads back for `predict`.

Decoders become LlamaForSequenceClassification, …ForTokenClassification, …ForQuestionAnswering or …ForCausalLM, with
equal logits. The tokenizer frames texts itself. What transformers has no place for (the task, a regression's scale)
stands in task.json.
"""

import copy
import json
from collections.abc import Iterable, Iterator
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from cluster.config import from_dict, to_dict
from cluster.storage import Store
from trainers.export import export, load_exported, put_json, tokenizer_config, write_weights
from trainers.formats import weight_files
from trainers.llama import config_from_llama, from_llama, llama_config, to_llama
from trainers.model import build_empty
from trainers.task import TaskConfig
from trainers.task_encoding import Encoder, framed
from trainers.task_model import AdaptConfig, TaskModel

TASK = "task.json"
ARCHITECTURES = {
    "classification": "LlamaForSequenceClassification",
    "pairs": "LlamaForSequenceClassification",
    "regression": "LlamaForSequenceClassification",
    "token_classification": "LlamaForTokenClassification",
    "question_answering": "LlamaForQuestionAnswering",
}


def export_task_model(model: TaskModel, encoder: Encoder, boundary_id: int, target: Store) -> None:
    """Write the model; config.json last, so that a cut export does not load."""
    tokenizer_json = encoder.tokenizer.to_str().encode()
    described = {
        "task": to_dict(encoder.task),
        "scale": encoder.scale,
        "max_tokens": encoder.max_tokens,
        "pooling": model.pooling,
    }
    if model.kind == "generation":
        state: Iterable[tuple[str, Tensor]] = model.backbone.named_parameters()
        opening = opening_alone(encoder.tokenizer, boundary_id).to_str().encode()
        export(state, model.backbone.config, opening, boundary_id, target)  # type: ignore[arg-type]
        put_json(target, TASK, described)
        return
    target.delete("config.json")
    write_weights(((name, tensor.detach().cpu()) for name, tensor in named_as_llama(model)), target)
    target.put("tokenizer.json", tokenizer_json)
    boundary = encoder.tokenizer.id_to_token(boundary_id)
    assert boundary is not None, f"{boundary_id} is not in the tokenizer"
    config: Any = model.backbone.config
    put_json(
        target,
        "tokenizer_config.json",
        tokenizer_config(config, boundary)
        | {"pad_token": encoder.tokenizer.id_to_token(encoder.pad_id), "padding_side": "right"},
    )
    put_json(target, TASK, described)
    put_json(target, "config.json", task_config(model, encoder, boundary_id))


def opening_alone(tokenizer: Tokenizer, boundary_id: int) -> Tokenizer:
    """A copy that opens texts and does not close them: what is asked is to be gone on with."""
    tokenizer, boundary = copy.deepcopy(tokenizer), tokenizer.id_to_token(boundary_id)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{boundary} $A", special_tokens=[(boundary, boundary_id)]
    )
    return tokenizer


def named_as_llama(model: TaskModel) -> Iterator[tuple[str, Tensor]]:
    """The parameters under the names of transformers' classes."""
    assert model.head is not None
    answering = model.kind == "question_answering"
    body = model.backbone.named_parameters()
    for name, tensor in to_llama(body, model.backbone.config):  # type: ignore[arg-type]
        yield name.replace("model.", "transformer.", 1) if answering else name, tensor
    for name, tensor in model.head.out.named_parameters():
        yield f"{'qa_outputs' if answering else 'score'}.{name}", tensor


def task_config(model: TaskModel, encoder: Encoder, boundary_id: int) -> dict[str, Any]:
    """config.json of the class for this kind."""
    shape: Any = model.backbone.config
    labels = encoder.task.labels or (("value",) if model.kind == "regression" else ("first", "last"))
    problem = {"regression": "regression"}.get(
        model.kind, "multi_label_classification" if model.multi_label else "single_label_classification"
    )
    return llama_config(shape, boundary_id, torch.float32) | {
        "architectures": [ARCHITECTURES[model.kind]],
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": problem,
        "pad_token_id": encoder.pad_id,
        "classifier_dropout": 0.0,
    }


def load_task_model(source: Store) -> tuple[TaskModel, Encoder]:
    """Read an exported task model, for answers.

    Raises:
        FileNotFoundError: the folder holds none.
    """
    described = json.loads(source.read(TASK))
    task = from_dict(TaskConfig, described["task"])
    fields = json.loads(source.read("config.json"))
    config = config_from_llama(fields, source.uri)
    adapt = AdaptConfig(pooling=described["pooling"])
    boundary_id = fields["bos_token_id"]
    if task.kind == "generation":
        exported = load_exported(source)
        model, tokenizer = TaskModel(exported.model, task, adapt, seed=0), exported.tokenizer
    else:
        tokenizer = Tokenizer.from_buffer(source.read("tokenizer.json"))
        model = TaskModel(build_empty(config), task, adapt, seed=0)
        fill(model, source)
    tokenizer, pad_id = framed(tokenizer, boundary_id, model.causal)
    encoder = Encoder(
        task, tokenizer, pad_id, described["max_tokens"], True, model.causal, tuple(described["scale"])
    )
    return model.eval(), encoder


def fill(model: TaskModel, source: Store) -> None:
    """Copy the stored weights into the model; KeyError for one that it does not have."""
    found: dict[str, Tensor] = {}
    for file in weight_files(source):
        found |= safetensors.torch.load(source.read(file))
    head = {name: found.pop(name) for name in list(found) if name.startswith(("score.", "qa_outputs."))}
    body = {name.replace("transformer.", "model.", 1): tensor for name, tensor in found.items()}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in from_llama(body, model.backbone.config):  # type: ignore[arg-type]
            parameters[f"backbone.{name}"].copy_(tensor)
        for name, tensor in head.items():
            parameters[f"head.out.{name.partition('.')[2]}"].copy_(tensor)
