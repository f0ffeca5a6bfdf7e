"""Exported task models, in transformers' own classes and read back."""

import pytest
import torch
import transformers
from task_files import put_backbone
from tokenizers import Tokenizer

from cluster.storage import open_store
from trainers.export import load_exported
from trainers.task import TaskColumns, TaskConfig, TaskFiles
from trainers.task_encoding import Encoder, framed
from trainers.task_export import export_task_model, load_task_model
from trainers.task_model import AdaptConfig, TaskModel

CLASSES = {
    "classification": transformers.AutoModelForSequenceClassification,
    "pairs": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "token_classification": transformers.AutoModelForTokenClassification,
    "question_answering": transformers.AutoModelForQuestionAnswering,
    "generation": transformers.AutoModelForCausalLM,
}
TEXTS = ["one two three", "a longer text than the first one", "short"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return put_backbone(tmp_path_factory.mktemp("export"))


def made(backbone: str, kind: str) -> tuple[TaskModel, Encoder, int]:
    exported = load_exported(open_store(backbone))
    task = TaskConfig(
        name="t",
        kind=kind,
        labels=("a", "b", "c") if kind in ("classification", "pairs", "token_classification") else (),
        columns=TaskColumns(pair="pair") if kind in ("pairs", "question_answering") else TaskColumns(),
        data=TaskFiles(uri="elsewhere.jsonl"),
    )
    tokenizer, pad = framed(exported.tokenizer, exported.boundary_id, causal=True)
    encoder = Encoder(task, tokenizer, pad, 128, False, True, scale=(3.0, 2.0))
    model = TaskModel(exported.model, task, AdaptConfig(dropout=0.0), seed=0).eval()
    if model.head is not None:
        torch.nn.init.normal_(model.head.out.weight)
    return model, encoder, exported.boundary_id


@pytest.mark.parametrize("kind", CLASSES)
def test_scores_are_transformers_for_each_kind(backbone, kind, tmp_path):
    model, encoder, boundary_id = made(backbone, kind)
    export_task_model(model, encoder, boundary_id, open_store(str(tmp_path)))
    theirs = CLASSES[kind].from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    mask = batch["attention_mask"].bool()
    opens, closes = batch["input_ids"][0, 0], batch["input_ids"][1, batch["attention_mask"][1].sum() - 1]
    assert opens == boundary_id and (closes == boundary_id) == (kind != "generation")
    with torch.no_grad():
        found = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        if kind == "generation":
            backbone_model = model.backbone
            ours, expected = (
                backbone_model.logits(backbone_model(batch["input_ids"]))[mask],
                found.logits[mask],
            )
        elif kind == "question_answering":
            ours = model(batch["input_ids"], mask, torch.zeros_like(batch["input_ids"]))[mask]
            expected = torch.stack([found.start_logits, found.end_logits], -1)[mask]
        else:
            ours = model(batch["input_ids"], mask, torch.zeros_like(batch["input_ids"]))
            expected = found.logits.squeeze(-1) if kind == "regression" else found.logits
            if kind == "token_classification":
                ours, expected = ours[mask], expected[mask]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CLASSES)
def test_what_is_read_back_is_what_was_written(backbone, kind, tmp_path):
    model, encoder, boundary_id = made(backbone, kind)
    store = open_store(str(tmp_path))
    export_task_model(model, encoder, boundary_id, store)
    again, encoder_again = load_task_model(store)
    before, after = dict(model.named_parameters()), dict(again.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (encoder_again.task, encoder_again.scale) == (encoder.task, encoder.scale)
    assert encoder_again.pad_id == encoder.pad_id
    plain = Tokenizer.from_str(encoder.tokenizer.to_str())
    assert plain.encode("one two").ids == encoder_again.tokenizer.encode("one two").ids
