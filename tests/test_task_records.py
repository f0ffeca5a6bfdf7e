"""Records are what their files say, or one error that names the record."""

import gzip
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from task_files import put_lines

from cluster.console.errors import ConfigError
from trainers.prediction.rows import pieces_of, rows_of
from trainers.tasks.record_files import find_files, rows_in
from trainers.tasks.records import example_of, read_examples
from trainers.tasks.task import TaskColumns, TaskConfig

LABELS = TaskConfig(name="t", kind="classification")
ANSWERS = TaskConfig(name="t", kind="generation")
NUMBERS = TaskConfig(name="t", kind="regression")
SPANS = TaskConfig(name="t", kind="question_answering", columns=TaskColumns(pair="context"))
TAGS = TaskConfig(name="t", kind="token_classification")


def put_csv(path, *lines: str) -> str:
    path.write_bytes("\n".join(["id,text,label", *lines, ""]).encode())
    return str(path)


@pytest.mark.parametrize(
    "written",
    [
        "04",
        "4",
        "1.50",
        "1e3",
        "2024-01-31",
        "2024-01-31 10:00:00",
        "True",
        "true",
        "null",
        "N/A",
        "nan",
        " x",
    ],
)
@pytest.mark.parametrize("task", [LABELS, ANSWERS], ids=lambda task: task.kind)
def test_a_label_or_an_answer_of_a_csv_is_the_text_that_stands_there(tmp_path, task, written):
    uri = put_csv(tmp_path / "r.csv", f"007,{written},{written}", f"8,1234,{written}")
    one, other = read_examples(task, uri)
    assert (one.id, one.target, other.text, other.target) == ("007", written, "1234", written)
    assert one.text == written


def test_an_answer_within_a_context_may_be_a_number_in_a_csv(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("text,context,label\nWhen?,Built in 1889.,1889\n", encoding="utf-8")
    (example,) = read_examples(SPANS, str(path))
    assert example.target == {"text": "1889", "start": 9}


def test_a_number_is_parsed_where_the_kind_needs_one(tmp_path):
    uri = put_csv(tmp_path / "r.csv", "a,x,1.50", "b,y,-2e-1", "c,z,7")
    assert [e.target for e in read_examples(NUMBERS, uri)] == [1.5, -0.2, 7.0]
    uri = put_lines(tmp_path / "r.jsonl", [{"text": "x", "label": label} for label in (1.5, "1.50", 2)])
    assert [e.target for e in read_examples(NUMBERS, uri)] == [1.5, 1.5, 2.0]


@pytest.mark.parametrize(
    "label", ["", "nan", "inf", "1_000", "1,5", True, None, [1.0], 10**400, float("inf")]
)
def test_what_is_no_finite_number_is_refused(label):
    with pytest.raises(ValueError, match="label=.* is not a number"):
        example_of(NUMBERS, {"text": "x", "label": label}, "r:1")


def test_numbers_that_json_holds_as_labels_are_written_as_json_writes_them_and_nan_is_none(tmp_path):
    rows = [{"text": "x", "label": label} for label in (4, True, 0.5)]
    assert [e.target for e in read_examples(LABELS, put_lines(tmp_path / "r.jsonl", rows))] == [
        "4",
        "true",
        "0.5",
    ]
    table = pa.table({"text": ["x", "y"], "label": pa.array([1.0, float("nan")])})
    pq.write_table(table, tmp_path / "r.parquet")
    with pytest.raises(ConfigError, match="record 2: label=nan is not a label"):
        read_examples(LABELS, str(tmp_path / "r.parquet"))


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_training_and_prediction_read_the_same_rows_of_a_csv(tmp_path, ending):
    content = '\ufeffid,text,label\r\n1,"two\nlines, ""quoted""",04\r\n\r\n2,,1.50\r\n3,天上 ,x\r\n'.encode()
    pack = {"": bytes, ".gz": gzip.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    path = tmp_path / f"r.csv{ending}"
    path.write_bytes(pack[ending](content))
    store, (name,) = find_files(str(path))
    columns = ("id", "text", "label")
    trained = [row for _, row in rows_in(store, name, columns)]
    assert trained == [row for piece in pieces_of(str(path)) for _, row in rows_of(piece, columns)]
    assert trained[0] == {"id": "1", "text": 'two\nlines, "quoted"', "label": "04"}
    assert [row["label"] for row in trained] == ["04", "1.50", "x"]


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (b"b,too,many,fields", "record 2 cannot be read: more fields than the header's 3 columns"),
        (b"b,few", "record 2 cannot be read: fewer fields than the header's 3 columns"),
        (b'b,"x"y,z', "record 2 cannot be read: not CSV"),
        (b'b,"open,z', "record 2 cannot be read: not CSV: unexpected end of data"),
        (b"b,\xff,z", "record 2 cannot be read: not UTF-8"),
    ],
)
def test_a_broken_row_of_a_csv_is_named(tmp_path, broken, why):
    (tmp_path / "r.csv").write_bytes(b"id,text,label\na,x,y\n" + broken)
    with pytest.raises(ConfigError, match=re.escape(why)):
        read_examples(LABELS, str(tmp_path / "r.csv"))


def test_what_other_tools_hide_beside_records_is_not_read_and_a_name_that_is_no_text_is_one_line(tmp_path):
    for name in ("r.jsonl", ".ipynb_checkpoints/r-checkpoint.jsonl", "_temporary/0/part.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        put_lines(tmp_path / name, [{"text": "x", "label": "a"}])
    store, paths = find_files(str(tmp_path))
    assert paths == ["r.jsonl"]
    store.put("\udcff.csv", b"text,label\n")
    with pytest.raises(ConfigError, match=r"/\\xff\.csv: its name is not UTF-8; rename it"):
        find_files(str(tmp_path))


@pytest.mark.parametrize("name", ["r.jsonl.gz", "r.csv.gz", "r.parquet"])
def test_a_file_that_is_cut_off_is_named(tmp_path, name):
    whole = gzip.compress(b'{"text": "x", "label": "y"}\n' * 100)
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": ["x"], "label": ["y"]}), tmp_path / name)
        whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=f"{name} cannot be read: "):
        read_examples(LABELS, str(tmp_path / name))


@pytest.mark.parametrize("start", ["5", 5.0, True, [], ["5"], {}])
@pytest.mark.parametrize("key", ["start", "answer_start"])
def test_a_start_that_is_no_whole_number_is_one_error_with_its_record(tmp_path, start, key):
    record = {"text": "who?", "context": "it was Anna", "label": {"text": "Anna", key: start}}
    with pytest.raises(ConfigError, match=r"record 1: label: start=.* is not a whole number"):
        read_examples(SPANS, put_lines(tmp_path / "r.jsonl", [record]))


HALF = "\ud800 x"


@pytest.mark.parametrize(
    ("task", "record", "column"),
    [
        (LABELS, {"text": HALF, "label": "a"}, "text"),
        (LABELS, {"text": "x", "label": HALF}, "label"),
        (LABELS, {"text": "x", "label": "a", "id": HALF}, "id"),
        (SPANS, {"text": "x", "context": HALF, "label": "x"}, "context"),
        (SPANS, {"text": "x", "context": "x", "label": {"text": HALF, "start": 0}}, "label"),
        (TAGS, {"tokens": ["x", HALF], "label": ["O", "O"]}, "tokens"),
        (TAGS, {"tokens": ["x"], "label": [HALF]}, "label"),
    ],
)
def test_half_a_character_is_one_error_that_names_record_and_column(tmp_path, task, record, column):
    with pytest.raises(ConfigError, match=rf"record 1: {column} holds '\\ud800'"):
        read_examples(task, put_lines(tmp_path / "r.jsonl", [record]))
    if column != "label":
        with pytest.raises(ValueError, match=column):
            example_of(task, record, "r:1", labelled=False)


def test_a_column_that_is_not_read_may_hold_anything():
    row = {"text": "x", "label": HALF, "note": HALF}
    assert example_of(LABELS, row, "r:1", labelled=False).text == "x"
