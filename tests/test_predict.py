"""Prediction: every record is answered once, as by the model alone, also where a job was cut off."""

import argparse
import gzip
import hashlib
import json
import os
import shutil
import sys
import time
from contextlib import nullcontext

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from task_files import BACKBONES, put_backbone, put_lines, sentences

from cluster.configuration.config import run_entry
from cluster.console.errors import ConfigError
from cluster.sessions.session import PROJECT
from cluster.storage.store import former_version
from cluster.storage.uris import open_store
from tests.small_run import kill_tree, start_command
from trainers import predict
from trainers.exported.folder import load_exported
from trainers.exported.model_digest import content_digest, listing_digest
from trainers.exported.model_files import ModelFolderError
from trainers.prediction import job as prediction_job
from trainers.prediction import pieces as prediction
from trainers.prediction import rows as prediction_rows
from trainers.prediction.pieces import Counts, Predictor, finished_pieces
from trainers.prediction.rows import pieces_of, rows_of
from trainers.recovery.lease import lease
from trainers.tasks.encoding import Encoder, framed
from trainers.tasks.export import export_task_model
from trainers.tasks.heads import AdaptConfig, TaskModel
from trainers.tasks.task import TaskColumns, TaskConfig, TaskFiles


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
        rows = [row for piece in pieces_of(uri) for _, row in rows_of(piece, ("id", "text"))]
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


def test_no_odd_record_or_file_ends_a_job(model, tmp_path):
    nested = '{"id": "n", "text": ' + "[" * 900 + "]" * 900 + "}"
    content = [json.dumps(records(2)[0]), "[" * 100_000, nested, json.dumps(records(2)[1])]
    source, output = tmp_path / "in", open_store(str(tmp_path / "out"))
    source.mkdir()
    (source / "r.jsonl").write_text("\n".join(content))
    (source / "junk.parquet").write_bytes(b"PAR1")
    (source / "junk.jsonl.zst").write_bytes(b"junk")
    (source / "twice.csv").write_bytes(b"text,text\na,b\n")
    table = pa.table({"text": ["fine"], "when": pa.array([2**60], pa.timestamp("ms"))})
    pq.write_table(table, source / "when.parquet")
    predictor = Predictor(model[0], output.uri, 4, 1)
    assert sum((answered(predictor, piece) for piece in pieces_of(str(source))), Counts()) == Counts(3, 5)
    errors = {
        line["place"].partition(":")[0]: line["error"] for line in output_lines(output) if "error" in line
    }
    assert errors["twice.csv"].startswith("has the column 'text' twice")
    assert "junk.parquet" in errors and "junk.jsonl.zst" in errors
    assert all(len(error) <= 300 for error in errors.values())


def test_parts_of_long_records_are_short_and_those_that_were_cut_otherwise_are_gone_on_from(
    model, tmp_path, monkeypatch
):
    uri = put_lines(tmp_path / "r.jsonl", wanted := records(30))
    predictor = Predictor(model[0], str(tmp_path / "out"), rows_per_batch=7, threads=1)
    [piece] = pieces_of(uri)
    monkeypatch.setattr(prediction, "PART_ROWS", 8)  # as a version that did not look at bytes
    parts = predictor.answer(piece)
    assert next(parts) == Counts(8, 0)
    parts.close()
    monkeypatch.setattr(prediction, "PART_BYTES", 150)
    assert 4 < len(list(predictor.answer(piece))) < 22
    assert [line["id"] for line in output_lines(open_store(str(tmp_path / "out")))] == [
        r["id"] for r in wanted
    ]


@pytest.mark.parametrize("characters", [1, 60, prediction.ENCODED_CHARACTERS])
def test_answers_are_the_models_own_however_many_records_are_tokenized_together(
    characters, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(prediction, "ENCODED_CHARACTERS", characters)  # 1: each record alone
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


WORDS = ["Statements", "in", "Zanzibar", "end"]
KINDS = {
    "classification": ("causal", {"multi_label": True, "labels": ("a", "b", "c", "d")}),
    "pairs": ("bert", {"labels": tuple("abcdefgh"), "columns": TaskColumns(pair="pair")}),
    "token_classification": ("causal", {"labels": ("O", "B-X", "I-X")}),
    "regression": ("causal", {}),
    "question_answering": ("bert", {"columns": TaskColumns(pair="pair")}),
}
SCALE = (30.0, 7.0)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_each_kind_are_what_the_models_scores_of_one_record_say(tmp_path, kind):
    backbone, content = KINDS[kind]
    exported = load_exported(open_store(put_backbone(tmp_path / "backbone", BACKBONES[backbone])))
    tokenizer, pad = framed(exported.tokenizer, exported.boundary_id, causal=backbone == "causal")
    task = TaskConfig(name="t", kind=kind, data=TaskFiles(uri="elsewhere.jsonl"), **content)
    encoder = Encoder(task, tokenizer, pad, 128, True, backbone == "causal", SCALE)
    made = TaskModel(exported.model, task, AdaptConfig(dropout=0.0), seed=0).eval()
    with torch.no_grad():
        for weights in made.parameters():
            weights *= 1 + 9 * (weights.dim() > 1)  # initial ones answer everything alike
    export_task_model(made, encoder, exported.boundary_id, open_store(str(tmp_path / "export")))
    texts = [record["text"] for record in sentences(12)]
    rows = [
        {"text": text, "pair": other, "tokens": [*WORDS[n % 4 :], *text.split()[:3]]}
        for n, (text, other) in enumerate(zip(texts, texts[::-1], strict=True))
    ]
    predictor = Predictor(str(tmp_path / "export"), str(tmp_path / "out"), rows_per_batch=5, threads=1)
    [piece] = pieces_of(put_lines(tmp_path / "r.jsonl", rows))
    assert answered(predictor, piece) == Counts(12, 0)
    found = [line["answer"] for line in output_lines(open_store(str(tmp_path / "out")))]
    expected = [by_hand(made, task, tokenizer, row) for row in rows]
    assert found == (pytest.approx(expected, abs=1e-4) if kind == "regression" else expected)
    assert len({str(answer) for answer in found}) > 1, "all alike: any mixture of records would pass"


@torch.no_grad()
def by_hand(model, task, tokenizer, row):
    """The answer to one record alone, from the scores of one forward pass."""
    text = " ".join(row["tokens"]) if task.kind == "token_classification" else row["text"]
    encoding = tokenizer.encode(text, row["pair"]) if task.columns.pair else tokenizer.encode(text)
    ids, types = torch.tensor([encoding.ids]), torch.tensor([encoding.type_ids])
    scores = model(ids, torch.ones_like(ids, dtype=torch.bool), types)[0]
    if task.kind == "regression":
        return float(scores) * SCALE[1] + SCALE[0]
    if task.kind == "classification":
        return [label for label, score in zip(task.labels, scores.tolist(), strict=True) if score > 0]
    if task.kind == "pairs":
        return task.labels[int(scores.argmax())]
    if task.kind == "token_classification":
        last = {end: place for place, (start, end) in enumerate(encoding.offsets) if end > start}
        ends = [len(" ".join(row["tokens"][: n + 1])) for n in range(len(row["tokens"]))]
        return [task.labels[int(scores[last[end]].argmax())] for end in ends]
    inside = [place for place, part in enumerate(encoding.sequence_ids) if part == 1]
    spans = [(i, j) for i in inside for j in inside if i <= j < i + 30]
    first, last = max(spans, key=lambda span: float(scores[span[0], 0] + scores[span[1], 1]))
    return row["pair"][encoding.offsets[first][0] : encoding.offsets[last][1]].strip()


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


def start(options, log):
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in vars(options).items()]
    return start_command([sys.executable, str(PROJECT / "trainers" / "predict.py"), *flags], log)


@pytest.mark.cluster
def test_a_job_that_was_killed_goes_on_and_every_record_is_answered_once(
    model, tmp_path, monkeypatch, capsys
):
    source, log = tmp_path / "in", tmp_path / "log.txt"
    source.mkdir()
    wanted = [row | {"id": f"r{n}"} for n, row in enumerate(records(3 * prediction.PART_ROWS))]
    put_as(source / "long.jsonl.gz", wanted[100:])
    put_lines(source / "short.jsonl", wanted[:100])
    options = options_of(model[0], source, tmp_path / "out", address="local", rows_per_batch=64)
    output = open_store(options.output)

    def parts():
        return {info.path: info.version for info in output.list("long-")}

    job = start(options, log)
    ends = time.monotonic() + 300
    while not (before := parts()):
        assert job.poll() is None and time.monotonic() < ends, log.read_text()[-4000:]
        time.sleep(0.01)
    kill_tree(job.pid)
    job.wait()
    assert not any(name.startswith("long-") for name in finished_pieces(output)), "it was done by then"
    assert start(options, log).wait(300) == 0, log.read_text()[-4000:]
    assert before.items() <= parts().items() and len(parts()) == 3, "what was answered was answered again"
    ids = [line["id"] for line in output_lines(output)]
    assert sorted(ids) == sorted(row["id"] for row in wanted)
    monkeypatch.setattr(prediction_job, "ray_session", lambda cluster: pytest.fail("started"))
    assert prediction_job.predict(options) == Counts(len(wanted), 0)
    assert "2 pieces, 2 of them answered before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("workers", 0, "--workers=0 must be at least 1"),
        ("rows_per_batch", 0, "--rows-per-batch=0 must be at least 1"),
        ("rows_per_batch", -1, "--rows-per-batch=-1 must be at least 1"),
        ("max_new_tokens", 0, "--max-new-tokens=0 must be at least 1"),
        ("cpus_per_worker", 0.0, "--cpus-per-worker=0 must be 0.0001 or more; on shared cores, try 0.5"),
        (
            "cpus_per_worker",
            1e-320,
            "--cpus-per-worker=9.99989e-321 must be 0.0001 or more; on shared cores, try 0.5",
        ),
        ("gpus_per_worker", -1.0, "--gpus-per-worker=-1 must be 0 or more"),
    ],
)
def test_a_number_that_no_job_can_have_is_one_line_and_status_2_before_anything_is_started(
    model, tmp_path, monkeypatch, capsys, option, value, message
):
    uri = put_lines(tmp_path / "r.jsonl", records(3))
    monkeypatch.setattr(prediction_job, "ray_session", lambda cluster: pytest.fail("started"))
    options = options_of(model[0], uri, tmp_path / "out", **{option: value})
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in vars(options).items()]
    with pytest.raises(SystemExit) as ended:
        run_entry(lambda: predict.main(flags))
    assert ended.value.code == 2 and capsys.readouterr().err == f"{message}\n"
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_one_line_that_names_it(tmp_path, monkeypatch):
    uri = put_lines(tmp_path / "r.jsonl", records(3))
    with pytest.raises(ConfigError, match="--model .*/nowhere holds no fine-tuned model"):
        prediction_job.predict(options_of(str(tmp_path / "nowhere"), uri, tmp_path / "out"))


def test_a_second_job_does_not_answer_into_the_folder_of_one_that_lives(model, tmp_path):
    uri = put_lines(tmp_path / "r.jsonl", records(3))
    options = options_of(model[0], uri, tmp_path / "out")
    output = open_store(options.output)
    living = f"--output .*/out is being answered into by process {os.getpid()} on "
    with lease(output), pytest.raises(ConfigError, match=living):
        prediction_job.predict(options)
    assert not output.exists(prediction_job.JOB)


def test_more_models_than_the_cluster_has_room_for_are_refused(model, tmp_path, monkeypatch):
    uri = put_lines(tmp_path / "r.jsonl", records(3))
    monkeypatch.setattr(prediction_job, "ray_session", lambda cluster: nullcontext([{"CPU": 2.0}]))
    options = options_of(model[0], uri, tmp_path / "out", cpus_per_worker=3.0)
    with pytest.raises(
        ConfigError, match="--workers=1 x --cpus-per-worker=3 = 3 CPUs, but the cluster has 2"
    ):
        prediction_job.predict(options)


def test_answers_of_another_model_or_of_other_records_are_refused(model, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    put_lines(source / "a.jsonl", records(3))
    output = open_store(str(tmp_path / "out"))

    def pin(folder=model[0], **changes):
        options, store = options_of(folder, source, tmp_path / "out", **changes), open_store(folder)
        digest = content_digest(store, of_task=True)
        prediction_job.pin(output, store, digest, options, pieces_of(options.input))

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
    job = json.loads(output.read(prediction_job.JOB))
    job["model"] = listing_digest(open_store(model[0]).list())
    job["input"] = {path: former_version(version) for path, version in job["input"].items()}
    output.put(prediction_job.JOB, json.dumps(job).encode())
    pin()  # begun by a version that noted less of a file
    (source / "a.jsonl").chmod(
        0o600
    )  # as any replacement by a file of equal size and time, which this could hide
    with pytest.raises(ConfigError, match=r"1 input files have changed or gone since, the first: a.jsonl"):
        pin()
    put_lines(source / "a.jsonl", records(4))
    with pytest.raises(ConfigError, match="1 input files have changed or gone since, the first: a.jsonl"):
        pin()


def replaced(folder, path):
    """Change a byte of a file, its size and times stay."""
    before, content = (folder / path).stat(), bytearray((folder / path).read_bytes())
    content[-1] ^= 1
    (folder / path).write_bytes(content)
    os.utime(folder / path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_model_that_was_replaced_by_one_of_equal_size_and_times_answers_nothing(model, tmp_path):
    folder, uri = tmp_path / "export", put_lines(tmp_path / "r.jsonl", records(3))
    shutil.copytree(model[0], folder)
    digest = content_digest(open_store(str(folder)), of_task=True)
    pinned(str(folder), uri, tmp_path / "out")
    Predictor(str(folder), str(tmp_path / "out"), 4, 1, digest=digest)  # of the same files the same digest
    replaced(folder, "model.safetensors")
    with pytest.raises(ModelFolderError, match=f"was replaced while it answers: {digest} there"):
        Predictor(str(folder), str(tmp_path / "out"), 4, 1, digest=digest)
    with pytest.raises(ConfigError, match=f"model is .* now, the answers there were made with {digest}"):
        pinned(str(folder), uri, tmp_path / "out")


def pinned(model, source, output):
    """The pieces of a start of a job, as it names their answers."""
    options, store = options_of(model, source, output), open_store(model)
    digest = content_digest(store, of_task=True)
    return prediction_job.pin(open_store(str(output)), store, digest, options, pieces_of(options.input))


def test_records_are_answered_once_however_their_place_is_spelled_and_wherever_it_is_moved(model, tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    put_lines(source / "a.jsonl", records(3))
    [first] = pinned(model[0], source, output)
    assert answered(Predictor(model[0], str(output), 4, 1), first) == Counts(3, 0)
    (tmp_path / "link").symlink_to(source)
    for spelled in (f"{tmp_path}/../{tmp_path.name}/in", f"file://{source}/", tmp_path / "link"):
        assert [piece.name for piece in pinned(model[0], spelled, output)] == [first.name], spelled
    source.rename(tmp_path / "moved")
    [moved] = pinned(model[0], tmp_path / "moved", output)
    assert (
        moved.name == first.name
        and list(rows_of(moved, ["id"]))
        and len(finished_pieces(open_store(str(output)))) == 1
    )


def test_a_job_that_named_answers_by_the_place_of_its_input_goes_on_from_there_and_from_no_other(
    model, tmp_path
):
    source, output = tmp_path / "in", open_store(str(tmp_path / "out"))
    source.mkdir()
    put_lines(source / "a.jsonl", records(3))
    pinned(model[0], source, tmp_path / "out")
    job = json.loads(output.read(prediction_job.JOB))
    del job["named_by"]
    output.put(prediction_job.JOB, json.dumps(job).encode())
    size = (source / "a.jsonl").stat().st_size
    described = f"Piece(uri='file://{source}', path='a.jsonl', start=0, stop={size}, row_group=-1)"
    former = f"a-{hashlib.blake2b(described.encode(), digest_size=6).hexdigest()}"
    for path in (f"{former}-00000.jsonl", f"finished/{former}"):
        output.put(path, b'{"answered": 3}')
        with pytest.raises(
            ConfigError, match=f"holds answers to {former}, which is no piece of .*as it was at the first"
        ):
            pinned(model[0], f"{tmp_path}/../{tmp_path.name}/in", tmp_path / "out")
    for _ in range(2):
        assert [piece.name for piece in pinned(model[0], source, tmp_path / "out")] == [former]


@pytest.mark.parametrize(
    ("source", "output"), [("in", "in/out"), ("in", "in"), ("out/in", "out"), ("out/r.jsonl", "link")]
)
def test_answers_and_records_that_lie_in_one_another_are_refused(model, tmp_path, source, output):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(ConfigError, match=f"--output=.*{output} and --input=.*{source} lie in one another"):
        prediction_job.predict(options_of(model[0], tmp_path / source, tmp_path / output))
    assert not list((tmp_path / "out").iterdir())


def test_a_missing_column_is_one_error_before_anything_is_started(model, tmp_path, monkeypatch):
    uri = put_lines(tmp_path / "r.jsonl", [{"texts": "a film"}])
    monkeypatch.setattr(prediction_job, "ray_session", lambda cluster: pytest.fail("started"))
    with pytest.raises(ConfigError, match="there is no column 'text' .*nearest: texts"):
        prediction_job.predict(options_of(model[0], uri, tmp_path / "out"))


def test_a_damaged_part_is_answered_again_and_a_damaged_count_is_made_anew(
    model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(prediction, "PART_ROWS", 8)
    uri, output = put_lines(tmp_path / "r.jsonl", records(20)), open_store(str(tmp_path / "out"))
    predictor = Predictor(model[0], output.uri, 4, 1)
    [piece] = pieces_of(uri)
    answered(predictor, piece)
    finished, part = f"finished/{piece.name}", f"{piece.name}-00001.jsonl"
    whole, lines = output.read(part), output_lines(output)
    for damaged, again in (
        (whole[:-5], 8),
        (whole.replace(b'"place"', b'"plac"', 1), 8),
        (b"\xff" * 9, 8),
        (
            whole.partition(b"\n")[2],
            12,
        ),  # seven records, and those of the next part, which are other ones then
    ):
        output.put(finished, b'{"answered": -1}')
        output.put(part, damaged)
        assert finished_pieces(output) == {}
        assert answered(predictor, piece) == Counts(again, 0)
        assert output_lines(output) == lines and finished_pieces(output) == {piece.name: Counts(20, 0)}
    told = capsys.readouterr().out
    assert told.count(part) == told.count(f"{finished} is damaged: ") == 4
