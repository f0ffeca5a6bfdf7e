"""Laws of reading raw text: every document comes, and every record that holds none is named."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.dataset as dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.storage.local import LocalStore
from cluster.storage.uris import StorageError, open_store
from data.reading.clean import normalise
from data.reading.documents import Broken, Document, corpus_problems, read_documents
from data.reading.raw_shards import (
    CorpusConfig,
    CorpusError,
    RawShard,
    fragment_tokens_for,
    group_shards,
    list_raw_shards,
)
from data.reading.splits import SplitConfig
from tests.google_stub import GoogleStub

TEXTS = ["To be, or not to be", "naïve café ☕", "一二三\n四五六", "a\tb \u2028c"]


def packed(content: bytes, compression: str) -> bytes:
    match compression:
        case ".gz":
            return gzip.compress(content)
        case ".zst":
            return pa.compress(content, codec="zstd", asbytes=True)
    return content


def jsonl(records: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def parquet(columns: dict[str, Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, row_group_size=3)
    return sink.getvalue()


def read(
    folder: Path, name: str, content: bytes, config: CorpusConfig | None = None
) -> list[Document | Broken]:
    store = open_store(str(folder))
    store.put(name, content)
    shard = RawShard("s", name, len(content), "1")
    return list(read_documents(store, shard, config or CorpusConfig()))


def texts(records: Sequence[Document | Broken]) -> list[str]:
    return [record.text for record in records if isinstance(record, Document)]


def broken(records: Sequence[Document | Broken]) -> list[tuple[int, str]]:
    return [(record.line, record.reason) for record in records if isinstance(record, Broken)]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_jsonl_gives_its_texts_in_order(tmp_path: Path, compression: str) -> None:
    content = packed(jsonl([{"id": str(n), "text": text} for n, text in enumerate(TEXTS)]), compression)
    records = read(tmp_path, f"a.jsonl{compression}", content)
    assert texts(records) == TEXTS
    assert [record.id for record in records] == ["0", "1", "2", "3"]
    assert [record.num_bytes for record in records] == [len(text.encode()) for text in TEXTS]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_plain_text_is_one_document_named_by_its_path(tmp_path: Path, compression: str) -> None:
    [record] = read(tmp_path, f"x/a.txt{compression}", packed(b"\xef\xbb\xbfline\r\nnext \n\n", compression))
    assert isinstance(record, Document)
    assert record.text == "line\nnext" and record.id == f"x/a.txt{compression}"


def test_parquet_gives_its_texts_in_order(tmp_path: Path) -> None:
    content = parquet({"text": TEXTS, "id": pa.array([7, 8, 9, None]), "more": [1.0] * 4})
    records = read(tmp_path, "a.parquet", content)
    assert texts(records) == TEXTS
    assert [record.id for record in records] == ["7", "8", "9", "a.parquet:4"]


def test_members_of_a_joined_gzip_all_come(tmp_path: Path) -> None:
    content = b"".join(gzip.compress(jsonl([{"text": text}])) for text in TEXTS)
    assert texts(read(tmp_path, "a.jsonl.gz", content)) == TEXTS


def test_broken_records_are_named_by_line_and_reason_and_the_others_come(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": ',
        b"",
        b'["text"]',
        b'{"body": "no text"}',
        b'{"text": 5}',
        b'{"text": null}',
        b'{"text": "\xff\xfe"}',
        b'{"text": " \\n\\t "}',
        b'{"text": "\\ud800"}',
        b'{"text": "' + b"x" * 5_000 + b'"}',
        b"[" * 100_000,
        b'{"text": "last"}',
    ]
    records = read(tmp_path, "a.jsonl", b"\n".join(lines), CorpusConfig(max_record_bytes=4_096))
    assert texts(records) == ["good", "last"]
    named = broken(records)
    assert [line for line, _ in named] == [2, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    expected = [
        "not JSON",
        "a JSON list",
        "no 'text'",
        "is int, not a string",
        "is null",
        "invalid UTF-8 at byte 10",
        "empty",
        "surrogate",
        "longer than corpus.max_record_bytes=4,096",
        "longer",
    ]
    assert all(part in reason for part, (_, reason) in zip(expected, named, strict=True))
    kept = [record for record in records if isinstance(record, Broken)]
    assert kept[5].raw == '{"text": "\\xff\\xfe"}'
    assert all(len(record.raw) <= 4_000 for record in kept)


def test_a_missing_field_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    [(_, reason)] = broken(read(tmp_path, "a.jsonl", jsonl([{"id": 1, "texts": "x"}])))
    assert "'texts'" in reason
    with pytest.raises(CorpusError, match=r"a\.parquet.*no 'text'.*'texts'.*corpus\.text_column"):
        read(tmp_path, "a.parquet", parquet({"texts": ["x"]}))
    with pytest.raises(CorpusError, match=r"a\.parquet.*int64"):
        read(tmp_path, "a.parquet", parquet({"text": [1]}))


@pytest.mark.parametrize("twice", ["text", "id"])
def test_a_column_twice_is_refused_by_name_and_no_value_wins_silently(tmp_path: Path, twice: str) -> None:
    line = f'{{"id": "a", "text": "b", "{twice}": "c", "more": 1, "more": 2}}'
    records = read(tmp_path, "a.jsonl", f'{line}\n{{"text": "d", "more": 1, "more": 2}}'.encode())
    assert broken(records) == [(1, f"has the column {twice!r} twice")] and texts(records) == ["d"]
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["id", "text", twice])
    sink = io.BytesIO()
    pq.write_table(table, sink)
    with pytest.raises(CorpusError, match=rf"a\.parquet.*'{twice}' twice"):
        read(tmp_path, "a.parquet", sink.getvalue())


def column_of(kind: pa.DataType) -> pa.Array:
    """A good text, one that is not UTF-8, null, and a good one."""
    if pa.types.is_dictionary(kind):
        values = column_of(kind.value_type).drop_null()  # Parquet has no dictionary with a null in it
        return pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2], pa.int32()), values)
    raw = pa.array([b"good", b"\xff", None, b"fine"])
    match str(kind):
        case "large_string":
            return raw.cast(pa.large_binary()).view(kind)
        case "string":
            return raw.view(kind)
        case "string_view":
            return raw.view(pa.string()).cast(kind)
    return raw.cast(kind)


KINDS = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())
STORED_KINDS = [
    *KINDS,
    pa.string_view(),
    pa.binary_view(),
    *(pa.dictionary(pa.int32(), kind) for kind in KINDS),
]


@pytest.mark.parametrize("kind", STORED_KINDS, ids=str)
def test_invalid_utf8_in_parquet_does_not_take_its_batch_with_it(tmp_path: Path, kind: pa.DataType) -> None:
    records = read(tmp_path, "a.parquet", parquet({"text": column_of(kind)}))
    assert texts(records) == ["good", "fine"]
    assert broken(records) == [(2, "invalid UTF-8 at byte 0"), (3, "'text' is null, not a string")]


def test_an_id_that_is_no_unicode_costs_no_document(tmp_path: Path) -> None:
    content = parquet({"text": TEXTS, "id": column_of(pa.string())})
    names = [record.id for record in read(tmp_path, "a.parquet", content)]
    assert names == ["good", "\\xff", "a.parquet:3", "fine"]
    [record] = read(tmp_path, "a.jsonl", b'{"id": "\\ud800x", "text": "good"}')
    assert isinstance(record, Document) and record.id == "\\ud800x"
    assert record.id.encode()


EXTREME = pa.array([-(2**62), 2**62, None], pa.int64())


@pytest.mark.parametrize(
    "ids",
    [
        *(
            EXTREME.view(kind)
            for kind in (pa.timestamp("us"), pa.timestamp("ms", "No/City"), pa.duration("us"))
        ),
        EXTREME.view(pa.date64()),
        pa.array([-(2**31), 2**31 - 1, None], pa.int32()).view(pa.date32()),
        EXTREME.view(pa.time64("us")),
        pa.array([float("nan"), -float("inf"), None]),
        pa.array([[1], [], None]),
        pa.array([{"a": 1}, {"a": None}, None]),
        pa.array([None, None, None], pa.null()),
        pa.array([b"\xff", b"", None]),
    ],
    ids=lambda ids: str(ids.type),
)
def test_an_id_in_parquet_that_is_no_name_costs_no_document(tmp_path: Path, ids: pa.Array) -> None:
    records = read(tmp_path, "a.parquet", parquet({"text": TEXTS[:3], "id": ids}))
    assert texts(records) == TEXTS[:3]
    assert [record.id for record in records] == [f"a.parquet:{line}" for line in (1, 2, 3)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_torn_compressed_shard_gives_what_is_whole_and_says_so(tmp_path: Path, name: str) -> None:
    lines = [{"text": f"{number:09} {number**5}"} for number in range(20_000)]
    content = packed(jsonl(lines), name[-4:].removeprefix("l"))
    records = read(tmp_path, name, content[: len(content) // 2])
    found = texts(records)
    assert found == [line["text"] for line in lines[: len(found)]]
    assert 1_000 < len(found) < 20_000
    [(_, reason)] = broken(records)
    assert "cannot be read any further" in reason


def test_something_else_named_parquet_or_gz_is_set_aside(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.jsonl.gz", "a.txt.zst"):
        assert "cannot be read" in broken(read(tmp_path, name, b"plain text of some length"))[0][1]


class _Fails(LocalStore):
    def open(self, path: str) -> BinaryIO:
        class File(io.BytesIO):
            def read(self, *_: Any) -> bytes:
                raise OSError("connection reset")

        return File(bytes(10_000))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet"])
def test_a_failing_store_is_never_taken_for_a_broken_record(tmp_path: Path, name: str) -> None:
    store = _Fails(f"file://{tmp_path}")
    with pytest.raises(StorageError, match="connection reset"):
        list(read_documents(store, RawShard("s", name, 1, "1"), CorpusConfig()))


@given(
    parts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r")), max_size=30),
    limit=st.integers(8, 200),
)
def test_a_long_plain_text_is_cut_without_losing_a_character(parts: list[str], limit: int) -> None:
    text = "\n".join(parts)
    config = CorpusConfig(max_record_bytes=limit, normalization="none")
    store = _InMemory(text.encode())
    records = list(read_documents(store, RawShard("s", "a.txt", 1, "1"), config))  # type: ignore[arg-type]
    documents = [record for record in records if isinstance(record, Document)]
    assert all(record.num_bytes <= limit + 1 for record in documents)
    # Stretches of nothing but blank space are set aside as empty.
    assert "".join("".join(texts(records)).split()) == "".join(text.split())


class _InMemory:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def open(self, path: str) -> BinaryIO:
        return io.BytesIO(self._content)


@pytest.mark.slow
def test_a_large_shard_is_read_in_bounded_memory(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    lines = jsonl([{"text": f"{number} " + "word " * 200} for number in range(2_000)])
    store.put("a.jsonl.gz", b"".join([gzip.compress(lines)] * 40))  # 80 MB of text
    shard = RawShard("s", "a.jsonl.gz", 0, "1")
    tracemalloc.start()
    count = sum(1 for _ in read_documents(store, shard, CorpusConfig()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 80_000
    assert peak < 4 * 2**20


@given(st.text())
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    for form in ("none", "NFC", "NFKC"):
        once = normalise(text, form)
        assert normalise(once, form) == once


def test_equal_texts_in_other_forms_are_equal_after_normalising() -> None:
    assert normalise("cafe\u0301\r\nend\n") == normalise("\ufeffcaf\u00e9\nend") == "café\nend"
    assert normalise("ﬁ", "NFKC") == "fi" and normalise("ﬁ", "NFC") == "ﬁ"


def shards(sizes: Sequence[int]) -> list[RawShard]:
    return [RawShard("s", f"{index:06}.jsonl", size, "1") for index, size in enumerate(sizes)]


def test_a_shard_that_is_added_changes_few_pieces() -> None:
    before = shards([1_000] * 20_000)
    pieces = group_shards(before)
    assert [shard for piece in pieces for shard in piece] == before
    assert 20 < len(pieces) < 400
    added = sorted([*before, RawShard("s", "010000a.jsonl", 500, "1")], key=lambda shard: shard.path)
    assert len(set(group_shards(added)) - set(pieces)) <= 20
    assert [len(piece) for piece in group_shards(shards([2**30] * 3))] == [1, 1, 1]


def test_pieces_never_mix_sources() -> None:
    mixed = [replace(shard, source=source) for source in "ab" for shard in shards([10] * 5)]
    assert all(len({shard.source for shard in piece}) == 1 for piece in group_shards(mixed))


def test_fragments_grow_with_the_corpus_in_four_steps() -> None:
    sizes = [fragment_tokens_for(CorpusConfig(), shards([2**power])) for power in range(10, 50)]
    assert sorted(sizes) == sizes
    assert sorted(set(sizes)) == [4_096, 16_384, 65_536, 262_144, 1_048_576]
    assert fragment_tokens_for(CorpusConfig(fragment_tokens=999), shards([2**40])) == 999


def test_listing_names_every_problem_at_once(tmp_path: Path) -> None:
    open_store(str(tmp_path)).put("one/readme.md", b"x")
    config = CorpusConfig(
        sources={"a": f"{tmp_path}/one", "b": f"{tmp_path}/none"},
        splits=SplitConfig(test_shards=("hamlet*",)),
    )
    with pytest.raises(CorpusError) as raised:
        list_raw_shards(config)
    unknown, absent, named = str(raised.value).splitlines()
    assert "readme.md" in unknown and ".jsonl" in unknown and "corpus.include" in unknown
    assert f"no documents at {tmp_path}/none" in absent
    assert "corpus.splits.test_shards" in named and "hamlet*" in named


def test_listing_is_sorted_and_leaves_out_markers(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for name in ("b.jsonl", "a/x.jsonl.zst", "a-b.parquet", "_SUCCESS", ".hidden.jsonl", "a/_x.txt", "c.txt"):
        store.put(name, b"x")
    config = CorpusConfig(uri=str(tmp_path), include=("*.jsonl*", "*.parquet"))
    assert [shard.path for shard in list_raw_shards(config)] == ["a-b.parquet", "a/x.jsonl.zst", "b.jsonl"]


def from_git(folder: Path) -> list[str]:
    """A checkout, with an environment full of links, and an editor's lock, which is a link to nothing."""
    (folder / "docs").mkdir()
    (folder / "docs" / "poem.txt").write_text("to be")
    (folder / "MERGE_MSG.txt").write_text("or not")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "text"]):
        subprocess.run([*git, *command], check=True)
    (folder / ".git" / "notes.txt").write_text("hidden")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "python").symlink_to(sys.executable)
    (folder / ".venv" / "lib64").symlink_to("lib")
    (folder / "docs" / ".#poem.txt").symlink_to("somebody@host.1")
    return ["MERGE_MSG.txt", "docs/poem.txt"]


def from_spark(folder: Path) -> list[str]:
    """A partitioned table, whose job left a part of an attempt that failed, checksums, and its log."""
    table = pa.table({"text": ["to be", "or not"], "lang": ["en", "__HIVE_DEFAULT_PARTITION__"]})
    dataset.write_dataset(
        table,
        folder,
        format="parquet",
        partitioning=dataset.partitioning(pa.schema([("lang", pa.string())]), flavor="hive"),
        basename_template="part-0000{i}-5c0d-c000.snappy.parquet",
    )
    parts = [str(path.relative_to(folder)) for path in folder.rglob("*.parquet")]
    for part in parts:
        (folder / part).with_name(f".{Path(part).name}.crc").write_bytes(b"crc")
        attempt = folder / "_temporary" / "0" / "_temporary" / "attempt_1" / Path(part).name
        attempt.parent.mkdir(parents=True, exist_ok=True)
        attempt.write_bytes((folder / part).read_bytes())
    for name in ("_SUCCESS", "_delta_log/1.checkpoint.parquet", "_v=1/part-0.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    return [*parts, "_v=1/part-0.parquet"]  # Spark itself reads a partition by a column of such a name


def from_jupyter(folder: Path) -> list[str]:
    for name in ("texts.jsonl", ".ipynb_checkpoints/texts-checkpoint.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(jsonl([{"text": "to be"}]))
    return ["texts.jsonl"]


def from_mac(folder: Path) -> list[str]:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as packed:
        for name in ("corpus/a.txt", "corpus/.DS_Store", "__MACOSX/corpus/._a.txt", "__MACOSX/._corpus"):
            packed.writestr(name, "x")
    shutil.unpack_archive(folder.with_suffix(".zip"), folder)
    return ["corpus/a.txt"]


@pytest.mark.parametrize("tool", [from_git, from_spark, from_jupyter, from_mac])
def test_what_other_tools_hide_in_a_folder_is_no_corpus_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, tool: Callable[[Path], list[str]]
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    expected = sorted(tool(raw))
    config = CorpusConfig(uri=str(raw), prepared=f"{tmp_path}/prepared")
    assert [shard.path for shard in list_raw_shards(config)] == expected
    assert corpus_problems(replace(config, include=(expected[-1],))) == []
    hidden = sum(not path.is_symlink() for path in raw.rglob("*") if path.is_file()) - len(expected)
    [line] = caplog.messages
    assert f"{raw}: left out {hidden:,} files" in line and hidden > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("."),
        lambda path: path.symlink_to("/etc/passwd"),
        lambda path: path.symlink_to("/dev/zero"),
        os.mkfifo,
    ],
    ids=["to-nothing", "loop", "to-its-folder", "leading-out", "to-a-device", "fifo"],
)
def test_what_is_no_file_of_the_folder_is_one_line_before_a_worker_starts(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    config = CorpusConfig(uri=f"{tmp_path}/raw", prepared=f"{tmp_path}/prepared")
    open_store(config.uri).put("deep/a.jsonl", jsonl([{"text": "to be"}]))
    make(tmp_path / "raw" / "deep" / "b.jsonl")
    [problem] = corpus_problems(config)
    assert problem.startswith(f"file://{tmp_path}/raw/deep/b.jsonl: cannot ") and ";" in problem
    assert not (tmp_path / "prepared").exists()


def test_names_that_no_store_can_work_with_are_each_told_before_a_worker_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CorpusConfig(uri=f"{tmp_path}/raw", prepared=f"{tmp_path}/prepared")
    store = open_store(config.uri)
    for name in ("a.jsonl", "\udcff.jsonl"):
        store.put(name, jsonl([{"text": "to be"}]))
    [stray] = corpus_problems(config)
    assert stray.startswith(f"{tmp_path}/raw/\\xff.jsonl: its name is not UTF-8")
    assert corpus_problems(replace(config, include=("a*",))) == []
    with GoogleStub("bucket") as stub:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{stub.port}")
        keys = ("", "/", "/a.jsonl", "/.", "/..", "/../a.jsonl", "/./a.jsonl", "//a.jsonl", "/b//a.jsonl")
        for key in keys:
            stub.insert(f"raw{key}", jsonl([{"text": "to be"}]), {}, is_conditional=False)
        [slashes] = corpus_problems(replace(config, uri="gs://bucket/raw"))
        assert slashes.startswith("gs://bucket/raw//a.jsonl: its key has two slashes in a row")
        del stub.objects["raw//a.jsonl"]
        on_google = replace(config, uri="gs://bucket/raw")
        assert corpus_problems(on_google) == []
        shards = list_raw_shards(on_google)
        assert [shard.path for shard in shards] == ["a.jsonl", "b//a.jsonl"]
        for shard in shards:
            assert texts(list(read_documents(open_store(on_google.uri), shard, on_google))) == ["to be"]


def test_a_shard_written_anew_has_another_version(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    config = CorpusConfig(uri=str(tmp_path))
    store.put("a.jsonl", b'{"text": "x"}')
    before = list_raw_shards(config)
    assert list_raw_shards(config) == before
    store.put("a.jsonl", b'{"text": "y"}')
    assert list_raw_shards(config) != before


def test_problems_are_found_before_any_worker_starts(tmp_path: Path) -> None:
    open_store(f"{tmp_path}/raw").put("a.jsonl", jsonl([{"content": "x"}] * 30))
    config = CorpusConfig(uri=f"{tmp_path}/raw", prepared=f"{tmp_path}/prepared")
    [problem] = corpus_problems(config)
    assert "a.jsonl" in problem and "no 'text'" in problem and "content" in problem
    assert corpus_problems(replace(config, text_column="content")) == []
    [absent] = corpus_problems(replace(config, uri=f"{tmp_path}/nowhere"))
    assert "nowhere" in absent


def test_a_corpus_is_not_prepared_into_its_own_input(tmp_path: Path) -> None:
    raw, link = tmp_path / "raw", tmp_path / "link"
    open_store(str(raw)).put("a.jsonl", jsonl([{"text": "x"}] * 30))
    link.symlink_to(raw)
    for prepared in (raw, raw / "prepared", link / "prepared", link):
        [problem] = corpus_problems(CorpusConfig(uri=str(raw), prepared=str(prepared)))
        assert f"corpus.prepared={prepared} lies in the source" in problem and "beside it" in problem
    config = CorpusConfig(uri=str(raw), prepared=f"{raw}/prepared")
    assert corpus_problems(replace(config, include=("a*.jsonl",))) == []
    for prepared in (f"{raw}/_prepared", f"{raw}-prepared", str(tmp_path)):  # hidden; beside; around it
        assert corpus_problems(replace(config, prepared=prepared)) == []


def test_a_config_with_several_mistakes_names_each() -> None:
    config = CorpusConfig(
        uri="x",
        sources={"a": "y"},
        prepared="y/inside",
        set_aside_limit=2,
        splits=SplitConfig(validation=0.7, test=0.7),
    )
    problems = list(config.problems("corpus"))
    for part in ("corpus.uri", "y/inside", "set_aside_limit=2", "leave nothing to train on"):
        assert sum(part in problem for problem in problems) == 1, part


@pytest.mark.parametrize(
    ("source", "prepared"),
    [
        ("corpora", "corpora/prepared"),
        ("corpora/", "./corpora/prepared"),
        ("corpora", "HERE/corpora/prepared"),
        ("file://HERE/corpora", "corpora"),
        ("HERE/corpora", "other/../corpora/x/y"),
        ("corpora", "link/prepared"),
        (".", "prepared"),
        ("/", "prepared"),
        ("s3://bucket", "s3://bucket/prepared/"),
        ("s3://bucket/raw/", "s3://bucket/raw/prepared"),
        ("gs://bucket/raw", "gs://bucket/raw"),
    ],
)
def test_a_prepared_corpus_inside_its_source_is_refused_however_it_is_spelled(
    source: str, prepared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("corpora")
    source, prepared = (uri.replace("HERE", str(tmp_path)) for uri in (source, prepared))
    [problem] = CorpusConfig(uri=source, prepared=prepared).problems("corpus")
    assert f"corpus.prepared={prepared} lies inside source 'corpus' ({source})" in problem


@pytest.mark.parametrize(
    ("source", "prepared"),
    [
        ("corpora/raw", "corpora/prepared"),
        ("corpora/raw", "corpora/raw-prepared"),
        ("corpora/raw", "corpora"),
        ("s3://bucket/raw", "s3://bucket-raw/raw"),
        ("s3://bucket/raw", "gs://bucket/raw/prepared"),
        ("/raw", "s3://raw/prepared"),
    ],
)
def test_a_prepared_corpus_beside_its_source_is_not(source: str, prepared: str) -> None:
    assert list(CorpusConfig(uri=source, prepared=prepared).problems("corpus")) == []
