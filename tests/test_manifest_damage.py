"""A damaged manifest is refused in one line that names the file and the remedy, and takes little memory."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.storage.uris import Store, open_store
from data.reading.parquet_claims import claims
from data.reading.parquet_footer import FooterError
from data.shards.manifest import ManifestError, manifest_path, read_manifest, write_manifest
from data.shards.manifest_table import FIRST_FORMAT, FORMAT, UNHASHED_FORMAT
from tests.test_manifest import FIRST_DIGEST, MANIFEST, put_in_format
from tests.token_corpus import put_token_corpus

FORMATS = (FIRST_FORMAT, UNHASHED_FORMAT, FORMAT)


def put_manifest(store: Store, written: str) -> str:
    """A good manifest of a format; its digest."""
    if written == FIRST_FORMAT:
        put_in_format(store, written)
        return FIRST_DIGEST
    if written == UNHASHED_FORMAT:
        write_manifest(store, MANIFEST)
        return MANIFEST.digest
    return put_token_corpus(store, {("train", "s"): 5, ("test", "s"): 2}, fragment_tokens=50).digest


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One of: some flipped bits, a cut, a part overwritten, a part left out, a part twice."""
    at, length = rng.randrange(len(content)), rng.choice((1, 4, 8, 64))
    match rng.randrange(6):
        case 0 | 1:
            changed = bytearray(content)
            for _ in range(rng.choice((1, 1, 1, 2, 5))):
                changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            return bytes(changed)
        case 2:
            return content[:at]
        case 3:
            return (
                content[:at]
                + rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
                + content[at + length :]
            )
        case 4:
            return content[:at] + content[at + length :]
        case _:
            return content[:at] + content[at : at + length] * 2 + content[at + length :]


def assert_refused_in_one_line(store: Store, name: str) -> None:
    with pytest.raises(ManifestError) as refused:
        read_manifest(store, name)
    line = str(refused.value)
    assert "\n" not in line and len(line) < 700
    assert f"{store.uri}/manifests/" in line and "run data/prepare.py again" in line


@pytest.mark.parametrize("written", FORMATS)
@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 3_000), marks=pytest.mark.slow)], ids=str
)
def test_any_damage_of_a_manifest_is_told_in_one_line(tmp_path: Path, written: str, seeds: range) -> None:
    store = open_store(str(tmp_path))
    name = put_manifest(store, written)
    whole = store.read(manifest_path(name))
    refused = 0
    for seed in seeds:
        content = damaged(whole, random.Random(seed))
        store.put(manifest_path(name), content)
        try:
            assert read_manifest(store, name).digest == name  # where nothing that is read was touched
        except ManifestError:
            refused += 1
            assert_refused_in_one_line(store, name)
    assert refused > 0.7 * len(seeds)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"../../secret",
        b"\n",
        b"x" * 16,
        b"0" * 15,
        b"0" * 33,
        b"0" * 10_000,
        b"latest",
        b"{}",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_damaged_name_of_the_latest_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    store = open_store(str(tmp_path))
    name = put_manifest(store, FORMAT)
    store.put("manifests/latest", content)
    assert_refused_in_one_line(store, "latest")
    assert read_manifest(store, name).digest == name


@pytest.mark.parametrize("name", ["../x", "x", "", "0" * 17, "A" * 16])
def test_what_is_no_digest_names_no_manifest(tmp_path: Path, name: str) -> None:
    with pytest.raises(ManifestError, match="names no manifest"):
        read_manifest(open_store(str(tmp_path)), name)


def test_a_manifest_that_is_larger_than_any_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    name = put_manifest(store, FORMAT)
    monkeypatch.setattr("data.shards.manifest.MANIFEST_BYTES", 1_000)
    monkeypatch.setattr(type(store), "read", lambda *_: pytest.fail("it was read"))
    assert_refused_in_one_line(store, name)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"5",
        b'{"format": "token-manifest-3"}',
        b'{"format": []}',
        b"[" * 50_000,
        b'{"format": "token-manifest-1"}',
    ],
    ids=lambda header: repr(header[:30]),
)
def test_a_header_that_no_run_wrote_is_told_in_one_line(tmp_path: Path, header: bytes) -> None:
    store = open_store(str(tmp_path))
    name = put_manifest(store, FORMAT)
    table = pq.read_table(pa.BufferReader(store.read(manifest_path(name))))
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"manifest": header}), sink)
    store.put(manifest_path(name), sink.getvalue().to_pybytes())
    assert_refused_in_one_line(store, name)


# --- bombs ---


def put_table(store: Store, name: str, table: pa.Table, written: str, **options) -> bytes:
    header = {
        key: value for key, value in vars(MANIFEST).items() if key not in ("fragments", "digest", "shards")
    }
    sink = pa.BufferOutputStream()
    metadata = {"manifest": json.dumps(header | {"format": written})}
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd", **options)
    content = sink.getvalue().to_pybytes()
    store.put(manifest_path(name), content)
    return content


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the files that Arrow is given to decode."""
    given, read = list[int](), pq.ParquetFile.read

    def noting(self, *arguments, **options):
        given.append(self.metadata.num_rows)
        return read(self, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "read", noting)
    return given


@pytest.mark.parametrize("kind", ["long-list", "many-rows", "long-texts", "wide-page"])
def test_a_small_file_that_claims_a_large_manifest_is_refused_before_it_is_decoded(
    tmp_path: Path, decoded: list[int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.shards.manifest_table.FLOOR_BYTES", 1 << 20)
    store, name, num = open_store(str(tmp_path)), "0" * 16, 3_000_000
    if kind == "long-list":
        table = pa.table({"fragment_row_group": pa.array([np.zeros(num, np.int32)], pa.list_(pa.int32()))})
    elif kind == "many-rows":
        table = pa.table({"path": pa.array(np.zeros(num, np.int8)).cast(pa.string())})
    elif kind == "long-texts":
        table = pa.table({"path": ["x" * 2_000_000]})
    else:
        table = pa.table({"num_bytes": np.zeros(num * 4, np.int64)})
    content = put_table(
        store, name, table, UNHASHED_FORMAT, use_dictionary=kind != "wide-page", data_page_size=1 << 30
    )
    assert len(content) < 100_000
    with pytest.raises(ManifestError, match="was altered .UnpackingError: its .* bytes claim to hold"):
        read_manifest(store, name)
    assert not decoded


def test_one_text_in_very_many_rows_is_refused_before_it_is_multiplied(tmp_path: Path) -> None:
    store, name, num = open_store(str(tmp_path)), "0" * 16, 40_000
    texts = pa.DictionaryArray.from_arrays(np.zeros(num, np.int32), pa.array(["x" * 5_000]))
    columns = {key: texts for key in ("path", "split", "source", "sha256")} | {
        "num_bytes": np.zeros(num, np.int64)
    }
    lists = pa.array([[0]] * num, pa.list_(pa.int64()))
    listed = ("row_group", "num_tokens", "num_bytes", "num_documents", "checksum")
    table = pa.table(columns | {f"fragment_{key}": lists for key in listed})
    content = put_table(store, name, table, UNHASHED_FORMAT)
    assert len(content) < 1_000_000
    with pytest.raises(ManifestError, match="its texts claim 200,000,000 bytes"):
        read_manifest(store, name)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
def test_the_claims_are_those_of_arrows_own_footer(version: str, compression: str) -> None:
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "number": rng.integers(0, 2**40, 50_000),
            "few": pa.array(rng.integers(0, 3, 50_000)).cast(pa.string()).dictionary_encode(),
            "list": pa.array([[1] * (n % 4) for n in range(50_000)]),
            "flag": rng.integers(0, 2, 50_000).astype(bool),
            "nothing": pa.nulls(50_000, pa.float64()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression=compression, data_page_version=version, data_page_size=10_000,
        row_group_size=20_000, write_page_checksum=True,
    )  # fmt: skip
    content = sink.getvalue().to_pybytes()
    footer = pq.read_metadata(pa.BufferReader(content))
    found, num_bytes, num_values = claims(content)
    chunks = [
        footer.row_group(g).column(c) for g in range(footer.num_row_groups) for c in range(footer.num_columns)
    ]
    stated = sum(chunk.total_uncompressed_size for chunk in chunks)
    assert 0.9 * stated < num_bytes <= stated, "it counts the headers too"
    lists = sum(chunk.num_values for chunk in chunks if chunk.path_in_schema.startswith("list"))
    assert num_values == max(50_000, lists)
    assert found.metadata == footer.metadata


def test_no_bytes_in_place_of_a_header_keep_the_walk_busy() -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"number": np.arange(200)}), sink, compression="none", use_dictionary=False)
    content = sink.getvalue().to_pybytes()
    footer_start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    # Lists, sets and structs of long sizes.
    kinds = (0x19, 0x1A, 0x1C, 0xF1, 0xF2, 0xFC, 0xF9, 0xFF, 0x15, 0x18, 0x13, 0x17)
    refused = 0
    for seed in range(2_000):
        rng = random.Random(seed)
        place = rng.choice((4, footer_start))
        junk = bytes(rng.choice(kinds) for _ in range(40))
        try:
            claims(content[:place] + junk + content[place + 40 :])
        except FooterError:
            refused += 1
    assert refused == 2_000
