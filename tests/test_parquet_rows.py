"""Laws of reading Parquet in bounded memory: ordinary files give what Arrow gives, and each page is seen before Arrow
unpacks it."""

import io
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.reading import parquet_pages, parquet_rows
from data.reading.parquet_footer import read_footer
from data.reading.parquet_pages import PageWatch
from data.reading.parquet_rows import ParquetRows, RepeatedColumnError, expanded_bytes
from data.reading.unpacking import RATIO, UnpackingError

ROWS = 3_000


def table() -> pa.Table:
    """Texts, numbers, lists, structs and lists of structs, with nulls in each."""
    texts = [None if n % 97 == 0 else f"text {n} " + "ü" * (n % 50) for n in range(ROWS)]
    tags = [None if n % 89 == 0 else ["O", "B-X"] * (n % 4) for n in range(ROWS)]
    chat = [[{"role": "user", "content": f"ask {n}"}] * (n % 3) for n in range(ROWS)]
    spans = [{"text": f"answer {n % 7}", "start": n} if n % 5 else None for n in range(ROWS)]
    return pa.table(
        {"id": range(ROWS), "text": texts, "tags": tags, "chat": chat, "span": spans, "other": [1.5] * ROWS}
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"compression": "zstd", "row_group_size": 700},
    {"compression": "none", "data_page_version": "2.0", "data_page_size": 1_000},
    {"compression": "gzip", "use_dictionary": False, "write_page_checksum": True, "write_page_index": True},
    {"compression": "brotli", "dictionary_pagesize_limit": 2_000, "store_schema": False},
    {
        "compression": "lz4",
        "use_dictionary": False,
        "column_encoding": {
            "text": "DELTA_BYTE_ARRAY",
            "id": "DELTA_BINARY_PACKED",
            "other": "BYTE_STREAM_SPLIT",
        },
    },
    {
        "use_dictionary": False,
        "column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"},
        "data_page_version": "2.0",
    },
]


def written(content: pa.Table, **options: Any) -> io.BytesIO:
    sink = io.BytesIO()
    pq.write_table(content, sink, **options)
    sink.seek(0)
    return sink


def read(file: io.BytesIO, *columns: str) -> list[dict[str, Any]]:
    return [row for batch in ParquetRows(file, columns).batches() for row in batch.to_pylist()]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("columns", [("text", "id"), ("id", "text", "tags", "chat", "span")], ids=len)
def test_rows_are_those_that_arrow_reads(options: dict[str, Any], columns: tuple[str, ...]) -> None:
    assert read(written(table(), **options), *columns) == table().select(columns).to_pylist()


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_rows_are_the_same_where_pages_grow_too_large_for_several_at_a_time(
    compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_rows, "SMALL_PAGE_BYTES", 2 << 20)
    rng = np.random.default_rng(0)  # incompressible, so that the large page is far behind the first ones
    texts = [rng.bytes(700 if n < 2_048 else 3_000).hex() for n in range(ROWS)]
    content = pa.table({"id": range(ROWS), "text": texts})
    file = written(content, use_dictionary=False, compression=compression)
    assert {len(batch) for batch in ParquetRows(file, ("text", "id")).batches()} == {16, 1}
    assert read(file, "text", "id") == content.to_pylist()


def test_rows_of_pandas_are_those_that_arrow_reads() -> None:
    frame = pd.DataFrame(
        {
            "text": pd.Categorical([f"text {n % 40}" for n in range(500)]),
            "words": [np.array(["a", "b"][: 1 + n % 2]) for n in range(500)],
            "when": pd.date_range("2024-01-01", periods=500),
        },
        index=range(7, 507),
    )
    sink = io.BytesIO()
    frame.to_parquet(sink)
    expected = pq.read_table(io.BytesIO(sink.getvalue())).to_pylist()
    assert read(sink, "text", "words", "when") == [
        {key: row[key] for key in ("text", "words", "when")} for row in expected
    ]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_page_is_seen_and_its_sizes_add_up_to_the_footers(options: dict[str, Any], monkeypatch) -> None:
    seen = dict[str, list[int]]()
    check, parse = parquet_pages._Chunk._check, parquet_pages._page_header
    lengths = list[int]()

    def header(data: bytes) -> Any:
        found = parse(data)
        if found:
            lengths.append(found[1])
        return found

    def note(chunk: Any, fields: dict[int, Any]) -> None:
        before = chunk.num_values
        check(chunk, fields)
        counts = seen.setdefault(chunk.name, [0, 0])
        counts[0] += fields[2] + lengths[-1]
        counts[1] += chunk.num_values - before

    monkeypatch.setattr(parquet_pages, "_page_header", header)
    monkeypatch.setattr(parquet_pages._Chunk, "_check", note)
    file = written(table(), **options)
    names = table().column_names
    assert len(read(file, *names)) == ROWS
    metadata = pq.read_metadata(file)
    expected = dict[str, list[int]]()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            counts = expected.setdefault(column.path_in_schema, [0, 0])
            counts[0] += column.total_uncompressed_size
            counts[1] += column.num_values
    assert seen == expected


def claims(number: int) -> bytes:
    """A number as Thrift writes it, in the length of `number` when it says 1,000."""
    encoded, rest = b"", 2 * number
    while rest > 0x7F:
        encoded, rest = encoded + bytes([rest & 0x7F | 0x80]), rest >> 7
    return encoded + bytes([rest])


def test_a_footer_that_names_less_than_its_pages_hold_is_refused() -> None:
    content = pa.table({"text": ["x" * 1_000_000] * 10, "tags": [["O"]] * 10})
    file = written(content, compression="zstd", use_dictionary=False)
    size = pq.read_metadata(file).row_group(0).column(0).total_uncompressed_size
    honest, small = claims(size), claims(1_000)
    padded = small[:-1] + bytes([small[-1] | 0x80]) + b"\x80" * (len(honest) - len(small) - 1) + b"\x00"
    data = file.getvalue()
    place = data.rindex(honest)
    lying = io.BytesIO(data[:place] + padded + data[place + len(honest) :])
    assert pq.read_metadata(lying).row_group(0).column(0).total_uncompressed_size == 1_000
    with pytest.raises(
        UnpackingError, match="'text' unpacks to more than the 1,000 bytes that its footer names"
    ):
        read(lying, "text", "tags")


def test_a_page_that_claims_more_than_its_ratio_is_refused_before_it_is_unpacked(monkeypatch) -> None:
    monkeypatch.setattr(parquet_pages, "PAGE_BYTES", 1_000_000)
    file = written(pa.table({"text": ["x" * 2_000_000]}), compression="zstd", use_dictionary=False)
    with pytest.raises(UnpackingError, match=r"'text': a page of [\d,]+ bytes claims to unpack to 2,0"):
        read(file, "text")
    assert len(read(written(pa.table({"text": ["x" * 900_000] * 5}), compression="zstd"), "text")) == 5


def test_many_values_of_a_list_from_few_bytes_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(parquet_pages, "FREE_VALUES", 100_000)
    bomb = pa.table({"tokens": [["x"] * 300_000]})
    with pytest.raises(UnpackingError, match=r"'tokens.list.element': [\d,]+ bytes claim 300,000 values"):
        read(written(bomb), "tokens")
    assert len(read(written(pa.table({"tokens": [["x"]] * 90_000})), "tokens")) == 90_000


def test_texts_within_lists_that_share_prefixes_are_refused() -> None:
    file = written(
        pa.table({"tokens": [["x" * 100] * 9]}),
        use_dictionary=False,
        column_encoding={"tokens.list.element": "DELTA_BYTE_ARRAY"},
    )
    with pytest.raises(UnpackingError, match="encoding 7 of parquet.thrift has no bound in lists"):
        read(file, "tokens")


def test_a_column_that_is_there_twice_is_refused_only_where_it_is_asked_for() -> None:
    twice = pa.Table.from_arrays(
        [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["text", "text", "other"]
    )
    with pytest.raises(RepeatedColumnError, match="has the column 'text' twice"):
        read(written(twice), "text")
    assert read(written(twice), "other") == [{"other": "c"}]


def test_columns_that_lie_on_each_other_are_refused() -> None:
    file = written(table())
    watch = PageWatch(file, RATIO)
    metadata = pq.read_metadata(watch)
    watch.follow(read_footer(watch).row_groups[0], metadata.schema, [], sys.maxsize)
    watch.seek(4)
    assert watch.read(10)
    watch.seek(4)
    with pytest.raises(pa.ArrowInvalid, match="overlap"):
        watch.read(10)


@pytest.mark.parametrize("column", ["text", "tags", "chat", "span", "other"])
def test_expanded_bytes_are_those_of_the_values_themselves(column: str) -> None:
    def of(value: Any) -> int:
        if isinstance(value, str):
            return parquet_rows.VALUE_BYTES + len(value.encode())
        inner = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
        return parquet_rows.VALUE_BYTES + sum(map(of, inner))

    file = written(table())
    values = [(row[column], n) for n, row in enumerate(table().to_pylist()) if row[column] is not None]
    found = dict[int, int]()
    start = 0
    for batch in ParquetRows(file, [column, "tags"]).batches():
        for index in range(batch.num_rows):
            found[start + index] = expanded_bytes(batch.column(column).slice(index, 1))
        start += batch.num_rows
    assert [found[n] for _, n in values] == [of(value) for value, _ in values]


FLIPS = """
import io, random, sys
import pyarrow as pa
import pyarrow.parquet as pq
from data.reading.parquet_rows import ParquetRows

sink = pa.BufferOutputStream()
pq.write_table(pa.table({"text": ["words"] * 200, "tags": [["a", "b"]] * 200}), sink)
whole = sink.getvalue().to_pybytes()
footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
torn = 0
for seed in range(1_500):
    rng, content = random.Random(seed), bytearray(whole)
    content[rng.randrange(footer, len(whole) - 8)] ^= 1 << rng.randrange(8)
    try:
        rows = ParquetRows(io.BytesIO(content), ["text", "tags"])
        sum(map(len, rows.batches()))
    except (pa.ArrowException, OSError, ValueError):
        torn += 1
print(torn)
"""


@pytest.mark.slow
def test_no_flipped_bit_of_a_footer_ends_the_process() -> None:
    """In a process of its own: pyarrow aborts where it is asked for a column's numbers of some of these footers."""
    ended = subprocess.run([sys.executable, "-c", FLIPS], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-500:]
    assert int(ended.stdout) > 500
