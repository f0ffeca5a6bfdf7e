"""Laws of reading what was made to exhaust a reader: few bytes never become much memory or much of a disk, and an
honest corpus passes however well it packs."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.sessions.session import PROJECT
from cluster.storage.uris import open_store
from data.preparing.pieces import SET_ASIDE_BYTES, SET_ASIDE_RECORDS, Piece, survey
from data.reading import unpacking
from data.reading.documents import Broken, Document, read_documents
from data.reading.raw_shards import CorpusConfig, CorpusError, RawShard
from trainers.tasks.record_files import BrokenRow, rows_in

MOST_MEMORY = 512 << 20
"""Above what a reader takes before it reads: eight times what a page of Parquet may unpack to."""


def zstd_frame(window_log: int, num_blocks: int) -> bytes:
    """A frame that asks for a window and holds blocks of one byte repeated 131,072 times, four bytes each."""
    block = 131_072 << 3 | 1 << 1
    blocks = (
        (block.to_bytes(3, "little") + b"a") * (num_blocks - 1) + (block | 1).to_bytes(3, "little") + b"a"
    )
    return b"\x28\xb5\x2f\xfd\x00" + bytes([window_log - 10 << 3]) + blocks


def repeated(value: str, rows: int, **options) -> pa.Buffer:
    """Parquet of a dictionary with one value, which each row names."""
    column = pa.DictionaryArray.from_arrays(pa.repeat(0, rows).cast(pa.int32()), [value])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": column}), sink, compression="zstd", store_schema=False, **options)
    return sink.getvalue()


def plain(content: pa.Table, **options) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    pq.write_table(content, sink, compression="zstd", use_dictionary=False, **options)
    return sink.getvalue()


BOMBS = {
    "value-of-17-mb-a-thousand-times.parquet": lambda: repeated("x" * 17_000_000, 1_000),
    "value-of-60-mb.parquet": lambda: repeated("x" * 60_000_000, 1_000),
    "value-of-200-mb.parquet": lambda: repeated("x" * 200_000_000, 1_000),
    "page-of-600-mb.parquet": lambda: plain(pa.table({"text": ["x" * 1_000_000] * 600})),
    "shared-prefix.parquet": lambda: plain(
        pa.table({"text": ["x" * 17_000_000 + str(n) for n in range(64)]}),
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
    ),
    "nulls.parquet": lambda: plain(pa.table({"text": pa.nulls(5_000_000, pa.string())})),
    "members.jsonl.gz": lambda: gzip.compress(bytes(1_000_000)) * 100,
    "line.jsonl.zst": lambda: zstd_frame(17, 2_000),
    "text.txt.zst": lambda: zstd_frame(17, 200),
    "window-of-128-mb.jsonl.zst": lambda: zstd_frame(27, 1_500),
    "window-of-2-gb.jsonl.zst": lambda: zstd_frame(31, 3_000),
    "broken-lines.jsonl.gz": lambda: gzip.compress(b"{\n" * 400_000),
}
SURVEY = """
import sys
from data.reading.raw_shards import CorpusConfig, CorpusError, list_raw_shards
from data.preparing.pieces import Piece, survey
folder = sys.argv[1]
config = CorpusConfig(uri=f"{folder}/raw", prepared=f"{folder}/prepared")
def most_memory():  # of this process: getrusage tells also what its parent had before it began
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
before = most_memory()
for shard in list_raw_shards(config):
    try:
        survey(Piece((shard,)), config)
        print(shard.path, "ended")
    except CorpusError as error:
        print(error)
print((most_memory() - before) * 1024)
"""


@pytest.mark.slow
def test_no_bomb_takes_more_memory_or_disk_than_its_bounds(tmp_path: Path) -> None:
    for name, made in BOMBS.items():
        open_store(f"{tmp_path}/raw").put(name, bytes(made()))
    reading = subprocess.run(
        [sys.executable, "-c", SURVEY, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=PROJECT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert reading.returncode == 0, reading.stderr[-4_000:]
    *said, peak = reading.stdout.splitlines()
    assert len(said) == len(BOMBS) and int(peak) < MOST_MEMORY, reading.stdout
    told = dict(zip(sorted(BOMBS), said, strict=True))
    for name, reason in {
        "value-of-17-mb-a-thousand-times.parquet": "unpack to more than 1,073,741,824",
        "value-of-200-mb.parquet": "a page of",
        "page-of-600-mb.parquet": "claims to unpack to 600,0",
        "nulls.parquet": "10,000 of the first 10,000 records",
        "broken-lines.jsonl.gz": "10,000 of the first 10,000 records",
    }.items():
        assert name in told[name] and reason in told[name], told[name]
    prepared = Path(tmp_path, "prepared", "set_aside")
    assert all(file.stat().st_size < 4_000_000 for file in prepared.iterdir())


def lines(records: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.mark.slow
def test_an_honest_corpus_passes_however_well_it_packs(tmp_path: Path) -> None:
    log = [{"text": "GET /healthz HTTP/1.1 200 " * 40}] * 20_000
    store = open_store(str(tmp_path))
    packed = pa.Codec("zstd", compression_level=19).compress(lines(log), asbytes=True)
    assert len(lines(log)) > 5 * unpacking.RATIO * len(packed)
    store.put("a.jsonl.zst", packed)
    store.put("b.parquet", bytes(plain(pa.Table.from_pylist(log))))
    store.put("c.parquet", bytes(repeated(log[0]["text"], 20_000)))
    for info in store.list():
        found = list(read_documents(store, RawShard("s", info.path, info.num_bytes, "1"), CorpusConfig()))
        assert len(found) == 20_000 and all(isinstance(each, Document) for each in found), info.path


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet", "a.txt.gz"])
def test_what_unpacks_to_more_than_its_bound_is_refused_by_name_with_the_key(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking.Expansion.__init__, "__defaults__", (unpacking.RATIO, 100_000))
    records = [
        {"text": "x"}
    ] * 5_000  # 80 KB of JSON, but 5,000 records, and each counts for 256 bytes besides
    content = {
        "a.jsonl.gz": gzip.compress(lines(records)),
        "a.parquet": bytes(plain(pa.Table.from_pylist(records))),
        "a.txt.gz": gzip.compress(b"x" * 200_000),
    }[name]
    store = open_store(str(tmp_path))
    store.put(name, content)
    shard = RawShard("web", name, len(content), "1")
    with pytest.raises(
        CorpusError, match=rf"{name} \(source 'web'\): its .* unpack to more than .*max_expansion=100$"
    ):
        list(read_documents(store, shard, CorpusConfig(max_expansion=100)))
    assert list(read_documents(store, shard, CorpusConfig(max_expansion=10_000)))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz"])
def test_blank_lines_count_as_records(name: str, tmp_path: Path) -> None:
    store, blank = open_store(str(tmp_path)), b"\n" * 5_000
    store.put(name, gzip.compress(b"text\n" + blank))
    [*_, (_, last)] = rows_in(store, name, ["text"], free_bytes=100_000)
    assert isinstance(last, BrokenRow) and last.ends_file and "unpack to more than 100,000" in last.reason
    assert not [row for _, row in rows_in(store, name, ["text"]) if getattr(row, "ends_file", False)]


def test_blank_lines_of_a_raw_shard_count_as_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking.Expansion.__init__, "__defaults__", (unpacking.RATIO, 100_000))
    store, content = open_store(str(tmp_path)), gzip.compress(b"\n" * 5_000)
    store.put("a.jsonl.gz", content)
    shard = RawShard("web", "a.jsonl.gz", len(content), "1")
    with pytest.raises(CorpusError, match="unpack to more than"):
        list(read_documents(store, shard, CorpusConfig(max_expansion=100)))


def surveyed(folder: Path, content: bytes, config: CorpusConfig) -> list[dict[str, object]]:
    """What is set aside of a shard of these lines."""
    raw, prepared = open_store(config.uri), open_store(config.prepared)
    raw.put("a.jsonl", content)
    try:
        survey(Piece((RawShard("corpus", "a.jsonl", len(content), "1"),)), config)
    finally:
        files = [prepared.read(info.path) for info in prepared.list("set_aside/")]
    return [json.loads(line) for file in files for line in file.splitlines()]


def test_broken_records_stop_a_piece_while_it_is_read_and_those_set_aside_stay_readable(
    tmp_path: Path,
) -> None:
    config = CorpusConfig(uri=f"{tmp_path}/raw", prepared=f"{tmp_path}/prepared")
    with pytest.raises(
        CorpusError,
        match=r"a\.jsonl .*10,000 of the first 10,100 records .*set_aside_limit=0\.01: not JSON.*\(10,000\)",
    ):
        surveyed(
            tmp_path, lines([{"text": "x"}] * 100) + b"{\n" * 20_000 + lines([{"text": "x"}] * 10**5), config
        )
    [info] = open_store(config.prepared).list("set_aside/")
    assert len(open_store(config.prepared).read(info.path).splitlines()) == SET_ASIDE_RECORDS


def test_of_a_piece_so_many_records_and_bytes_are_set_aside_and_all_are_counted(tmp_path: Path) -> None:
    config = CorpusConfig(uri=f"{tmp_path}/raw", prepared=f"{tmp_path}/prepared", set_aside_limit=1)
    kept = surveyed(tmp_path, b"\xff" * 5_000 + b"\n" + b"{\n" * 12_000, config)
    assert len(kept) == SET_ASIDE_RECORDS and kept[-1]["line"] == SET_ASIDE_RECORDS
    records = open_store(config.prepared).list("pieces/survey-")
    record = json.loads(open_store(config.prepared).read(records[0].path))
    assert record["set_aside"] == sum(record["reasons"].values()) == 12_001


def test_the_bytes_of_what_is_set_aside_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.preparing.pieces.SET_ASIDE_BYTES", 50_000)
    config = CorpusConfig(uri=f"{tmp_path}/raw", prepared=f"{tmp_path}/prepared", set_aside_limit=1)
    kept = surveyed(tmp_path, (b"\xff" * 2_000 + b"\n") * 100, config)
    assert 5 < len(kept) < 20 and SET_ASIDE_BYTES > 50_000


def test_the_reason_of_a_record_stays_short_whatever_its_names(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.put("a.jsonl", lines([{"k" * 100_000: "x"}, {f"{n}" * 20: "x" for n in range(50_000)}]))
    found = list(read_documents(store, RawShard("s", "a.jsonl", 1, "1"), CorpusConfig()))
    assert all(isinstance(each, Broken) and len(each.reason) <= 300 for each in found)
    assert len(found) == 2
