"""Laws of reading records from outside: one odd record costs its own line, few bytes stay small, and a column that
nobody asked for may hold anything."""

import contextlib
import datetime
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from task_files import put_lines

from cluster.console.errors import ConfigError
from cluster.sessions.session import PROJECT
from cluster.storage.uris import open_store
from data.reading.documents import read_documents
from data.reading.raw_shards import CorpusConfig, CorpusError, RawShard
from tests.test_bombs import MOST_MEMORY, plain, repeated, zstd_frame
from tests.test_parquet_rows import OPTIONS, written
from trainers.prediction.rows import column_problems, pieces_of, rows_of
from trainers.tasks import record_files
from trainers.tasks.record_files import MAX_RECORD_BYTES, BrokenRow, find_files, format_of, rows_in
from trainers.tasks.records import read_examples
from trainers.tasks.task import TaskColumns, TaskConfig

TASK = TaskConfig(name="t", kind="classification")
TAGS = TaskConfig(name="t", kind="token_classification")
COLUMNS = ("id", "text", "label")
GOOD = b'{"id": "a", "text": "fine", "label": "x"}'
OUT_OF_RANGE = pa.array([2**60, 0], pa.timestamp("ms"))
"""A time that no Python date can be, and one that can."""


def rows(uri: Path | str, columns: tuple[str, ...] = COLUMNS) -> list[dict | str]:
    """All rows of a file as `predict` reads them."""
    return [row for piece in pieces_of(str(uri)) for _, row in rows_of(piece, columns)]


ODD_LINES = {
    "deep": (b"[" * 100_000, "not JSON"),
    "deep within": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
    "long number": (b'{"text": ' + b"9" * 5_000 + b"}", "not JSON"),
    "NaN as a key": (b"{NaN: 1}", "not JSON"),
    "NUL": (b"\x00" * 64, "not JSON"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "invalid UTF-8"),
    "not UTF-8": (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
    "a list": (b"[1, 2]", "a JSON list, not an object"),
    "a column twice": (b'{"text": "a", "label": "x", "text": "b"}', "has the column 'text' twice"),
    "long": (b'{"text": "' + b"x" * (MAX_RECORD_BYTES + 5) + b'"}', "longer than 16,777,216 bytes"),
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("odd", ODD_LINES)
def test_an_odd_line_is_its_reason_for_prediction_and_one_line_of_error_for_a_task(tmp_path, odd, ending):
    line, reason = ODD_LINES[odd]
    path = tmp_path / f"r.jsonl{ending}"
    content = b"\n".join([GOOD, line, GOOD])
    path.write_bytes(gzip.compress(content, 1) if ending else content)
    first, said, last = rows(path)
    assert first == last == json.loads(GOOD) and isinstance(said, str) and reason in said and len(said) <= 300
    with pytest.raises(ConfigError) as refused:
        read_examples(TASK, str(path))
    told = str(refused.value)
    assert f"{path.name}: record 2 cannot be read: {said}" in told and "\n" not in told


JUNK = {
    "junk.parquet": b"PAR1 is not enough",
    "junk.jsonl.zst": b"not zstd at all",
    "junk.jsonl.gz": b"not gzip at all",
    "junk.csv.gz": b"\x1f\x8b\x08 and no more",
    "window.jsonl.zst": zstd_frame(31, 2),
    "parquet-in-gzip.parquet.gz": gzip.compress(b"PAR1"),
}


@pytest.mark.parametrize("name", JUNK)
def test_a_file_that_is_not_what_its_name_says_is_one_line_and_the_others_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(JUNK[name])
    put_lines(tmp_path / "z.jsonl", [json.loads(GOOD)])
    said, good = rows(tmp_path)
    assert isinstance(said, str) and good == json.loads(GOOD)
    assert column_problems(TASK, pieces_of(str(tmp_path))) == []
    with pytest.raises(ConfigError) as refused:
        read_examples(TASK, str(tmp_path))
    assert f"{name} cannot be read: " in str(refused.value) and "\n" not in str(refused.value)


def put_parquet(path: Path, content: pa.Table, **options) -> Path:
    pq.write_table(content, path, **options)
    return path


def test_a_column_that_is_not_asked_for_may_hold_anything_and_costs_nothing(tmp_path, monkeypatch):
    texts = pa.table({"text": ["a", "b"], "label": ["x", "y"]})
    path = put_parquet(tmp_path / "r.parquet", texts.append_column("when", OUT_OF_RANGE))
    assert [example.target for example in read_examples(TASK, str(path))] == ["x", "y"]
    assert rows(path) == texts.to_pylist()
    twice = pa.Table.from_arrays(
        [*texts.columns, pa.array([1, 2]), pa.array([3, 4])], ["text", "label", "n", "n"]
    )
    assert rows(put_parquet(tmp_path / "twice.parquet", twice)) == texts.to_pylist()
    wide = pa.table({"text": ["a"], "label": ["x"], "blob": ["y" * 20_000_000]})
    path = put_parquet(tmp_path / "wide.parquet", wide, compression="none", use_dictionary=False)
    read = list[int]()
    whole = record_files.Watched.read
    monkeypatch.setattr(record_files.Watched, "read", lambda self, n=-1: read.append(n) or whole(self, n))
    assert rows(path) == [{"text": "a", "label": "x"}]
    assert sum(read) < 1_000_000


def test_a_value_that_cannot_be_read_costs_its_own_row(tmp_path):
    texts = pa.array([b"good", b"\xff", b"fine"]).cast(pa.binary()).view(pa.string())
    path = put_parquet(tmp_path / "r.parquet", pa.table({"text": texts, "label": ["x"] * 3}))
    first, said, last = rows(path)
    assert (first["text"], last["text"]) == ("good", "fine") and said.startswith(
        "text cannot be read: 'utf-8'"
    )
    path = put_parquet(tmp_path / "t.parquet", pa.table({"text": ["a", "b"], "id": OUT_OF_RANGE}))
    said, good = rows(path)
    assert said.startswith("id cannot be read") and good["id"] == datetime.datetime(1970, 1, 1)
    for name, number in (("r", 2), ("t", 1)):
        with pytest.raises(ConfigError, match=rf"{name}\.parquet: record {number} cannot be read"):
            read_examples(TASK, str(tmp_path / f"{name}.parquet"), labelled=name == "r")


@pytest.mark.parametrize("twice", ["text", "label"])
def test_a_column_twice_is_refused_by_name_wherever_records_are_read(tmp_path, twice):
    (tmp_path / "r.csv").write_bytes(f"id,text,label,{twice}\na,b,x,d\n".encode())
    names = ["text", "label", twice]
    put_parquet(tmp_path / "r.parquet", pa.Table.from_arrays([pa.array(["a"])] * 3, names))
    asked = TaskConfig(name="t", kind="classification", columns=TaskColumns(id="label", label="id"))
    for name in ("r.csv", "r.parquet"):
        with pytest.raises(ConfigError, match=rf"{name} has the column '{twice}' twice"):
            read_examples(TASK, str(tmp_path / name))
        [problem] = column_problems(asked, pieces_of(str(tmp_path / name)))
        assert f"{name} has the column '{twice}' twice" in problem
        assert rows(tmp_path / name) == [problem.partition(f"{name} ")[2]]
    (tmp_path / "o.csv").write_bytes(b"text,label,,\nb,x,1,2\n")
    assert rows(tmp_path / "o.csv") == [{"text": "b", "label": "x"}]


def test_the_format_of_a_file_follows_from_its_own_name(tmp_path):
    folder = tmp_path / "my.csv"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(GOOD))
    put_lines(folder / "b.jsonl", [json.loads(GOOD)])
    assert rows(folder) == rows(tmp_path) == [json.loads(GOOD)] * 2
    assert len(read_examples(TASK, str(folder))) == 2
    assert [format_of(name) for name in ("x.parquet/a.csv", "a.jsonl/b.txt", "a.csv.zst")] == [
        ".csv",
        None,
        ".csv",
    ]
    with pytest.raises(ConfigError, match=r"none\.csv: no such file"):
        find_files(str(tmp_path / "none.csv"))


def test_a_quote_that_is_left_open_ends_a_csv_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "MAX_RECORD_BYTES", 1_000)
    (tmp_path / "r.csv").write_bytes(b'text,label\na,x\n"open,y\n' + b"b,x\n" * 1_000)
    good, said = rows(tmp_path / "r.csv")
    assert good == {"text": "a", "label": "x"} and "a quote left open" in said
    (tmp_path / "blank.csv").write_bytes(b"text,label\n" + b"\n" * 400 + b"a,x\n" * 400)
    assert rows(tmp_path / "blank.csv") == [good] * 400
    (tmp_path / "line.csv").write_bytes(b"text,label\n" + b"z" * 5_000)
    assert "longer than 1,000" in rows(tmp_path / "line.csv")[0]


def test_a_long_line_is_one_reason_wherever_pieces_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.prediction.rows.MAX_RECORD_BYTES", 100)
    monkeypatch.setattr(record_files, "MAX_RECORD_BYTES", 100)
    (tmp_path / "r.jsonl").write_bytes(GOOD + b"\n" + b"x" * 1_000 + b"\n" + GOOD + b"\n" + b"y" * 1_000)
    for size in (1, 40, 41, 42, 100, 500, 1_042, 1_043, 10_000):
        monkeypatch.setattr("trainers.prediction.rows.PIECE_BYTES", size)
        found = rows(tmp_path / "r.jsonl")
        assert [type(row) for row in found] == [dict, str, dict, str], size
        assert found[1] == found[3] == "longer than 100 bytes"


def test_lists_are_measured_before_they_are_expanded(tmp_path):
    path = tmp_path / "r.parquet"
    path.write_bytes(bytes(lists(["a", "x" * 1_000_000, "b", "c"], [0, *[1] * 50, 2, 3], [0, 1, 51, 53])))
    first, said, last = rows(path, ("tokens",))
    assert (first, last) == ({"tokens": ["a"]}, {"tokens": ["b", "c"]})
    assert said == "tokens is longer than 16,777,216 bytes"


BOMBS = {
    "text.parquet": lambda: repeated("x" * 17_000_000, 1_000),
    "page.parquet": lambda: plain(pa.table({"text": ["x" * 1_000_000] * 300})),
    "words.parquet": lambda: lists(["x" * 1_000_000], [0] * 300_000, [0, 100_000, 200_000, 300_000]),
    "values.parquet": lambda: lists(["x"], pa.repeat(0, 20_000_000), [0, 20_000_000]),
    "line.csv.gz": lambda: gzip.compress(b'text,label\n"' + b"x" * 300_000_000, 1),
    "line.jsonl.zst": lambda: zstd_frame(17, 2_000),
    "window.jsonl.zst": lambda: zstd_frame(27, 1_500),
}
READING = """
import sys
from cluster.configuration.config import ConfigError
from trainers.prediction.rows import pieces_of, rows_of
from trainers.tasks.task import TaskConfig
from trainers.tasks.records import read_examples
def most_memory():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
kinds = {"text": "classification", "tokens": "token_classification"}
before = most_memory()
for piece in pieces_of(sys.argv[1]):
    for place, row in rows_of(piece, ("text", "tokens")):
        last = row
    print(place, last if isinstance(last, str) else "is a record")
    try:
        kind = kinds["tokens" if piece.path in ("words.parquet", "values.parquet") else "text"]
        read_examples(TaskConfig(name="t", kind=kind), f"{sys.argv[1]}/{piece.path}", labelled=False)
    except ConfigError as error:
        print(" ".join(str(error).split())[:300])
print((most_memory() - before) * 1024)
"""


def lists(words: list[str], indices: list[int] | pa.Array, offsets: list[int]) -> pa.Buffer:
    """Parquet of lists of words, each stored once."""
    indices = indices if isinstance(indices, pa.Array) else pa.array(indices)
    chosen = pa.DictionaryArray.from_arrays(indices.cast(pa.int32()), words)
    sink = pa.BufferOutputStream()
    tokens = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), chosen)
    pq.write_table(pa.table({"tokens": tokens}), sink, compression="zstd", store_schema=False)
    return sink.getvalue()


@pytest.mark.slow
def test_no_bomb_takes_more_memory_than_its_bounds(tmp_path):
    for name, made in BOMBS.items():
        open_store(str(tmp_path)).put(name, bytes(made()))
    reading = subprocess.run(
        [sys.executable, "-c", READING, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert reading.returncode == 0, reading.stderr[-4_000:]
    *said, peak = reading.stdout.splitlines()
    assert len(said) == 2 * len(BOMBS) and int(peak) < MOST_MEMORY, reading.stdout
    for name, reason in {
        "text.parquet": "unpack to more than 1,073,741,824",
        "page.parquet": "a page of",
        "words.parquet": "tokens is longer than",
        "values.parquet": "claim 20,000,000 values",
        "line.csv.gz": "a quote left open",
    }.items():
        assert any(name in line and reason in line for line in said), reading.stdout


def test_a_task_of_many_records_from_few_bytes_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.tasks.records.FREE_BYTES", 100_000)
    content = b'{"text": "a", "label": "x"}\n' * 2_000  # 56 KB, and each record counts for 256 bytes besides
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(record_files, "RATIO", 100)
    with pytest.raises(
        ConfigError, match=r"r\.jsonl\.gz cannot be read: its .* bytes unpack to more than 100,000"
    ):
        read_examples(TASK, str(tmp_path))
    monkeypatch.setattr(record_files, "RATIO", 10_000)
    assert len(read_examples(TASK, str(tmp_path))) == 2_000


@pytest.mark.slow
def test_flipped_and_cut_files_are_read_or_end_in_a_reason(tmp_path):
    """Of each file bytes are flipped or its end is cut, with fixed seeds; no other error comes out of any reader."""
    records = [
        {"id": str(n), "text": f"some text {n}", "label": "x", "tokens": ["a"] * (n % 4)} for n in range(90)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    whole = {
        f"{n}.parquet": written(pa.Table.from_pylist(records), **options)
        for n, options in enumerate(OPTIONS[:5])
    }
    files = {name: file.getvalue() for name, file in whole.items()}
    files |= {"a.jsonl.gz": gzip.compress(lines), "b.jsonl.zst": pa.compress(lines, "zstd", asbytes=True)}
    files["c.csv.gz"] = gzip.compress(b"id,text,label\n" + b"a,b,c\n" * 90)
    chance, store = random.Random(1), open_store(str(tmp_path))
    for number in range(400):
        name = chance.choice(sorted(files))
        content = bytearray(files[name])
        if number % 4:
            for _ in range(chance.choice([1, 8])):  # half of them in the footer of Parquet
                content[chance.randrange(chance.choice([0, max(0, len(content) - 2_000)]), len(content))] ^= (
                    1 << (number % 8)
                )
        else:
            del content[chance.randrange(len(content)) :]
        store.put(name, bytes(content))
        assert all(isinstance(row, dict | str) for row in rows(tmp_path / name, (*COLUMNS, "tokens")))
        if not name.endswith("csv.gz"):
            with contextlib.suppress(CorpusError):
                list(read_documents(store, RawShard("s", name, len(content), "1"), CorpusConfig()))
        with contextlib.suppress(ConfigError):
            read_examples(TASK, str(tmp_path / name))


def test_a_store_that_fails_is_no_broken_record(tmp_path, monkeypatch):
    put_lines(tmp_path / "r.csv", [{}])
    store, (name,) = find_files(str(tmp_path / "r.csv"))

    class Fails:
        def __init__(self, file):
            self._file = file

        def read(self, *_):
            raise OSError("connection reset")

        def __getattr__(self, key):
            return getattr(self._file, key)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

    opened = type(store).open
    monkeypatch.setattr(type(store), "open", lambda self, path: Fails(opened(self, path)))
    with pytest.raises(OSError, match="connection reset"):
        list(rows_in(store, name, COLUMNS))


def test_a_broken_row_says_whether_others_come(tmp_path):
    (tmp_path / "r.csv").write_bytes(b"text,label\na\nb,x\n")
    store, (name,) = find_files(str(tmp_path / "r.csv"))
    assert [row for _, row in rows_in(store, name, COLUMNS)] == [
        BrokenRow("fewer fields than the header's 2 columns"),
        {"text": "b", "label": "x"},
    ]
    whole = gzip.compress(GOOD * 1_000, 1)
    (tmp_path / "r.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    store, (name,) = find_files(str(tmp_path / "r.jsonl.gz"))
    *_, (_, last) = rows_in(store, name, COLUMNS)
    assert isinstance(last, BrokenRow) and last.ends_file
