"""Laws of preparing whatever a bucket holds: every format in one go, thousands of tiny files, ids by any name, and a
table in which every count is that of the documents."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.storage.uris import Store, open_store
from data.preparing.corpus import corpus_table, prepare
from data.reading.raw_shards import CorpusConfig, group_shards, list_raw_shards
from data.reading.splits import SplitConfig
from data.shards.manifest import SPLITS
from data.tokens.tokenizer import Encoder, TokenizerConfig, load_tokenizer, train_tokenizer
from tests.test_prepare import BOUNDARY, documents, one_by_one, text_of

NUM_TINY = 2_000


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    fixed = train_tokenizer([text_of(number) for number in range(200)], TokenizerConfig(vocab_size=300))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(fixed.json)
    return TokenizerConfig(path=str(path))


def jsonl(numbers: range, id_column: str = "id") -> bytes:
    records = ({id_column: f"doc/{number}", "text": text_of(number)} for number in numbers)
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def parquet(numbers: range, id_column: str = "id") -> bytes:
    sink = io.BytesIO()
    columns = {id_column: [f"doc/{n}" for n in numbers], "text": [text_of(n) for n in numbers]}
    pq.write_table(pa.table(columns), sink, row_group_size=7)
    return sink.getvalue()


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def put_all_formats(store: Store) -> dict[str, str]:
    """Raw shards of each kind; the texts by id."""
    texts = {f"doc/{number}": text_of(number) for number in range(120)}
    store.put("a.jsonl", jsonl(range(0, 30)))
    store.put("b.ndjson.gz", gzip.compress(jsonl(range(30, 60))))
    store.put("c/c.jsonl.zst", zstd(jsonl(range(60, 90))))
    store.put("d.parquet", parquet(range(90, 120)))
    for number, (path, pack) in enumerate(
        {"e.txt": bytes, "f.txt.gz": gzip.compress, "g.txt.zst": zstd}.items(), 120
    ):
        store.put(path, pack(text_of(number).encode()))
        texts[path] = text_of(number)
    return texts


@pytest.mark.slow
def test_mixed_formats_and_thousands_of_tiny_shards_come_out_in_one_go(
    tmp_path: Path, tokenizer: TokenizerConfig
) -> None:
    expected = put_all_formats(open_store(f"{tmp_path}/mixed"))
    (tmp_path / "tiny").mkdir()
    for number in range(1_000, 1_000 + NUM_TINY):
        (tmp_path / "tiny" / f"{number}.txt").write_text(text_of(number))
        expected[f"{number}.txt"] = text_of(number)
    config = CorpusConfig(
        sources={"mixed": f"{tmp_path}/mixed", "tiny": f"{tmp_path}/tiny"},
        prepared=f"{tmp_path}/prepared",
        tokenizer=tokenizer,
        splits=SplitConfig(validation=0.1, test=0.1),
    )
    assert len(group_shards(list_raw_shards(config))) < NUM_TINY / 50
    manifest = prepare(config, fan_out=one_by_one)
    found = {name: each for split in SPLITS for name, each in documents(config, manifest, split).items()}
    encoder = Encoder(load_tokenizer(open_store(config.prepared), manifest.tokenizer, BOUNDARY))
    tokens = encoder.encode(list(expected.values()))
    assert found == {name: tuple(each.tolist()) for name, each in zip(expected, tokens, strict=True)}
    assert manifest.set_aside == {"mixed": 0, "tiny": 0}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_documents_are_named_by_the_configured_column_and_where_there_is_none_by_their_place(
    tmp_path: Path, tokenizer: TokenizerConfig, name: str
) -> None:
    raw = open_store(f"{tmp_path}/raw")
    raw.put(name, (jsonl if name.endswith("jsonl") else parquet)(range(50), "url"))

    def ids(id_column: str, pattern: str) -> list[set[str]]:
        """Of each split, the test split being what the pattern names."""
        config = CorpusConfig(
            uri=raw.uri,
            prepared=f"{tmp_path}/prepared",
            id_column=id_column,
            tokenizer=tokenizer,
            splits=SplitConfig(test_documents=(pattern,), validation=0.2, test=0),
        )
        manifest = prepare(config, fan_out=one_by_one)
        return [set(documents(config, manifest, split)) for split in SPLITS]

    by_column = ids("url", "doc/2?")
    assert by_column[2] == {f"doc/{number}" for number in range(20, 30)}
    assert set().union(*by_column) == {f"doc/{number}" for number in range(50)}
    by_place = ids("id", f"{name}:2?")
    assert by_place[2] == {f"{name}:{line}" for line in range(20, 30)}
    assert set().union(*by_place) == {f"{name}:{line}" for line in range(1, 51)}


def test_each_column_of_the_table_counts_what_came_out(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    texts = {
        ("train", "books"): ["one text", "another, longer text"],
        ("train", "web"): ["a third"],
        ("validation", "books"): ["chosen by"],
        ("test", "books"): ["judged by"],
    }
    copies = {("train", "books"): ["one text"], ("train", "web"): ["judged by", "chosen by", "one text"]}
    broken = {"books": 1, "web": 2}
    for source in broken:
        raw = open_store(f"{tmp_path}/{source}")
        for split in SPLITS:
            lines = [*texts.get((split, source), []), *copies.get((split, source), [])]
            content = [json.dumps({"text": text}) for text in lines] + ["{"] * broken[source] * (
                split == "train"
            )
            if content:
                raw.put(f"{split}.jsonl", "\n".join(content).encode())
    config = CorpusConfig(
        sources={source: f"{tmp_path}/{source}" for source in broken},
        prepared=f"{tmp_path}/prepared",
        tokenizer=tokenizer,
        splits=SplitConfig(
            validation=0, test=0, validation_shards=("validation.*",), test_shards=("test.*",)
        ),
        set_aside_limit=0.5,
    )
    manifest = prepare(config, fan_out=one_by_one)
    encoder = Encoder(load_tokenizer(open_store(config.prepared), manifest.tokenizer, BOUNDARY))
    rows = []
    for split in SPLITS:
        for source in broken:
            own = texts.get((split, source), [])
            num_bytes = sum(len(text.encode()) for text in own)
            tokens = sum(len(each) for each in encoder.encode(own))
            ratio = f"{num_bytes / tokens:.3f}" if tokens else "0.000"
            left_out = len(copies.get((split, source), []))
            rows.append((split, source, str(len(own)), str(num_bytes), str(tokens), ratio, str(left_out), ""))
    rows += [("none", source, "", "", "", "", "", str(count)) for source, count in broken.items()]
    table = corpus_table(manifest)
    columns = {" ".join(str(column.header).split()): list(column.cells) for column in table.columns}
    assert list(columns) == [
        *("split", "source", "documents", "bytes", "tokens", "bytes /token", "dupli- cates", "set aside")
    ]
    assert list(zip(*columns.values(), strict=True)) == rows
    assert manifest.digest in str(table.title)
