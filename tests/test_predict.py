"""Prediction: every record is answered once, as by the model alone, also where a job was cut off."""

import argparse
import gzip
import json
import shutil
from contextlib import nullcontext

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from task_files import put_backbone, put_lines, sentences

from cluster.config import ConfigError
from cluster.storage import open_store
from trainers import predict, prediction, prediction_rows
from trainers.export import load_exported
from trainers.prediction import Counts, Predictor, finished_pieces
from trainers.prediction_rows import pieces_of, rows_of
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


def answered(predictor, piece):
    return sum(predictor.answer(piece), Counts())


def output_lines(store):
    """Every line of the answers, in the order of the files' names."""
    return [
        json.loads(line)
        for info in store.list()
        if info.path.endswith(".jsonl")
        for line in store.read(info.path).decode().splitlines()
    ]


def test_pieces_hold_every_line_exactly_once_wherever_they_are_cut(tmp_path, monkeypatch):
    uri = put_lines(tmp_path / "r.jsonl", wanted := records(57))
    for size in (1, 63, 64, 65, 1_000, 10**9):
        monkeypatch.setattr(prediction_rows, "PIECE_BYTES", size)
        rows = [row for piece in pieces_of(uri) for _, row in rows_of(piece)]
        assert rows == wanted, size


def put_as(path, rows):
    """The records in the format that the file's name says."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":
        path.write_bytes(pa.compress(lines, "zstd", asbytes=True))
    elif path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        pq.write_table(table, path, row_group_size=20)
    return str(path)


@pytest.mark.parametrize("name", ["r.jsonl.gz", "r.jsonl.zst", "r.csv", "r.parquet"])
def test_every_format_is_answered_part_by_part_and_goes_on_at_the_next_part(
    model, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(prediction, "PART_ROWS", 8)
    uri = put_as(tmp_path / name, records(30))
    output = open_store(str(tmp_path / "out"))
    predictor = Predictor(model[0], output.uri, rows_per_batch=7, threads=1)
    first, *rest = pieces_of(uri)
    parts = predictor.answer(first)
    assert next(parts) == Counts(8, 0)
    parts.close()  # as a job that was killed
    assert not finished_pieces(output)
    counts = sum((answered(predictor, piece) for piece in [first, *rest]), Counts())
    assert counts == Counts(30 - 8, 0)
    assert sum(finished_pieces(output).values(), Counts()) == Counts(30, 0)
    assert sorted(line["id"] for line in output_lines(output)) == sorted(r["id"] for r in records(30))


def test_broken_records_are_answered_with_their_errors_and_the_others_all_the_same(model, tmp_path):
    good = [json.dumps(r) for r in records(4)]
    broken = ['{"text": "cut', "[1, 2]", '{"text": 3}', '{"id": "half", "text": "\\ud800"}']
    content = "\n".join([*good[:2], *broken, *good[2:]]).encode() + b'\n{"text": "\xff"}\n'
    (tmp_path / "r.jsonl").write_bytes(content)
    (tmp_path / "r.csv").write_bytes(b"id,text\na,fine film\nb,too,many\nc,\xff\nd,dull film\n")
    for name, refused, kept in (("r.jsonl", 5, 4), ("r.csv", 2, 2)):
        output = open_store(str(tmp_path / f"out-{name}"))
        predictor = Predictor(model[0], output.uri, 4, 1)
        [piece] = pieces_of(str(tmp_path / name))
        assert answered(predictor, piece) == Counts(kept, refused)
        errors = [line["error"] for line in output_lines(output) if "error" in line]
        assert len(errors) == refused and any("UTF-8" in e or "utf-8" in e for e in errors)


def test_answers_are_the_models_own(model, tmp_path):
    folder, made, encoder = model
    uri = put_lines(tmp_path / "r.jsonl", [*records(30), {"id": "none", "text": ""}])
    predictor = Predictor(folder, str(tmp_path / "out"), rows_per_batch=7, threads=1)
    assert [answered(predictor, piece) for piece in pieces_of(uri)] == [Counts(30, 1)]
    lines = output_lines(open_store(str(tmp_path / "out")))
    assert "text='' is not a text" in lines[-1]["error"]
    for line, record in zip(lines, records(30), strict=False):
        ids = torch.tensor([encoder.tokenizer.encode(record["text"]).ids])
        with torch.no_grad():
            sure = made(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids)).softmax(-1)[0]
        assert line["id"] == record["id"] and line["answer"] == encoder.task.labels[int(sure.argmax())]
        assert line["confidence"] == pytest.approx(float(sure.max()), abs=1e-4)


def test_a_record_that_was_cut_is_counted_and_marked(model, tmp_path):
    uri = put_lines(tmp_path / "r.jsonl", [{"text": "short"}, {"text": "a very long film " * 200}])
    predictor = Predictor(model[0], str(tmp_path / "out"), 4, 1)
    assert answered(predictor, pieces_of(uri)[0]) == Counts(2, 0, truncated=1)
    lines = output_lines(open_store(str(tmp_path / "out")))
    assert [line.get("truncated") for line in lines] == [None, True]


def test_a_prompt_that_was_cut_for_the_answer_it_asks_for_is_counted_and_marked(tmp_path):
    exported = load_exported(open_store(put_backbone(tmp_path / "backbone")))
    task = TaskConfig(name="t", kind="generation", data=TaskFiles(uri="elsewhere.jsonl"))
    tokenizer, pad = framed(exported.tokenizer, exported.boundary_id, causal=True)
    made = TaskModel(exported.model, task, AdaptConfig(dropout=0.0), seed=0).eval()
    encoder = Encoder(task, tokenizer, pad, 128, True, True)
    export_task_model(made, encoder, exported.boundary_id, open_store(str(tmp_path / "export")))
    text = "a film " * 28
    length = len(tokenizer.encode(text.rstrip()).ids) - 1  # without the boundary that would close it
    assert 128 - 8 >= length > 128 - 60  # it fits, beside a short answer and not beside a long one
    uri = put_lines(tmp_path / "r.jsonl", [{"text": text}])
    for new_tokens, cut in ((8, 0), (60, 1)):
        output = str(tmp_path / f"out-{new_tokens}")
        predictor = Predictor(str(tmp_path / "export"), output, 4, 1, new_tokens)
        assert answered(predictor, pieces_of(uri)[0]) == Counts(1, 0, truncated=cut)


def options_of(folder, source, output, **changes):
    return argparse.Namespace(
        **(
            {"model": folder, "input": str(source), "output": str(output), "workers": 1}
            | {"cpus_per_worker": 0.5, "gpus_per_worker": 0.0, "rows_per_batch": 8, "max_new_tokens": 64}
            | {"address": "auto"}
            | changes
        )
    )


def test_a_job_that_was_cut_off_answers_only_what_is_left(model, tmp_path, ray_session, monkeypatch, capsys):
    folder, _, _ = model
    source = tmp_path / "in"
    source.mkdir()
    for part in range(3):
        put_lines(source / f"part-{part}.jsonl", records(20))
    options = options_of(folder, source, tmp_path / "out")
    assert answered(Predictor(folder, options.output, 8, 1), pieces_of(options.input)[1]) == Counts(20, 0)
    before = open_store(options.output).list("part-")
    monkeypatch.setattr(
        predict, "ray_session", lambda cluster: nullcontext({"CPU": 2.0})
    )  # that of the tests is up
    assert predict.predict(options) == Counts(60, 0)
    assert "3 of 3 pieces" not in (told := capsys.readouterr().out) and "2 of 2 pieces, 40 records" in told
    after = open_store(options.output).list("part-")
    assert len(after) == 3 and before[0] in after
    assert predict.predict(options) == Counts(60, 0)
    assert "pieces, 3 of them answered before" in capsys.readouterr().out


def test_more_models_than_the_cluster_has_room_for_are_refused(model, tmp_path, monkeypatch):
    uri = put_lines(tmp_path / "r.jsonl", records(3))
    monkeypatch.setattr(predict, "ray_session", lambda cluster: nullcontext({"CPU": 2.0}))
    options = options_of(model[0], uri, tmp_path / "out", cpus_per_worker=3.0)
    with pytest.raises(
        ConfigError, match="--workers=1 x --cpus-per-worker=3 = 3 CPUs, but the cluster has 2"
    ):
        predict.predict(options)


def test_answers_of_another_model_or_of_other_records_are_refused(model, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    put_lines(source / "a.jsonl", records(3))
    output = open_store(str(tmp_path / "out"))

    def pin(folder=model[0], **changes):
        predict.pin(output, open_store(folder), options_of(folder, source, tmp_path / "out", **changes))

    pin()
    put_lines(source / "b.jsonl", records(3))
    pin()  # files may be added
    other = tmp_path / "other"
    shutil.copytree(model[0], other)
    (other / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="model is .*choose another folder"):
        pin(str(other))
    with pytest.raises(ConfigError, match="max_new_tokens is 8 now"):
        pin(max_new_tokens=8)
    put_lines(source / "a.jsonl", records(4))
    with pytest.raises(ConfigError, match="1 input files have changed or gone since, the first: a.jsonl"):
        pin()


def test_a_missing_column_is_one_error_before_anything_is_started(model, tmp_path, monkeypatch):
    uri = put_lines(tmp_path / "r.jsonl", [{"texts": "a film"}])
    monkeypatch.setattr(predict, "ray_session", lambda cluster: pytest.fail("started"))
    with pytest.raises(ConfigError, match="there is no column 'text' .*nearest: texts"):
        predict.predict(options_of(model[0], uri, tmp_path / "out"))
