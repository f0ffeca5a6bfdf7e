"""A task model as a folder that transformers loads, and that this project reads back for `predict`.

A backbone that is Llama or BERT becomes …ForSequenceClassification, …ForTokenClassification, …ForQuestionAnswering or
LlamaForCausalLM, with equal logits. Shapes that transformers lacks, and poolings that those classes do not know, are
written under our own names and load in this project alone. The tokenizer frames texts itself. What transformers has no
place for (the task, a regression's scale) stands in task.json.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from cluster.configuration.config import from_dict, to_dict
from cluster.storage.uris import Store
from data.tokens.tokenizer import SpecialIds, special_ids
from data.tokens.tokenizer_file import parse_tokenizer
from trainers.exported.folder import (
    encoder_tokenizer_config,
    export,
    files_of,
    index_of,
    load_exported,
    put_json,
    tokenizer_config,
    write_weights,
)
from trainers.exported.formats import (
    CONFIG,
    FORMATS,
    OWN,
    PRETRAINING,
    TASK,
    Format,
    boundary_of,
    fits_tokenizer,
    format_of,
    read_headers,
    read_stored,
    stored_shape,
)
from trainers.exported.model_files import Fields, ModelFolderError, read_json, read_weights, weight_files
from trainers.exported.replacing import replacing
from trainers.model.backbone import Backbone, build_empty
from trainers.model.shape import ModelConfig
from trainers.tasks.encoding import Encoder, framed
from trainers.tasks.heads import PER_TEXT, AdaptConfig, TaskModel, natural_pooling
from trainers.tasks.task import TaskConfig

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


@dataclass(frozen=True)
class StoredTask:
    """A fine-tuned model in a folder, its weights not read yet."""

    source: Store
    fields: Mapping[str, Any]
    """The content of config.json."""
    shape: ModelConfig
    task: TaskConfig
    adapt: AdaptConfig
    """How a text's hidden states are pooled."""
    max_tokens: int
    scale: tuple[float, float]
    tokenizer: Tokenizer
    boundary_id: int


def read_stored_task(source: Store) -> StoredTask:
    """Read what a folder says of its model, and hold names and shapes of its weights against that.

    Raises:
        FileNotFoundError: it holds none.
        ModelFolderError: it holds one of another kind of model, or not all of its weights, or is damaged.
    """
    described, fields = read_json(source, TASK), read_json(source, CONFIG)
    shape = task_shape(fields, source.uri)
    tokenizer_json, origin = source.read("tokenizer.json"), f"{source.uri}/tokenizer.json"
    ids, at = special_ids(tokenizer_json, origin=origin), f"{source.uri}/{TASK}"
    try:
        task = from_dict(TaskConfig, Fields(described, at).section("task").values)
        adapt = from_dict(AdaptConfig, {"pooling": described.get("pooling")})
    except ValueError as wrong:
        raise ModelFolderError(f"{at}: {wrong}".replace("\n", "; ")) from None
    scale = described.get("scale")
    if not isinstance(scale, list) or len(scale) != 2:
        raise ModelFolderError(f"{at}: scale={scale!r} is no list of two numbers")
    if not all(isinstance(each, (int, float)) and math.isfinite(each) for each in scale) or not scale[1] > 0:
        raise ModelFolderError(f"{at}: scale={scale!r} is no mean and deviation")
    max_tokens = Fields(described, at).whole("max_tokens")
    if max_tokens > shape.max_positions:
        raise ModelFolderError(
            f"{at}: max_tokens={max_tokens:,} is more than its {shape.max_positions:,} positions"
        )
    if task.kind == "generation":
        read_stored(source)
    else:
        headers = read_headers(source, shape)
        with torch.device("meta"):
            model = TaskModel(Backbone(shape), task, adapt, seed=0)
        task_weights(model, fields["model_type"], headers, source.uri)
    tokenizer = parse_tokenizer(tokenizer_json, origin)
    boundary_id = boundary_of(fields, ids, shape.vocab_size, source.uri)
    fits_tokenizer(tokenizer, fields, shape.vocab_size, boundary_id, source.uri)
    return StoredTask(
        source=source,
        fields=fields,
        shape=shape,
        task=task,
        adapt=adapt,
        max_tokens=max_tokens,
        scale=(scale[0], scale[1]),
        tokenizer=tokenizer,
        boundary_id=boundary_id,
    )


def load_task_model(source: Store) -> tuple[TaskModel, Encoder]:
    """Read an exported task model, for answers; raises as `read_stored_task`."""
    stored = read_stored_task(source)
    if stored.task.kind == "generation":
        exported = load_exported(source)
        model = TaskModel(exported.model, stored.task, stored.adapt, seed=0)
    else:
        model = TaskModel(build_empty(stored.shape), stored.task, stored.adapt, seed=0)
        found: dict[str, Tensor] = {}
        for file in weight_files(source):
            found |= read_weights(source, file)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in task_weights(model, stored.fields["model_type"], found, source.uri).items():
                parameters[name].copy_(tensor)
    tokenizer, pad_id = framed(stored.tokenizer, stored.boundary_id, model.causal)
    encoder = Encoder(stored.task, tokenizer, pad_id, stored.max_tokens, True, model.causal, stored.scale)
    return model.eval(), encoder


def task_shape(fields: Mapping[str, Any], uri: str) -> ModelConfig:
    """The backbone's shape by config.json."""
    if fields.get("model_type") == "bert":
        # Its reader knows the classes of pretraining; without a pair head, for ours takes its place.
        fields = {**fields, "architectures": ["BertForMaskedLM"]}
    return replace(stored_shape(fields, uri), pair_head=False)


def task_weights(
    model: TaskModel, model_type: str, found: Mapping[str, Tensor], uri: str
) -> dict[str, Tensor]:
    """A folder's tensors by the names of the model's parameters; ModelFolderError unless they are all that it has."""
    ours = {theirs: name for name, theirs in head_names(model_type, model.kind).items()}
    weights, body = {}, {}
    for name, tensor in found.items():
        module, _, part = name.rpartition(".")
        if module in ours:
            weights[f"{ours[module]}.{part}"] = tensor
        else:
            body[name.replace("transformer.", "model.", 1)] = tensor
    try:
        back = FORMATS[model_type].back(body, model.backbone.config)  # type: ignore[arg-type]
        weights |= {f"backbone.{name}": tensor for name, tensor in back}
    except (ValueError, RuntimeError) as other:  # torch's, where shapes cannot be joined
        raise ModelFolderError(f"{uri}: {other}") from None
    parameters = dict(model.named_parameters())
    if other_names := sorted(parameters.keys() ^ weights.keys()):
        raise ModelFolderError(f"{uri}: {other_names[0]} is missing, or is no weight of kind={model.kind}")
    for name, tensor in weights.items():
        if tensor.shape != parameters[name].shape or not tensor.dtype.is_floating_point:
            raise ModelFolderError(
                f"{uri}: {name} is of shape {tuple(tensor.shape)} and {tensor.dtype}; by {CONFIG} and {TASK} it is of "
                f"{tuple(parameters[name].shape)} and floating-point numbers"
            )
    return weights
