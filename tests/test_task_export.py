"""Exported task models, in transformers' own classes and read back, of decoders and of both kinds of encoder."""

import json
from typing import Any

import pytest
import torch
import transformers
from task_files import BACKBONES, put_backbone
from tokenizers import Tokenizer

from cluster.storage.uris import open_store
from trainers.exported.folder import load_exported
from trainers.exported.formats import OWN
from trainers.tasks.encoding import Encoder, framed
from trainers.tasks.export import export_task_model, load_task_model
from trainers.tasks.heads import AdaptConfig, TaskModel
from trainers.tasks.task import TaskColumns, TaskConfig, TaskFiles

CLASSES = {
    "classification": transformers.AutoModelForSequenceClassification,
    "pairs": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "token_classification": transformers.AutoModelForTokenClassification,
    "question_answering": transformers.AutoModelForQuestionAnswering,
    "generation": transformers.AutoModelForCausalLM,
}
EVERY = [(name, kind) for name in BACKBONES for kind in CLASSES if name == "causal" or kind != "generation"]
TEXTS = ["one two three", "a longer text than the first one", "short"]
PAIRS = [("one two", "three"), ("a longer text than", "the first one"), ("short", "text")]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    return {name: put_backbone(folder / name, shape) for name, shape in BACKBONES.items()}


def made(backbone: str, kind: str, **adapt: Any) -> tuple[TaskModel, Encoder, int]:
    exported = load_exported(open_store(backbone))
    task = TaskConfig(
        name="t",
        kind=kind,
        labels=("a", "b", "c") if kind in ("classification", "pairs", "token_classification") else (),
        columns=TaskColumns(pair="pair") if kind in ("pairs", "question_answering") else TaskColumns(),
        data=TaskFiles(uri="elsewhere.jsonl"),
    )
    model = TaskModel(exported.model, task, AdaptConfig(**{"dropout": 0.0} | adapt), seed=0).eval()
    tokenizer, pad = framed(exported.tokenizer, exported.boundary_id, model.causal)
    encoder = Encoder(task, tokenizer, pad, 128, False, model.causal, scale=(3.0, 2.0))
    if model.head is not None:
        torch.nn.init.normal_(model.head.out.weight)
    return model, encoder, exported.boundary_id


@torch.no_grad()
def both_scores(model: TaskModel, folder: Any, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of our model and of transformers' for the same folder, on texts that its own tokenizer takes apart."""
    theirs = CLASSES[kind].from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = PAIRS if kind in ("pairs", "question_answering") else TEXTS
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    mask = batch["attention_mask"].bool()
    types = batch.get("token_type_ids", torch.zeros_like(batch["input_ids"]))
    assert model.causal or texts is not PAIRS or types.any()
    found = theirs(
        **{key: value for key, value in batch.items() if model.causal is False or "type" not in key}
    )
    if kind == "generation":
        backbone: Any = model.backbone
        return backbone.logits(backbone(batch["input_ids"]))[mask], found.logits[mask]
    ours = model(batch["input_ids"], mask, types)
    if kind == "question_answering":
        return ours[mask], torch.stack([found.start_logits, found.end_logits], -1)[mask]
    if kind == "token_classification":
        return ours[mask], found.logits[mask]
    return ours, found.logits.squeeze(-1) if kind == "regression" else found.logits


@pytest.mark.parametrize(("name", "kind"), [each for each in EVERY if each[0] != "rotary"])
def test_scores_are_transformers_for_each_kind(backbones, name, kind, tmp_path):
    model, encoder, boundary_id = made(backbones[name], kind)
    export_task_model(model, encoder, boundary_id, open_store(str(tmp_path)))
    ours, theirs = both_scores(model, tmp_path, kind)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_the_tokenizer_frames_a_text_as_the_model_learnt_it(backbones, name, kind, tmp_path):
    model, encoder, boundary_id = made(backbones[name], kind)
    export_task_model(model, encoder, boundary_id, open_store(str(tmp_path)))
    ids = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)(TEXTS[1])["input_ids"]
    opening = encoder.tokenizer.encode(TEXTS[1]).ids
    assert ids == (opening[:-1] if kind == "generation" else opening)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_what_is_read_back_is_what_was_written(backbones, name, kind, tmp_path):
    model, encoder, boundary_id = made(backbones[name], kind)
    store = open_store(str(tmp_path))
    export_task_model(model, encoder, boundary_id, store)
    again, encoder_again = load_task_model(store)
    before, after = dict(model.named_parameters()), dict(again.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (encoder_again.task, encoder_again.scale) == (encoder.task, encoder.scale)
    assert (encoder_again.pad_id, encoder_again.causal) == (encoder.pad_id, encoder.causal)
    assert again.pooling == model.pooling
    plain = Tokenizer.from_str(encoder.tokenizer.to_str())
    assert plain.encode("one two").ids == encoder_again.tokenizer.encode("one two").ids


def test_a_pooling_that_transformers_lacks_is_not_written_as_its_class(backbones, tmp_path):
    model, encoder, boundary_id = made(backbones["bert"], "classification", pooling="mean")
    store = open_store(str(tmp_path))
    export_task_model(model, encoder, boundary_id, store)
    assert json.loads(store.read("config.json"))["model_type"] == OWN
    again, _ = load_task_model(store)
    ids = torch.tensor([encoder.tokenizer.encode(TEXTS[0]).ids])
    inputs = ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids)
    assert torch.equal(model(*inputs), again(*inputs))


def test_a_text_ends_where_it_ends_though_the_tokenizer_has_no_padding(tmp_path):
    backbone = open_store(put_backbone(tmp_path / "backbone"))
    # As GPT-2's and Llama's: the boundary is the only special token.
    serialised = json.loads(backbone.read("tokenizer.json"))
    serialised["added_tokens"] = [each for each in serialised["added_tokens"] if each["id"] == 0]
    renamed = {
        f"<{k}>" if k.startswith("[") and len(k) > 1 else k: v
        for k, v in serialised["model"]["vocab"].items()
    }
    serialised["model"]["vocab"] = renamed
    backbone.put("tokenizer.json", json.dumps(serialised).encode())
    fields = json.loads(backbone.read("config.json"))
    fields.pop("pretraining", None)  # as in a folder of others, which names no tokenizer
    backbone.put("config.json", json.dumps(fields).encode())
    model, encoder, boundary_id = made(backbone.uri, "classification")
    export_task_model(model, encoder, boundary_id, open_store(str(tmp_path / "export")))
    theirs = CLASSES["classification"].from_pretrained(tmp_path / "export")
    ids = torch.tensor([encoder.tokenizer.encode(TEXTS[0]).ids])
    with torch.no_grad():
        ours = model(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids))
        torch.testing.assert_close(ours, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_a_folder_that_lacks_a_weight_is_refused(backbones, tmp_path):
    from safetensors.torch import load, save

    model, encoder, boundary_id = made(backbones["bert"], "classification")
    store = open_store(str(tmp_path))
    export_task_model(model, encoder, boundary_id, store)
    weights = load(store.read("model.safetensors"))
    del weights["bert.pooler.dense.bias"]
    store.put("model.safetensors", save(weights))
    with pytest.raises(ValueError, match=r"head\.pooler\.bias is missing"):
        load_task_model(store)


def test_a_pretrained_pooler_goes_on_in_the_head(backbones):
    for kind, pooled in (("classification", True), ("token_classification", False)):
        pretrained = load_exported(open_store(backbones["bert"])).model.pair_head.pooler
        model, _, _ = made(backbones["bert"], kind)
        assert (model.head.pooler is not None) == pooled
        if pooled:
            assert torch.equal(model.head.pooler.weight, pretrained.weight)
