"""A checkpoint exists once its record does, reads at any split, and is refused by name if a byte differs."""

import contextlib
import json
import logging
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cluster.storage.uris import StorageError, Store, open_store
from trainers.checkpoints.commit import file_path, folder_name, read_record, seal
from trainers.checkpoints.keeping import (
    CheckpointConfig,
    checkpoint_at,
    claim_attempt,
    committed,
    latest_checkpoint,
    retire,
)
from trainers.checkpoints.layout import CheckpointError
from trainers.checkpoints.reader import CheckpointReader
from trainers.checkpoints.state import StateSlice
from trainers.checkpoints.writer import HEADER_ROOM_BYTES, CheckpointWriter
from trainers.evaluation.selection import Selection, record_best

SHAPES = {"embed.weight": (11, 7), "layers.0.norm.weight": (5,), "scale": ()}
KINDS = ("value", "exp_avg", "exp_avg_sq")
CONFIG = CheckpointConfig(keep_last=100, file_bytes=HEADER_ROOM_BYTES + 128)
State = dict[tuple[str, str], torch.Tensor]


def state_at(step: int) -> State:
    generator = torch.Generator().manual_seed(step)
    return {(n, k): torch.randn(s, generator=generator) for n, s in SHAPES.items() for k in KINDS}


def slices_of(rank: int, world_size: int, state: State):
    """Each tensor cut evenly; views of the state, as an engine may give."""
    for (name, kind), tensor in state.items():
        flat = tensor.view(-1)
        start, stop = (len(flat) * r // world_size for r in (rank, rank + 1))
        yield StateSlice(name, kind, tuple(tensor.shape), start, flat[start:stop])


def save(
    store: Store, step: int, world_size: int = 2, attempt: int = 1, config=CONFIG, resumed_step=None, **run
) -> str:
    """One checkpoint of `state_at(step)`, by as many writers as there are workers."""
    numbers = {"world_size": world_size, "attempt": attempt, "resumed_step": resumed_step}
    for rank in reversed(range(world_size)):
        with CheckpointWriter(store, config, rank=rank, **numbers) as writer:
            writer.save(step, slices_of(rank, world_size, state_at(step)), run)
    return folder_name(step, world_size, attempt)


def put_best(store: Store, name: str) -> None:
    record_best(store, Selection(1, 4.0), name)


def assert_holds(store: Store, record, state: State) -> None:
    reader = CheckpointReader(store, record)
    for (name, kind), tensor in state.items():
        assert torch.equal(reader.load_full(name, kind), tensor)


def flip(store: Store, path: str, index: int, bit: int = 0) -> None:
    data = bytearray(store.read(path))
    data[index] ^= 1 << bit
    store.put(path, bytes(data))


class Interposed:
    """A store of which some operations are replaced."""

    def __init__(self, store: Store, **operations) -> None:
        self._store = store
        self._operations = operations

    def __getattr__(self, name: str):
        return self._operations.get(name) or getattr(self._store, name)


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.cluster)])
def store(request, tmp_path: Path) -> Store:
    return open_store(str(tmp_path) if request.param == "folder" else request.getfixturevalue("s3_uri"))


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


# --- what is saved is what is read ---


@pytest.mark.slow
def test_a_checkpoint_reads_back_bit_by_bit_with_the_trainers_own_state(store: Store) -> None:
    save(store, 400, manifest="5f3a", data={"step": 400, "digest": "0f"})
    record = latest_checkpoint(store)
    assert (record.step, record.world_size, record.attempt) == (400, 2, 1)
    assert record.run == {"manifest": "5f3a", "data": {"step": 400, "digest": "0f"}}
    assert_holds(store, record, state_at(400))


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    size=st.integers(1, 200),
    writers=st.integers(1, 5),
    readers=st.integers(1, 7),
    data_bytes=st.sampled_from([4, 64, 4096]),
)
def test_saved_on_n_workers_reads_on_m_in_any_split(
    tmp_path_factory, data, size, writers, readers, data_bytes
) -> None:
    store = open_store(str(tmp_path_factory.mktemp("run")))
    whole = torch.randn(size)
    cuts = st.lists(st.integers(0, size), max_size=9).map(lambda inner: sorted({0, *inner, size}))
    bounds = data.draw(cuts)
    owners = data.draw(st.lists(st.integers(0, writers - 1), min_size=len(bounds), max_size=len(bounds)))
    for rank in reversed(range(writers)):
        config = CheckpointConfig(file_bytes=HEADER_ROOM_BYTES + data_bytes)
        with CheckpointWriter(store, config, rank=rank, world_size=writers, attempt=1) as writer:
            pieces = zip(bounds, bounds[1:], owners, strict=False)
            mine = [
                StateSlice("w", "value", (size,), a, whole[a:b]) for a, b, owner in pieces if owner == rank
            ]
            writer.save(1, mine, {})
    record = latest_checkpoint(store)
    joined = []
    asked = data.draw(cuts)
    for rank in range(readers):
        reader = CheckpointReader(store, record)
        share = list(zip(asked, asked[1:], strict=False))[rank::readers]
        joined += [(start, reader.read("w", "value", start, stop)) for start, stop in share]
    assert torch.equal(torch.cat([part for _, part in sorted(joined, key=lambda pair: pair[0])]), whole)


def test_every_file_is_plain_safetensors_or_json(folder: Store, tmp_path: Path) -> None:
    save(folder, 1)
    kinds = {path.suffix for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json"}
    found: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            found |= load_file(path)
    embed = sorted(
        (int(key.split("/")[2]), found[key]) for key in found if key.startswith("embed.weight/exp_avg/")
    )
    assert torch.equal(
        torch.cat([part for _, part in embed]).view(11, 7), state_at(1)["embed.weight", "exp_avg"]
    )


def test_training_may_go_on_at_once_and_does_not_change_what_is_saved(folder: Store) -> None:
    weights_changed = threading.Event()

    def slow_put(path, data):
        assert weights_changed.wait(60)
        folder.put(path, data)

    live, before = state_at(1), state_at(1)
    with CheckpointWriter(
        Interposed(folder, put=slow_put), CONFIG, rank=0, world_size=1, attempt=1
    ) as writer:
        writer.save(1, slices_of(0, 1, live), {})
        for tensor in live.values():
            tensor.fill_(7.0)
        weights_changed.set()
        writer.save(2, slices_of(0, 1, live), {})
    assert_holds(folder, checkpoint_at(folder, 1), before)
    assert_holds(folder, checkpoint_at(folder, 2), live)


def test_host_memory_is_reused_from_one_checkpoint_to_the_next(folder: Store) -> None:
    with CheckpointWriter(folder, CONFIG, rank=0, world_size=1, attempt=1) as writer:
        writer.save(1, slices_of(0, 1, state_at(1)), {})
        held = writer.host_bytes
        writer.save(2, slices_of(0, 1, state_at(2)), {})
        assert writer.host_bytes == held


def test_asking_for_what_is_not_there_names_it(folder: Store) -> None:
    save(folder, 1)
    reader = CheckpointReader(folder, latest_checkpoint(folder))
    with pytest.raises(KeyError, match="no parameter lm_head"):
        reader.kinds("lm_head")
    with pytest.raises(KeyError, match="holds no momentum_buffer of scale"):
        reader.read("scale", "momentum_buffer", 0, 1)
    with pytest.raises(IndexError, match="5 elements of layers.0.norm.weight"):
        reader.read("layers.0.norm.weight", "value", 3, 6)
    assert reader.kinds("scale") == KINDS


# --- L4: it exists once its record does ---


def test_data_without_a_record_is_no_checkpoint(store: Store) -> None:
    save(store, 100)
    name = save(store, 200)
    store.delete(file_path(name, "COMMIT.json"))
    assert latest_checkpoint(store).step == 100
    with pytest.raises(CheckpointError, match=r"no checkpoint for step 200 .* \[100\]"):
        checkpoint_at(store, 200)


def test_the_record_is_written_after_everything_it_names(folder: Store) -> None:
    written = []

    def put(path, data):
        folder.put(path, data)
        written.append(path)

    def put_if_absent(path, data):
        written.append(path)
        return folder.put_if_absent(path, data)

    save(Interposed(folder, put=put, put_if_absent=put_if_absent), 1)
    record = latest_checkpoint(folder)
    assert written[-1] == file_path(record.name, "COMMIT.json")
    assert {file_path(record.name, file.path) for file in record.files} <= set(written[:-1])


@pytest.mark.parametrize("position", [0, 9, -1], ids=["length", "header", "data"])
def test_one_flipped_byte_of_a_tensor_file_is_refused_by_name_and_the_one_before_taken(
    store: Store, caplog, position: int
) -> None:
    save(store, 100)
    name = save(store, 200)
    damaged = file_path(name, read_record(store, name).files[-1].path)
    flip(store, damaged, position)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(store).step == 100
    assert f"{damaged}: expected sha256" in caplog.text
    with pytest.raises(CheckpointError, match=damaged):
        checkpoint_at(store, 200)


def test_a_checkpoint_that_was_read_wrong_once_is_none_that_is_damaged(folder: Store) -> None:
    name = save(folder, 100)
    damaged = file_path(name, read_record(folder, name).files[-1].path)
    flips = [1]

    def read_range(path: str, start: int, length: int) -> bytes:
        data = folder.read_range(path, start, length)
        return bytes([data[0] ^ flips.pop()]) + data[1:] if path == damaged and flips else data

    assert latest_checkpoint(Interposed(folder, read_range=read_range)).step == 100
    assert not flips, "it was not read"


@pytest.mark.parametrize("num_flips", [1, 2])
def test_bytes_that_come_wrong_after_the_verification_are_read_again_and_never_loaded(
    folder: Store, num_flips: int
) -> None:
    record = read_record(folder, save(folder, 100))
    ((name, kind), saved), *_ = state_at(100).items()
    flips = [1] * num_flips

    def read_range(path: str, start: int, length: int) -> bytes:
        data = bytearray(folder.read_range(path, start, length))
        data[-1] ^= flips.pop() if flips else 0
        return bytes(data)

    reader = CheckpointReader(Interposed(folder, read_range=read_range), record)
    if num_flips == 1:
        assert torch.equal(reader.load_full(name, kind), saved)
    else:
        with pytest.raises(
            CheckpointError, match=r"safetensors: bytes 0 to \d+ are not those that were saved"
        ):
            reader.load_full(name, kind)


def test_a_record_of_before_there_were_checksums_of_blocks_still_loads(folder: Store) -> None:
    name = save(folder, 100)
    path = file_path(name, "COMMIT.json")
    content = json.loads(folder.read(path))["content"] | {"format": 1}
    for file in content["files"]:
        assert file.pop("crc32")
    folder.put(path, seal(content))
    assert_holds(folder, latest_checkpoint(folder), state_at(100))


@settings(max_examples=200, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_of_the_record_is_noticed(tmp_path_factory, place: float, bit: int) -> None:
    store = open_store(str(tmp_path_factory.getbasetemp() / "flipped-record"))
    name = folder_name(1, 1, 1)
    path = file_path(name, "COMMIT.json")
    if not store.exists(path):
        save(store, 1, world_size=1)
    intact = store.read(path)
    try:
        flip(store, path, int(place * len(intact)), bit)
        with pytest.raises(CheckpointError, match="COMMIT.json is damaged"):
            read_record(store, name)
    finally:
        store.put(path, intact)


def test_a_damaged_record_is_refused_by_name_and_the_one_before_taken(folder: Store, caplog) -> None:
    save(folder, 100)
    path = file_path(save(folder, 200), "COMMIT.json")
    folder.put(path, folder.read(path)[:-20])
    assert latest_checkpoint(folder).step == 100
    assert f"{path} is damaged" in caplog.text


def test_a_part_damaged_before_the_commit_prevents_it(folder: Store) -> None:
    other = CheckpointWriter(folder, CONFIG, rank=1, world_size=2, attempt=1)
    other.save(1, slices_of(1, 2, state_at(1)), {})
    other.finish()
    flip(folder, file_path(folder_name(1, 2, 1), "part-00001.json"), 40)
    writer = CheckpointWriter(folder, CONFIG, rank=0, world_size=2, attempt=1)
    writer.save(1, slices_of(0, 2, state_at(1)), {})
    with pytest.raises(CheckpointError, match="part-00001.json is damaged"):
        writer.finish()
    assert latest_checkpoint(folder) is None


@pytest.mark.parametrize("fault", ["truncated", "missing"])
def test_a_truncated_or_missing_file_is_refused_by_name(folder: Store, caplog, fault: str) -> None:
    save(folder, 100)
    name = save(folder, 200)
    file = read_record(folder, name).files[0]
    path = file_path(name, file.path)
    if fault == "truncated":
        folder.put(path, folder.read(path)[:-1])
    else:
        folder.delete(path)
    assert latest_checkpoint(folder).step == 100
    assert f"{path}: expected {file.num_bytes:,} bytes, found" in caplog.text


def on_all_workers(world_size: int, ask):
    """What `ask(rank, gather)` returns to each of several workers, which are threads here."""
    barrier, values = threading.Barrier(world_size), {}

    def worker(rank: int):
        def gather(value):
            values[rank] = value
            barrier.wait(60)
            everybody = [values[each] for each in range(world_size)]
            barrier.wait(60)
            return everybody

        return ask(rank, gather)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(worker, range(world_size)))


def test_workers_share_the_verification_and_agree_on_its_outcome(folder: Store) -> None:
    save(folder, 100)
    name = save(folder, 200)
    files = [file_path(name, file.path) for file in read_record(folder, name).files]
    flip(folder, files[1], -1)
    read: list[str] = []

    def read_range(path, start, length):
        read.append(path)
        return folder.read_range(path, start, length)

    counted = Interposed(folder, read_range=read_range)
    found = on_all_workers(
        3, lambda rank, gather: latest_checkpoint(counted, rank=rank, world_size=3, gather=gather)
    )
    assert [record.step for record in found] == [100] * 3
    assert sorted(path for path in read if name in path) == sorted([*files, files[1]]), (
        "one was read once more"
    )


@pytest.mark.parametrize("which", ["best", "last", 100])
def test_all_workers_take_the_checkpoint_that_worker_0_sees(folder: Store, which) -> None:
    put_best(folder, save(folder, 100))
    behind = Interposed(folder, list=lambda prefix: [])  # as seen before worker 0 committed
    found = on_all_workers(
        2,
        lambda rank, gather: checkpoint_at(
            behind if rank else folder, which, rank=rank, world_size=2, gather=gather
        ),
    )
    assert [record.step for record in found] == [100, 100]


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 4), (6, 10)], r"\[4, 6\) is missing"),
        ([(0, 6), (4, 10)], r"\[4, 6\) was given twice"),
        ([(0, 4), (4, 8)], r"8 elements for shape \(10,\)"),
    ],
)
def test_a_state_that_is_not_covered_exactly_once_is_never_committed(folder: Store, ranges, message) -> None:
    writer = CheckpointWriter(folder, CONFIG, rank=0, world_size=1, attempt=1)
    writer.save(1, [StateSlice("w", "value", (10,), a, torch.zeros(b - a)) for a, b in ranges], {})
    with pytest.raises(CheckpointError, match=f"value of w: {message}"):
        writer.finish()
    assert latest_checkpoint(folder) is None


# --- failures and races ---


def test_a_failure_of_the_thread_surfaces_in_the_training_thread(folder: Store) -> None:
    def put(path, data):
        raise OSError("no space left on the disk")

    writer = CheckpointWriter(Interposed(folder, put=put), CONFIG, rank=0, world_size=1, attempt=1)
    writer.save(1, slices_of(0, 1, state_at(1)), {})
    with pytest.raises(CheckpointError, match="step-00000001-w1-a1 was not written: no space left"):
        writer.save(2, slices_of(0, 1, state_at(2)), {})


def test_where_nothing_may_be_deleted_checkpoints_are_committed_all_the_same(folder: Store, caplog) -> None:
    def delete(path):
        raise StorageError(f"may not delete {path}")

    config = CheckpointConfig(keep_last=1, file_bytes=HEADER_ROOM_BYTES + 128)
    with CheckpointWriter(
        Interposed(folder, delete=delete), config, rank=0, world_size=1, attempt=1
    ) as writer:
        for step in (1, 2, 3):
            writer.save(step, slices_of(0, 1, state_at(step)), {})
    assert len(committed(folder)) == 3
    assert "older checkpoints stay for now: may not delete checkpoints/step-00000001" in caplog.text


def test_a_worker_that_never_delivers_is_named_within_the_time_limit(folder: Store) -> None:
    config = CheckpointConfig(commit_timeout_seconds=0.2)
    writer = CheckpointWriter(folder, config, rank=0, world_size=3, attempt=1)
    writer.save(1, slices_of(0, 3, state_at(1)), {})
    with pytest.raises(CheckpointError, match=r"no part from 2 of 3 workers: \[1, 2\]"):
        writer.finish()


def test_an_exception_in_training_is_not_hidden_by_an_unfinished_checkpoint(folder: Store) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        CheckpointWriter(folder, CONFIG, rank=0, world_size=2, attempt=1) as writer,
    ):
        writer.save(1, slices_of(0, 2, state_at(1)), {})
        raise ZeroDivisionError
    assert latest_checkpoint(folder) is None


def test_what_json_cannot_hold_fails_where_it_was_given(folder: Store) -> None:
    with CheckpointWriter(folder, CONFIG, rank=0, world_size=1, attempt=1) as writer:
        with pytest.raises(ValueError, match="JSON compliant"):
            writer.save(1, slices_of(0, 1, state_at(1)), {"loss": float("nan")})
        with pytest.raises(TypeError, match="float64"):
            writer.save(1, [StateSlice("w", "value", (2,), 0, torch.zeros(2, dtype=torch.float64))], {})


def test_attempts_that_start_together_get_different_numbers(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: claim_attempt(store), range(8)))
    assert sorted(claimed) == list(range(1, 9))


def test_two_attempts_that_race_at_one_step_do_not_mix(store: Store) -> None:
    def write(attempt: int) -> None:
        # The older one may find its files cleared away, as of a dead attempt; then it fails, or is refused.
        with (
            contextlib.suppress(CheckpointError),
            CheckpointWriter(store, CONFIG, rank=0, world_size=1, attempt=attempt) as writer,
        ):
            writer.save(300, slices_of(0, 1, state_at(attempt)), {"state": attempt})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (1, 2)))
    newest = latest_checkpoint(store)
    assert newest.name == folder_name(300, 1, 2)
    assert_holds(store, newest, state_at(2))


def test_an_attempt_that_was_overtaken_cannot_commit(folder: Store) -> None:
    old = claim_attempt(folder)
    writer = CheckpointWriter(folder, CONFIG, rank=0, world_size=1, attempt=old)
    claim_attempt(folder)
    writer.save(1, slices_of(0, 1, state_at(1)), {})
    with pytest.raises(CheckpointError, match="attempt 2 has taken the run over"):
        writer.finish()
    assert latest_checkpoint(folder) is None


def test_of_two_writers_with_one_attempt_number_only_one_commits(store: Store) -> None:
    def write(number: int) -> bool:
        writer = CheckpointWriter(store, CONFIG, rank=0, world_size=1, attempt=1)
        writer.save(1, slices_of(0, 1, state_at(1)), {"writer": number})
        try:
            writer.finish()
        except CheckpointError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(write, range(4)))
    assert sum(won) == 1
    assert latest_checkpoint(store).run == {"writer": won.index(True)}


WRITE_UNTIL_KILLED = """
import sys
import torch
from cluster.storage.uris import open_store
from trainers.checkpoints.keeping import CheckpointConfig, claim_attempt, latest_checkpoint
from trainers.checkpoints.writer import HEADER_ROOM_BYTES, CheckpointWriter
from trainers.evaluation.selection import Selection, record_best
from trainers.checkpoints.state import StateSlice

store = open_store(sys.argv[1])
last = latest_checkpoint(store)
attempt, config = claim_attempt(store), CheckpointConfig(keep_last=2, file_bytes=HEADER_ROOM_BYTES + (1 << 16))
writers = [CheckpointWriter(store, config, rank=r, world_size=2, attempt=attempt) for r in (0, 1)]
step = last.step if last else 0
while True:
    step += 1
    for rank, writer in enumerate(writers):
        half = torch.full((100_000,), float(step))
        writer.save(step, [StateSlice("w", "value", (200_000,), rank * 100_000, half)], {"step": step})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_after_kill_9_at_any_moment_the_last_checkpoint_is_whole(
    folder: Store, tmp_path: Path, caplog
) -> None:
    seen = 0
    for _ in range(4):
        command = [sys.executable, "-c", WRITE_UNTIL_KILLED, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(random.randint(2, 12)):
                seen = int(process.stdout.readline())
            process.kill()
        record = latest_checkpoint(folder)
        # A step is printed while it is being written, and the one before was finished by then.
        assert record.step >= seen - 1
        values = CheckpointReader(folder, record).load_full("w")
        assert record.run == {"step": record.step}
        assert torch.equal(values, torch.full_like(values, record.step))
    assert "refused" not in caplog.text


# --- which are kept ---


def kept_steps(store: Store) -> list[int]:
    return sorted(read_record(store, name).step for name in committed(store))


def test_the_last_the_best_and_every_nth_are_kept_and_nothing_of_the_others(folder: Store) -> None:
    config = CheckpointConfig(
        every_steps=10, keep_last=2, keep_every_steps=40, file_bytes=HEADER_ROOM_BYTES + 128
    )
    for step in range(10, 101, 10):
        if step == 40:
            put_best(folder, folder_name(30, 2, 1))
        save(folder, step, config=config)
    assert kept_steps(folder) == [30, 40, 80, 90, 100]
    assert len({info.path.split("/")[1] for info in folder.list("checkpoints/")}) == 5
    assert checkpoint_at(folder, "best").step == 30
    assert checkpoint_at(folder, "last").step == 100


def test_a_damaged_checkpoint_is_not_among_those_that_are_kept_for_going_on(folder: Store) -> None:
    config = CheckpointConfig(keep_last=2)
    for step in (300, 400, 500):
        damaged = save(folder, step, config=config)
    flip(folder, file_path(damaged, read_record(folder, damaged).files[0].path), 70)
    resumed = latest_checkpoint(folder).step
    assert resumed == 400
    for step, kept in ((450, [400, 450, 500]), (500, [450, 500]), (550, [500, 550])):
        save(folder, step, config=config, attempt=2, resumed_step=resumed)
        assert kept_steps(folder) == kept
    assert {read_record(folder, name).attempt for name in committed(folder)} == {2}


def test_the_record_is_deleted_before_the_data(folder: Store) -> None:
    old, newest = save(folder, 1), save(folder, 2)
    deleted = []
    retire(Interposed(folder, delete=deleted.append), CheckpointConfig(keep_last=1), newest)
    assert deleted[0] == file_path(old, "COMMIT.json")
    assert len(deleted) > 1
    assert all(path.startswith(f"checkpoints/{old}/") for path in deleted)


def test_what_others_put_into_a_checkpoint_is_not_deleted_with_it(folder: Store) -> None:
    old = save(folder, 1)
    theirs = [file_path(old, "notes.md"), file_path(old, "deep/COMMIT.json"), "checkpoints/why.md"]
    for path in theirs:
        folder.put(path, b"kept")
    retire(folder, CheckpointConfig(keep_last=1), save(folder, 2))
    left = [info.path for info in folder.list("checkpoints/") if old in info.path or info.path in theirs]
    assert left == sorted(theirs)


def test_leftovers_of_the_dead_go_and_what_may_still_be_written_stays(folder: Store) -> None:
    names = [folder_name(step, 1, attempt) for step, attempt in ((900, 1), (200, 2), (400, 2), (100, 3))]
    for name in names:
        folder.put(file_path(name, "worker-00000-000.safetensors"), b"torn")
    newest = save(folder, 300, world_size=1, attempt=2)
    left = {info.path.split("/")[1] for info in folder.list("checkpoints/")}
    assert left == {newest, folder_name(400, 1, 2), folder_name(100, 1, 3)}


def test_the_commit_hook_runs_before_older_checkpoints_are_deleted(folder: Store) -> None:
    config = CheckpointConfig(keep_last=1)
    with CheckpointWriter(folder, config, rank=0, world_size=1, attempt=1) as writer:
        for step in (1, 2):
            writer.save(
                step,
                slices_of(0, 1, state_at(step)),
                {},
                on_commit=lambda name: put_best(folder, name),
            )
    assert kept_steps(folder) == [2]


def test_what_must_be_stored_before_the_commit_is_and_its_failure_prevents_it(folder: Store) -> None:
    def fail() -> None:
        raise OSError("metrics could not be stored")

    seen: list[list[str]] = []
    writer = CheckpointWriter(folder, CONFIG, rank=0, world_size=1, attempt=1)
    writer.save(1, slices_of(0, 1, state_at(1)), {}, before_commit=lambda: seen.append(committed(folder)))
    writer.save(2, slices_of(0, 1, state_at(2)), {}, before_commit=fail)
    with pytest.raises(CheckpointError, match="metrics could not be stored"):
        writer.finish()
    assert seen == [[]]
    assert kept_steps(folder) == [1]


def test_configuration_problems_name_key_value_and_remedy() -> None:
    config = CheckpointConfig(every_steps=300, keep_every_steps=1_000, keep_last=0, file_bytes=1_000)
    problems = list(config.problems("checkpoint"))
    assert len(problems) == 3
    assert "checkpoint.keep_last=0" in problems[0]
    assert "checkpoint.keep_every_steps=1000" in problems[1] and "nearest: 900" in problems[1]
    assert "checkpoint.file_bytes=1,000" in problems[2]
    assert not list(CheckpointConfig().problems("checkpoint"))
