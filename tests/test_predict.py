"""Prediction: every record is answered once, as by the model alone, also where a job was cut off."""

import json

import pytest
import torch
from task_files import put_backbone, put_lines, sentences

from cluster.storage import open_store
from trainers import prediction
from trainers.export import load_exported
from trainers.prediction import Predictor, pieces_of, rows_of
from trainers.task import TaskConfig, TaskFiles
from trainers.task_encoding import Encoder, framed
from trainers.task_export import export_task_model
from trainers.task_model import AdaptConfig, TaskModel


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    exported = load_exported(open_store(put_backbone(folder / "backbone")))
    task = TaskConfig(
        name="t", kind="classification", labels=("bad", "good"), data=TaskFiles(uri="elsewhere.jsonl")
    )
    tokenizer, pad = framed(exported.tokenizer, exported.boundary_id, causal=True)
    encoder = Encoder(task, tokenizer, pad, 128, True, True)
    made = TaskModel(exported.model, task, AdaptConfig(dropout=0.0), seed=0).eval()
    export_task_model(made, encoder, exported.boundary_id, open_store(str(folder / "export")))
    return str(folder / "export"), made, encoder


def records(number):
    return [{"id": r["id"], "text": r["text"] + " é" * (i % 3)} for i, r in enumerate(sentences(number))]


def test_pieces_hold_every_line_exactly_once_wherever_they_are_cut(tmp_path, monkeypatch):
    uri = put_lines(tmp_path / "r.jsonl", wanted := records(57))
    for size in (1, 63, 64, 65, 1_000, 10**9):
        monkeypatch.setattr(prediction, "PIECE_BYTES", size)
        rows = [row for piece in pieces_of(uri) for _, row in rows_of(piece)]
        assert rows == wanted, size


def test_answers_are_the_models_own(model, tmp_path):
    folder, made, encoder = model
    uri = put_lines(tmp_path / "r.jsonl", [*records(30), {"id": "none", "text": ""}])
    predictor = Predictor(folder, str(tmp_path / "out"), rows_per_batch=7, threads=1)
    counts = [predictor.answer(piece) for piece in pieces_of(uri)]
    assert counts == [{"answered": 30, "refused": 1}]
    (output,) = open_store(str(tmp_path / "out")).list()
    lines = [json.loads(line) for line in (tmp_path / "out" / output.path).read_text().splitlines()]
    assert "text='' is not a text" in lines[-1]["error"]
    for line, record in zip(lines, records(30), strict=False):
        ids = torch.tensor([encoder.tokenizer.encode(record["text"]).ids])
        with torch.no_grad():
            sure = made(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids)).softmax(-1)[0]
        assert line["id"] == record["id"] and line["answer"] == encoder.task.labels[int(sure.argmax())]
        assert line["confidence"] == pytest.approx(float(sure.max()), abs=1e-4)


def test_a_job_that_was_cut_off_answers_only_what_is_left(model, tmp_path, ray_session, monkeypatch, capsys):
    import argparse
    from contextlib import nullcontext

    from trainers import predict

    folder, _, _ = model
    source = tmp_path / "in"
    source.mkdir()
    for part in range(3):
        put_lines(source / f"part-{part}.jsonl", records(20))
    options = argparse.Namespace(
        model=folder, input=str(source), output=str(tmp_path / "out"), workers=1, cpus_per_worker=0.5,
        gpus_per_worker=0.0, rows_per_batch=8, address="auto",
    )  # fmt: skip
    Predictor(folder, options.output, 8, 1).answer(pieces_of(options.input)[1])
    before = open_store(options.output).list()
    monkeypatch.setattr(predict, "ray_session", lambda cluster: nullcontext({}))  # that of the tests is up
    assert predict.predict(options) == {"answered": 40, "refused": 0}
    after = open_store(options.output).list()
    assert len(after) == 3 and before[0] in after
    assert predict.predict(options) == {"answered": 0, "refused": 0}
