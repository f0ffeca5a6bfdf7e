"""Laws of the manifest: named by all of its content, and refused when that was altered."""

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from cluster.configuration.config import from_dict
from cluster.storage.uris import Store, open_store
from data.shards.manifest import (
    FRAGMENT_DTYPES,
    Fragments,
    Manifest,
    ManifestError,
    Shard,
    manifest_path,
    read_manifest,
    write_manifest,
)
from trainers.pretrain import pinned_or_prepared
from trainers.pretraining.config import PretrainConfig, run_store

SHARDS = (
    Shard("shards/a.parquet", "train", "plays", 1_000, "aa"),
    Shard("shards/b.parquet", "test", "plays", 500, "bb"),
    Shard("shards/c.parquet", "train", "poems", 700, "cc"),
)
FRAGMENTS = Fragments.from_columns(
    {
        "shard": [0, 0, 1, 2],
        "row_group": [0, 1, 0, 0],
        "num_tokens": [100, 50, 30, 20],
        "num_bytes": [400, 150, 90, 80],
        "num_documents": [3, 2, 1, 1],
        "checksum": [1, 2**32 - 1, 3, 4],
    }
)
FIRST_DIGEST = "ce1ea09f131eb1f6"
"""Of `MANIFEST`, in the first format too."""
MANIFEST = Manifest(
    tokenizer="0123456789abcdef",
    vocab_size=4_096,
    boundary_id=0,
    token_dtype="uint16",
    sources=("plays", "poems"),
    shards=SHARDS,
    fragments=FRAGMENTS,
    duplicates={"train": {"plays": 2, "poems": 0}},
    set_aside={"plays": 1, "poems": 0},
)


def test_reading_gives_what_was_written_by_digest_and_as_latest(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_manifest(store, replace(MANIFEST, boundary_id=7))
    write_manifest(store, MANIFEST)
    for name in ("latest", MANIFEST.digest):
        manifest = read_manifest(store, name)
        assert manifest.digest == MANIFEST.digest
        assert manifest.shards == SHARDS and manifest.sources == MANIFEST.sources
        for name, dtype in FRAGMENT_DTYPES.items():
            column = getattr(manifest.fragments, name)
            assert column.dtype == dtype and column.tolist() == getattr(FRAGMENTS, name).tolist()


@pytest.mark.slow
def test_a_manifest_of_half_a_million_shards_is_read_back_as_written(tmp_path: Path) -> None:
    num_shards = 500_000
    shards = tuple(
        Shard(f"shards/{number:064x}.parquet", "train", "plays", number, f"{number:064x}")
        for number in range(num_shards)
    )
    of_shard = np.repeat(np.arange(num_shards), np.arange(num_shards) % 3)  # some have no fragment
    columns = {name: np.arange(len(of_shard)) for name in FRAGMENT_DTYPES} | {"shard": of_shard}
    large = replace(MANIFEST, shards=shards, fragments=Fragments.from_columns(columns))
    store = open_store(str(tmp_path))
    write_manifest(store, large)
    found = read_manifest(store, large.digest)
    assert (
        len(found.shards) == num_shards and found.shards[::997] == shards[::997]
    )  # the digest covers the others
    assert np.array_equal(found.fragments.shard, of_shard)


def test_a_manifest_without_a_shard_is_read_back(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    empty = replace(
        MANIFEST, shards=(), fragments=Fragments.from_columns({name: [] for name in FRAGMENT_DTYPES})
    )
    write_manifest(store, empty)
    assert read_manifest(store).digest == empty.digest


def test_the_same_manifest_is_always_the_same_bytes(tmp_path: Path) -> None:
    one, two = (open_store(str(tmp_path / name)) for name in ("one", "two"))
    path = write_manifest(one, MANIFEST)
    assert write_manifest(two, replace(MANIFEST)) == path and two.read(path) == one.read(path)


def put_in_format(store: Store, name: str) -> None:
    """The file of `MANIFEST` as the first format has it: a row per fragment, all else as JSON; named `name` there."""
    header = {key: value for key, value in vars(MANIFEST).items() if key not in ("fragments", "digest")}
    header |= {"format": name, "shards": [asdict(shard) for shard in SHARDS]}
    table = pa.table({column: getattr(FRAGMENTS, column) for column in FRAGMENT_DTYPES})
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"manifest": json.dumps(header)}), sink)
    store.put(manifest_path(FIRST_DIGEST), sink.getvalue().to_pybytes())


def test_a_manifest_of_the_first_format_is_read_and_its_corpus_keeps_its_name(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    put_in_format(store, "token-manifest-1")
    assert read_manifest(store, FIRST_DIGEST).shards == SHARDS
    assert MANIFEST.digest == FIRST_DIGEST


def test_a_manifest_of_another_format_is_refused_with_path_and_remedy(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    put_in_format(store, "token-manifest-9")
    with pytest.raises(ManifestError, match=f"{FIRST_DIGEST}.*token-manifest-9.*data/prepare.py again"):
        read_manifest(store, FIRST_DIGEST)


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": "f" * 16},
        {"vocab_size": 4_097},
        {"boundary_id": 1},
        {"token_dtype": "uint32"},
        {"sources": ("plays",)},
        {"shards": SHARDS[:2]},
        {"duplicates": {}},
        {"set_aside": {}},
        *(
            {"fragments": replace(FRAGMENTS, **{name: getattr(FRAGMENTS, name)[::-1].copy()})}
            for name in ("shard", "row_group", "num_tokens", "num_bytes", "num_documents", "checksum")
        ),
    ],
    ids=lambda change: "-".join(change),
)
def test_digest_covers_every_field(change: dict) -> None:
    assert replace(MANIFEST, **change).digest != MANIFEST.digest


def test_a_manifest_of_other_content_than_its_name_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_manifest(store, MANIFEST)
    other = replace(MANIFEST, boundary_id=9)
    write_manifest(store, other)
    store.put(manifest_path(MANIFEST.digest), store.read(manifest_path(other.digest)))
    with pytest.raises(ManifestError, match=f"{MANIFEST.digest}.*altered.*{other.digest}"):
        read_manifest(store, MANIFEST.digest)


def test_a_torn_or_absent_manifest_is_refused_with_its_path(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(ManifestError, match=r"no manifest.*data/prepare\.py"):
        read_manifest(store)
    path = write_manifest(store, MANIFEST)
    whole = store.read(path)
    for torn in (whole[:-20], whole[:-2_000] + bytes(1_992) + whole[-8:]):  # the footer's end, its contents
        store.put(path, torn)
        with pytest.raises(ManifestError, match=MANIFEST.digest):
            read_manifest(store)


def test_select_gives_the_fragments_of_a_split_and_source() -> None:
    assert MANIFEST.select("train").tolist() == [0, 1, 3]
    assert MANIFEST.select("train", "poems").tolist() == [3]
    assert MANIFEST.select("validation").tolist() == []
    with pytest.raises(ManifestError, match="validation"):
        MANIFEST.select("dev")
    with pytest.raises(ManifestError, match="plays, poems"):
        MANIFEST.select("train", "novels")


def test_summary_adds_up_to_the_counts_of_the_fragments() -> None:
    summary = MANIFEST.summary()
    plays = summary["splits"]["train"]["plays"]
    assert plays == {
        "fragments": 2,
        "documents": 5,
        "bytes": 550,
        "tokens": 150,
        "bytes_per_token": 550 / 150,
        "duplicates": 2,
    }
    assert summary["set_aside"] == {"plays": 1, "poems": 0}
    tokens = [counts["tokens"] for split in summary["splits"].values() for counts in split.values()]
    assert sum(tokens) == int(np.sum(FRAGMENTS.num_tokens))


def test_a_run_on_a_manifest_without_hashes_says_so_and_how_to_get_them(tmp_path: Path) -> None:
    config = from_dict(
        PretrainConfig,
        {
            "run": {"name": "first", "storage": f"{tmp_path}/runs"},
            "corpus": {"uri": f"{tmp_path}/raw", "prepared": f"{tmp_path}/prepared"},
        },
    )
    store, run, said = open_store(config.corpus.prepared), run_store(config), io.StringIO()
    write_manifest(store, MANIFEST)
    run.put("manifest.json", json.dumps({"digest": MANIFEST.digest}).encode())
    assert pinned_or_prepared(config, Console(file=said, width=1_000)).digest == MANIFEST.digest
    (line,) = said.getvalue().splitlines()
    assert MANIFEST.digest in line and "CRC-32 alone" in line and "data/prepare.py" in line
