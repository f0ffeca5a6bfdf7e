"""A sealed record that no run wrote is refused by name, and nothing is read by it: its hash proves no more than that
whoever wrote it can hash."""

import copy
import json
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from cluster.configuration.stored_file import DamagedFileError
from cluster.storage.uris import Store, open_store
from tests.test_checkpoint import CONFIG, KINDS, SHAPES, assert_holds, save, slices_of, state_at
from trainers.checkpoints.commit import (
    RECORD,
    file_path,
    folder_name,
    parse_folder_name,
    read_record,
    seal,
    unseal,
)
from trainers.checkpoints.keeping import (
    CheckpointConfig,
    claim_attempt,
    latest_attempt,
    latest_checkpoint,
    latest_world_size,
)
from trainers.checkpoints.layout import CheckpointError, Extent
from trainers.checkpoints.reader import CheckpointReader
from trainers.checkpoints.writer import HEADER_ROOM_BYTES, CheckpointWriter
from trainers.pretraining.loop import SECTIONS

Content = dict[str, Any]
GOOD, CRAFTED = folder_name(100, 2, 1), folder_name(200, 2, 1)
EMBED = "embed.weight"
JUNK = (
    None, True, -1, 0, 1, 4, 7, 2**31, 2**63, 10**30, 0.5, "", "x", "../../secret", "/etc/passwd",
    "worker-00000-000.safetensors", [], [[]], [0, 11, 0, 0], {}, {"value": []}, "\x1b[31m\n",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def committed_twice(store: Store) -> Content:
    """Two good checkpoints; the content of the newer one's record."""
    save(store, 100)
    path = file_path(save(store, 200), RECORD)
    return unseal(store.read(path), path)


def put_record(store: Store, content: Content) -> None:
    store.put(file_path(CRAFTED, RECORD), seal(content))


def rows(content: Content, name: str = EMBED, kind: str = "value") -> list[list[int]]:
    return content["tensors"][name]["kinds"][kind]


def shift(content: Content, offset_bytes: int) -> None:
    rows(content)[0][3] += offset_bytes


def swap_places(content: Content) -> None:
    """Two ranges of one size in one file: the values of each are where the other's were."""
    of_file = sorted(
        (row[2], row[1] - row[0], index, row)
        for index, tensor in enumerate(content["tensors"].values())
        for kind in tensor["kinds"].values()
        for row in kind
    )
    one, two = next((a[3], b[3]) for a, b in pairwise(of_file) if a[:2] == b[:2])
    one[3], two[3] = two[3], one[3]


def leave_gap(content: Content) -> None:
    rows(content)[0][1] -= 6


def put(*keys: Any, value: Any) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        at: Any = content
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value

    return change


def drop(*keys: Any) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        at: Any = content
        for key in keys[:-1]:
            at = at[key]
        del at[keys[-1]]

    return change


MALFORMED = {
    "gap": leave_gap,
    "offset-wrong-by-4": partial(shift, offset_bytes=4),
    "offset-wrong-by-minus-4": partial(shift, offset_bytes=-4),
    "two-ranges-swapped": swap_places,
    "range-twice": lambda content: rows(content).append(rows(content)[-1]),
    "range-absent": lambda content: rows(content).pop(),
    "empty-range": lambda content: rows(content).insert(0, [0, 0, 0, 64]),
    "kind-without-ranges": put("tensors", EMBED, "kinds", "value", value=[]),
    "tensor-absent": drop("tensors", "scale"),
    "another-shape": put("tensors", EMBED, "shape", value=[7, 12]),
    "absurd-shape": put("tensors", EMBED, "shape", value=[2**62, 2**62]),
    "bad-file-index": lambda content: put("tensors", "scale", "kinds", "value", 0, 2, value=9)(content),
    "negative-file-index": lambda content: put("tensors", "scale", "kinds", "value", 0, 2, value=-1)(content),
    "huge-offset": lambda content: put("tensors", "scale", "kinds", "value", 0, 3, value=2**62)(content),
    "row-of-three": lambda content: rows(content)[0].pop(),
    "no-files": drop("files"),
    "no-step": drop("step"),
    "no-format": drop("format"),
    "unknown-key": put("owner", value="x"),
    "unknown-key-of-a-file": put("files", 0, "mode", value=0o644),
    "unknown-key-of-a-tensor": put("tensors", EMBED, "dtype", value="F16"),
    "path-out-of-the-folder": put("files", 0, "path", value="../../secret"),
    "path-elsewhere": put("files", 0, "path", value="/etc/passwd"),
    "path-of-the-record": put("files", 0, "path", value="COMMIT.json"),
    "file-twice": lambda content: content["files"].append(content["files"][0]),
    "negative-size": put("files", 0, "num_bytes", value=-1),
    "absurd-size": put("files", 0, "num_bytes", value=2**80),
    "size-as-text": put("files", 0, "num_bytes", value="16"),
    "size-as-float": put("files", 0, "num_bytes", value=16.0),
    "step-as-bool": put("step", value=True),
    "hash-of-another-kind": put("files", 0, "sha256", value="x"),
    "without-sums-of-blocks": put("files", 0, "crc32", value=[]),
    "another-sum-of-a-block": put("files", 0, "crc32", 0, value=1),
    "sums-of-no-blocks": put("files", 0, "crc32", value=[1, 2, 3]),
    "tensors-as-list": put("tensors", value=[]),
    "files-as-null": put("files", value=None),
    "run-as-list": put("run", value=[]),
    "format-of-tomorrow": put("format", value=3),
    "format-as-list": put("format", value=[2]),
    "another-name": put("name", value=GOOD),
    "another-step": put("step", value=300),
    "another-world-size": put("world_size", value=3),
}  # fmt: skip


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_a_sealed_record_that_no_run_wrote_is_refused_by_name_and_the_one_before_taken(
    folder: Store, caplog: pytest.LogCaptureFixture, change: Callable[[Content], None]
) -> None:
    content = committed_twice(folder)
    change(content)
    put_record(folder, content)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(folder).name == GOOD
    assert f"checkpoint {CRAFTED} is refused" in caplog.text
    assert f"checkpoints/{CRAFTED}/" in caplog.text.split("taken: ")[1]


@pytest.mark.parametrize("content", [[], "x", 5, None, {"files": {"files": {}}}], ids=str)
def test_a_sealed_record_of_another_make_is_refused_by_name(folder: Store, content: Any) -> None:
    save(folder, 100)
    put_record(folder, content)
    assert latest_checkpoint(folder).name == GOOD


@pytest.mark.parametrize(
    "run", [{}, {"identity": {}}, {"identity": {}, "guard": [], "selection": {}}], ids=str
)
def test_a_record_without_the_trainers_state_is_refused_by_name_and_the_one_before_taken(
    folder: Store, caplog: pytest.LogCaptureFixture, run: Content
) -> None:
    save(folder, 100, identity={}, guard={}, selection={})
    save(folder, 200, **run)
    assert latest_checkpoint(folder, sections=SECTIONS).name == GOOD
    assert f"{CRAFTED}/COMMIT.json is malformed: 'run' has no object 'guard'" in caplog.text


def test_a_record_larger_than_any_is_refused_before_it_is_read(
    folder: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed_twice(folder)
    monkeypatch.setattr("trainers.checkpoints.commit.RECORD_BYTES", 1_000)
    with pytest.raises(
        CheckpointError, match=rf"{CRAFTED}/COMMIT.json is malformed: [\d,]+ bytes, more than"
    ):
        read_record(folder, CRAFTED)


def test_where_nothing_is_read_stands_no_memory_of_before(folder: Store) -> None:
    """A reader that was handed a record with a gap all the same: freed memory is planted full of a secret."""
    config = CheckpointConfig(file_bytes=HEADER_ROOM_BYTES + 4_096)
    record = read_record(folder, save(folder, 1, world_size=1, config=config))
    num_bytes = 11 * 7 * 4
    (whole,) = record.tensors[EMBED].kinds["value"]
    gap = (Extent(0, 10, whole.file, whole.offset), Extent(40, 77, whole.file, whole.offset + 160))
    tensor = replace(record.tensors[EMBED], kinds={"value": gap})
    reader = CheckpointReader(folder, replace(record, tensors={EMBED: tensor}))
    for _ in range(50):
        secrets = [torch.from_numpy(np.frombuffer(b"SECRET!!" * 39, "f4")[:77].copy()) for _ in range(8)]
        secrets += [each.clone() for each in secrets]
        del secrets
        read = reader.load_full(EMBED)
        assert b"SECRET" not in read.numpy().tobytes() and read.numpy().nbytes == num_bytes
        assert read.view(-1)[10:40].isnan().all() and not read.view(-1)[:10].isnan().any()


def test_safetensors_own_reader_finds_every_range_where_the_record_has_it(
    folder: Store, tmp_path: Path
) -> None:
    record = read_record(folder, save(folder, 1))
    reader = CheckpointReader(folder, record)
    seen: set[tuple[str, str]] = set()
    for name, tensor in record.tensors.items():
        for kind, extents in tensor.kinds.items():
            for extent in extents:
                with safe_open(tmp_path / file_path(record.name, extent.file), "pt") as file:
                    there = file.get_tensor(f"{name}/{kind}/{extent.start}")
                    seen |= {(extent.file, key) for key in file.keys()}  # noqa: SIM118  (it is no mapping)
                assert torch.equal(there, reader.read(name, kind, extent.start, extent.stop))
    assert len(seen) == sum(len(each) for tensor in record.tensors.values() for each in tensor.kinds.values())
    assert {name for name in record.tensors} == set(SHAPES)


# --- parts ---


PARTS = {
    "offset-wrong-by-4": lambda part: put("extents", 0, 3, "offset", value=part["extents"][0][3]["offset"] + 4)(part),
    "range-absent": lambda part: part["extents"].pop(),
    "no-extents": drop("extents"),
    "unknown-key": put("owner", value="x"),
    "unknown-key-of-a-range": lambda part: put("extents", 0, 3, "owner", value="x")(part),
    "another-rank": put("rank", value=0),
    "file-of-another-rank": put("files", 0, "path", value="worker-00000-000.safetensors"),
    "path-out-of-the-folder": lambda part: put("extents", 0, 3, "file", value="../../secret")(part),
    "range-in-no-file": lambda part: put("extents", 0, 3, "file", value="worker-00001-009.safetensors")(part),
    "negative-size": put("files", 0, "num_bytes", value=-1),
    "files-as-null": put("files", value=None),
    "range-of-two": put("extents", value=[["w", "value"]]),
    "without-sums-of-blocks": put("files", 0, "crc32", value=[]),
    "absurd-range": lambda part: put("extents", 0, 3, "stop", value=2**62)(part),
}  # fmt: skip


@pytest.mark.parametrize("change", PARTS.values(), ids=PARTS)
def test_a_sealed_part_that_no_worker_wrote_is_never_committed(
    folder: Store, change: Callable[[Content], None]
) -> None:
    with CheckpointWriter(folder, CONFIG, rank=1, world_size=2, attempt=1) as other:
        other.save(1, slices_of(1, 2, state_at(1)), {})
    path = file_path(folder_name(1, 2, 1), "part-00001.json")
    part = unseal(folder.read(path), path)
    change(part)
    folder.put(path, seal(part))
    writer = CheckpointWriter(folder, CONFIG, rank=0, world_size=2, attempt=1)
    writer.save(1, slices_of(0, 2, state_at(1)), {})
    with pytest.raises(CheckpointError, match="step-00000001-w2-a1 was not written"):
        writer.finish()
    assert latest_checkpoint(folder) is None


# --- attempts ---


@pytest.mark.parametrize(
    "name", ["step-000x0300-w2-a1", "step-٠٠٠٠٠٣٠٠-w2-a1", f"step-{'9' * 5_000}-w2-a1", "step-00000300-w2"]
)
def test_a_folder_of_another_name_is_no_checkpoint(name: str) -> None:
    assert parse_folder_name(name) is None


@pytest.mark.parametrize("stray", [".DS_Store", "00001.tmp", "notes/00009", "x", "-0005", "٣٣٣٣٣", "9" * 20])
def test_what_is_no_attempt_is_none(folder: Store, stray: str) -> None:
    assert claim_attempt(folder, 2) == 1
    folder.put(f"attempts/{stray}", b"junk")
    assert latest_attempt(folder) == 1 and latest_world_size(folder) == 2
    assert claim_attempt(folder) == 2


@pytest.mark.parametrize("content", [b"x", b"-1", b"\xff\xfe", b"1e9", b"9" * 5_000, b"2\n"])
def test_an_attempt_without_its_number_of_workers_is_named(folder: Store, content: bytes) -> None:
    folder.put("attempts/00003", content)
    assert claim_attempt(folder) == 4
    folder.delete("attempts/00004")
    with pytest.raises(DamagedFileError, match="attempts/00003 is damaged.*number of workers"):
        latest_world_size(folder)


# --- any change ---


def nodes(content: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON content: the object or list, and the key there."""
    if isinstance(content, dict):
        own = [(content, key) for key in content]
    elif isinstance(content, list):
        own = [(content, index) for index in range(len(content))]
    else:
        own = []
    return own + [node for parent, key in own for node in nodes(parent[key])]


def mutate(content: Content, rng: random.Random) -> None:
    """Change one to three places: remove, replace, add to a number, take from another place, insert."""
    for _ in range(rng.randint(1, 3)):
        parent, key = rng.choice(nodes(content))
        value = parent[key]
        kind = rng.randrange(5)
        if kind == 0:
            del parent[key]
        elif kind == 1:
            parent[key] = rng.choice(JUNK)
        elif kind == 2 and isinstance(value, int):
            parent[key] = value + rng.choice((-4, -1, 1, 4, 28, 2**40))
        elif kind == 3:
            elsewhere, other = rng.choice(nodes(content))
            parent[key] = copy.deepcopy(elsewhere[other])
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(value))
        else:
            parent[rng.choice(("x", "", "../y"))] = rng.choice(JUNK)


@pytest.mark.parametrize(
    "seeds", [range(150), pytest.param(range(150, 6_000), marks=pytest.mark.slow)], ids=str
)
def test_a_record_changed_anywhere_is_refused_or_means_the_same_weights(folder: Store, seeds: range) -> None:
    whole = committed_twice(folder)
    state = state_at(200)
    outcomes = {"refused": 0, "same": 0}
    for seed in seeds:
        content = json.loads(json.dumps(whole))
        mutate(content, random.Random(seed))
        put_record(folder, content)
        record = latest_checkpoint(folder)
        if record.name == GOOD:
            outcomes["refused"] += 1
            continue
        outcomes["same"] += 1
        assert_holds(folder, record, state)
        assert {(n, k) for n, t in record.tensors.items() for k in t.kinds} == {
            (n, k) for n in SHAPES for k in KINDS
        }
    assert outcomes["refused"] > 0.8 * len(seeds), outcomes
