"""A task model as a folder that transformers loads, and that this project reads back for `predict`.

A backbone that is Llama or BERT becomes …ForSequenceClassification, …ForTokenClassification, …ForQuestionAnswering or
LlamaForCausalLM, with equal logits. Shapes that transformers lacks, and poolings that those classes do not know, are
written under our own names and load in this project alone. The tokenizer frames texts itself. What transformers has no
place for (the task, a regression's scale) stands in task.json.
"""

import copy
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from cluster.config import from_dict, to_dict
from cluster.storage import Store
from data.tokens import SpecialIds, special_ids
from trainers.export import (
    encoder_tokenizer_config,
    export,
    files_of,
    index_of,
    load_exported,
    put_json,
    tokenizer_config,
    write_weights,
)
from trainers.export_folder import replacing
from trainers.formats import CONFIG, FORMATS, OWN, PRETRAINING, TASK, Format, format_of, weight_files
from trainers.model import build_empty
from trainers.shape import ModelConfig
from trainers.task import TaskConfig
from trainers.task_encoding import Encoder, framed
from trainers.task_model import PER_TEXT, AdaptConfig, TaskModel, natural_pooling

FAMILIES = {"llama": "Llama", "bert": "Bert"}
"""How transformers' classes for a `model_type` begin."""


def export_task_model(
    model: TaskModel, encoder: Encoder, boundary_id: int, target: Store, *, overwrite: bool = False
) -> None:
    """Write the model; config.json, or of a generating model task.json last, so that a cut export does not load.

    Raises ValueError where another's model is there, without `overwrite`.
    """
    tokenizer_json = encoder.tokenizer.to_str().encode()
    described = {
        "task": to_dict(encoder.task),
        "scale": encoder.scale,
        "max_tokens": encoder.max_tokens,
        "pooling": model.pooling,
    }
    shape: Any = model.backbone.config
    if model.kind == "generation":
        state: Iterable[tuple[str, Tensor]] = model.backbone.named_parameters()
        opening = opening_alone(encoder.tokenizer, boundary_id).to_str().encode()
        export(state, shape, opening, boundary_id, target, overwrite=overwrite)
        put_json(target, TASK, described)
        return
    ids = replace(special_ids(tokenizer_json), boundary=boundary_id)
    fields = task_config(model, encoder, ids)
    named = [(name, tensor.detach().cpu()) for name, tensor in named_parameters(model, fields["model_type"])]
    files = files_of(named, torch.float32)
    with replacing(target, [*set(files.values()), *index_of(files)], overwrite=overwrite):
        write_weights(named, files, target)
        target.put("tokenizer.json", tokenizer_json)
        put_json(target, "tokenizer_config.json", task_tokenizer_config(model, encoder, ids))
        put_json(target, TASK, described)
        put_json(target, CONFIG, fields)


def opening_alone(tokenizer: Tokenizer, boundary_id: int) -> Tokenizer:
    """A copy that opens texts and does not close them: what is asked is to be gone on with."""
    tokenizer, boundary = copy.deepcopy(tokenizer), tokenizer.id_to_token(boundary_id)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{boundary} $A", special_tokens=[(boundary, boundary_id)]
    )
    return tokenizer


def task_format(model: TaskModel) -> Format:
    """How the model is written; under our own names where transformers' class would answer otherwise."""
    if model.kind in PER_TEXT and model.pooling != natural_pooling(model.causal):
        return FORMATS[OWN]
    return format_of(model.backbone.config)  # type: ignore[arg-type]


def head_names(model_type: str, kind: str) -> dict[str, str]:
    """Modules of the head: what transformers calls each of ours."""
    answering = kind == "question_answering"
    if model_type == "llama":
        return {"head.out": "qa_outputs" if answering else "score"}
    if model_type == "bert":
        return {"head.out": "qa_outputs" if answering else "classifier", "head.pooler": "bert.pooler.dense"}
    return {"head.out": "head.out", "head.pooler": "head.pooler"}


def named_parameters(model: TaskModel, model_type: str) -> Iterator[tuple[str, Tensor]]:
    """The parameters under the names of the folder."""
    assert model.head is not None
    inner = model_type == "llama" and model.kind == "question_answering"
    body = model.backbone.named_parameters()
    for name, tensor in FORMATS[model_type].to(body, model.backbone.config):  # type: ignore[arg-type]
        yield name.replace("model.", "transformer.", 1) if inner else name, tensor
    theirs = head_names(model_type, model.kind)
    for name, tensor in model.head.named_parameters():
        module, _, part = f"head.{name}".rpartition(".")
        yield f"{theirs[module]}.{part}", tensor


def task_config(model: TaskModel, encoder: Encoder, ids: SpecialIds) -> dict[str, Any]:
    """config.json of the class for this kind."""
    shape: Any = model.backbone.config
    fields = task_format(model).fields(shape, ids, torch.float32)
    labels = encoder.task.labels or (("value",) if model.kind == "regression" else ("first", "last"))
    problem = {"regression": "regression"}.get(
        model.kind, "multi_label_classification" if model.multi_label else "single_label_classification"
    )
    task = {"token_classification": "TokenClassification", "question_answering": "QuestionAnswering"}.get(
        model.kind, "SequenceClassification"
    )
    family = FAMILIES.get(fields["model_type"])
    return fields | {
        **({"architectures": [f"{family}For{task}"]} if family else {}),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": problem,
        "pad_token_id": pad_beside(encoder, ids),
        "classifier_dropout": 0.0,
        PRETRAINING: {"task": encoder.task.name},
    }


def pad_beside(encoder: Encoder, ids: SpecialIds) -> int | None:
    """The padding's id; None where the tokenizer has none but the boundary. transformers' Llama finds the end of a text
    by it, and would take the closing boundary for padding: without one it refuses to pad."""
    return None if encoder.pad_id == ids.boundary else encoder.pad_id


def task_tokenizer_config(model: TaskModel, encoder: Encoder, ids: SpecialIds) -> dict[str, Any]:
    shape: Any = model.backbone.config
    if model.causal:
        assert ids.boundary is not None
        boundary = encoder.tokenizer.id_to_token(ids.boundary)
        assert boundary is not None, f"{ids.boundary} is not in the tokenizer"
        found = tokenizer_config(shape, boundary)
    else:
        found = encoder_tokenizer_config(shape, encoder.tokenizer, ids)
    pad = pad_beside(encoder, ids)
    named = {} if pad is None else {"pad_token": encoder.tokenizer.id_to_token(pad)}
    return {key: value for key, value in found.items() if key != "pad_token"} | {
        **named,
        "padding_side": "right",
    }


def load_task_model(source: Store) -> tuple[TaskModel, Encoder]:
    """Read an exported task model, for answers.

    Raises:
        FileNotFoundError: the folder holds none.
        ValueError: it holds one of another kind of model, or not all of its weights.
    """
    described = json.loads(source.read(TASK))
    task = from_dict(TaskConfig, described["task"])
    fields = json.loads(source.read("config.json"))
    adapt = AdaptConfig(pooling=described["pooling"])
    boundary_id = fields["bos_token_id"]
    if task.kind == "generation":
        exported = load_exported(source)
        model, tokenizer = TaskModel(exported.model, task, adapt, seed=0), exported.tokenizer
    else:
        tokenizer = Tokenizer.from_buffer(source.read("tokenizer.json"))
        model = TaskModel(build_empty(stored_shape(fields, source.uri)), task, adapt, seed=0)
        fill(model, fields["model_type"], source)
    tokenizer, pad_id = framed(tokenizer, boundary_id, model.causal)
    encoder = Encoder(
        task, tokenizer, pad_id, described["max_tokens"], True, model.causal, tuple(described["scale"])
    )
    return model.eval(), encoder


def stored_shape(fields: dict[str, Any], uri: str) -> ModelConfig:
    """The backbone's shape by config.json."""
    kind = fields.get("model_type")
    if kind not in FORMATS:
        raise ValueError(f"{uri}/config.json: model_type={kind!r} cannot be loaded, only {[*FORMATS]} can")
    if (
        kind == "bert"
    ):  # its reader knows the classes of pretraining; without a pair head, for ours takes its place
        fields = fields | {"architectures": ["BertForMaskedLM"]}
    return replace(FORMATS[kind].config(fields, uri), pair_head=False)


def fill(model: TaskModel, model_type: str, source: Store) -> None:
    """Copy the stored weights into the model; ValueError unless they are all that it has."""
    found: dict[str, Tensor] = {}
    for file in weight_files(source):
        found |= safetensors.torch.load(source.read(file))
    ours = {theirs: name for name, theirs in head_names(model_type, model.kind).items()}
    weights = {}
    for name in list(found):
        module, _, part = name.rpartition(".")
        if module in ours:
            weights[f"{ours[module]}.{part}"] = found.pop(name)
    body = {name.replace("transformer.", "model.", 1): tensor for name, tensor in found.items()}
    back = FORMATS[model_type].back(body, model.backbone.config)  # type: ignore[arg-type]
    weights |= {f"backbone.{name}": tensor for name, tensor in back}
    parameters = dict(model.named_parameters())
    if other := sorted(parameters.keys() ^ weights.keys()):
        raise ValueError(f"{source.uri}: {other[0]} is missing, or is no weight of kind={model.kind}")
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
