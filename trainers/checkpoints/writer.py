"""Saving without stopping: the training thread copies to host memory, another thread writes and commits.

The thread runs no collective, which could meet one of the training thread's on the same process group. The
workers join through the store instead: each puts its files and then its part record; worker 0 waits for all
the parts, proves that they cover every tensor exactly once, and puts the commit record if there is none.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch

from cluster.storage.uris import StorageError, Store
from trainers.checkpoints.commit import (
    FOLDER,
    RECORD,
    CheckpointRecord,
    WorkerPart,
    canonical_json,
    check_record,
    decode_part,
    encode_part,
    encode_record,
    file_path,
    folder_name,
    read_bounded,
    stored_file,
)
from trainers.checkpoints.keeping import CheckpointConfig, latest_attempt, retire
from trainers.checkpoints.layout import (
    FLOAT32_BYTES,
    HEADER_LENGTH_BYTES,
    CheckpointError,
    Extent,
    PlacedRange,
    StoredFile,
    header_entry,
    header_key,
    join_tensors,
)
from trainers.checkpoints.state import StateSlice

# A header holds about 5,000 ranges in this room; a file whose header is full is closed and the next one
# begun.
HEADER_ROOM_BYTES = 1 << 20
HEADER_ENTRY_BYTES = 128  # of JSON around a range's key, rounded up
POLL_SECONDS = 0.05
SLOWEST_POLL_SECONDS = 2.0

logger = logging.getLogger(__name__)


class HostFile:
    """One safetensors file in reusable host memory, hashed and put without another copy.

    The data stand behind a fixed room, and the header is written into that room's end once it is known: the
    file is one contiguous view. `num_bytes` are both together: of 64 MiB and a little, pinned memory would take 128,
    and a put more than one request. Format: https://huggingface.co/docs/safetensors (length, JSON header, data).
    """

    def __init__(self, num_bytes: int) -> None:
        # Pinned where there is a GPU: the copy then runs at the bus's rate and beside the kernels.
        pin = torch.cuda.is_available()
        self._bytes = torch.empty(num_bytes - num_bytes % FLOAT32_BYTES, dtype=torch.uint8, pin_memory=pin)
        self._data = self._bytes[HEADER_ROOM_BYTES:].view(torch.float32)
        self.clear()

    @property
    def num_bytes(self) -> int:
        return self._bytes.numel()

    def clear(self) -> None:
        self._ranges: list[tuple[str, str, tuple[int, ...], int, int]] = []
        self._filled = 0
        self._header_bytes = HEADER_ENTRY_BYTES

    def append(self, state: StateSlice, begin: int) -> int:
        """Copy what fits of `state.data[begin:]`; the number of elements copied, 0 when the file is full."""
        entry_bytes = len(state.name) + len(state.kind) + HEADER_ENTRY_BYTES
        count = min(len(state.data) - begin, len(self._data) - self._filled)
        if count == 0 or self._header_bytes + entry_bytes > HEADER_ROOM_BYTES - 16:
            return 0
        target = self._data[self._filled : self._filled + count]
        target.copy_(state.data[begin : begin + count], non_blocking=True)
        start = state.start + begin
        self._ranges.append((state.name, state.kind, state.shape, start, start + count))
        self._filled += count
        self._header_bytes += entry_bytes
        return count

    def finish(self, path: str) -> tuple[memoryview, list[PlacedRange]]:
        """The whole file, and each range with its place in it, once the file is named."""
        header, ends = {}, [0]
        for name, kind, _, start, stop in self._ranges:
            header[header_key(name, kind, start)] = header_entry(stop - start, ends[-1])
            ends.append(ends[-1] + (stop - start) * FLOAT32_BYTES)
        text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
        text += b" " * (-len(text) % 8)
        prefix = len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text
        file_start = HEADER_ROOM_BYTES - len(prefix)
        view = self._bytes.numpy().data
        view[file_start:HEADER_ROOM_BYTES] = prefix
        placed = [
            (name, kind, shape, Extent(start, stop, path, len(prefix) + offset))
            for (name, kind, shape, start, stop), offset in zip(self._ranges, ends, strict=False)
        ]
        return view[file_start : HEADER_ROOM_BYTES + ends[-1]], placed


class CheckpointWriter:
    """One per worker. `attempt` is a number that no other start of the run has: `checkpoint.claim_attempt`;
    `resumed_step` the step of the checkpoint that it went on from, 0 without one.

    Host memory: the worker's state in float32, rounded up to whole files (`host_bytes` once something was
    saved). As a context manager it finishes what is being written; after an exception it no longer waits for
    other workers.
    """

    def __init__(
        self,
        store: Store,
        config: CheckpointConfig,
        *,
        rank: int,
        world_size: int,
        attempt: int,
        resumed_step: int | None = None,
    ) -> None:
        self._store = store
        self._config = config
        self._resumed_step = resumed_step
        self._rank = rank
        self._world_size = world_size
        self._attempt = attempt
        self._files: list[HostFile] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._name: str | None = None
        self._abandoned = threading.Event()

    @property
    def host_bytes(self) -> int:
        """Host memory that the copies hold."""
        return sum(file.num_bytes for file in self._files)

    def save(
        self,
        step: int,
        slices: Iterable[StateSlice],
        run: Mapping[str, Any],
        before_commit: Callable[[], None] = lambda: None,
        on_commit: Callable[[str], None] = lambda name: None,
    ) -> float:
        """Copy this worker's slices and let the thread write them; the seconds that the caller was held up.

        All workers call it for the same steps, rising; a step that was saved already is not saved again. The
        held-up time includes the wait for the former checkpoint. `run` is the trainer's own state, as JSON;
        worker 0's counts. In worker 0's thread `before_commit()` runs while the checkpoint does not exist yet,
        and `on_commit(name)` once it does, before older ones are deleted. CheckpointError if the former
        checkpoint could not be written.
        """
        started = time.perf_counter()
        name = folder_name(step, self._world_size, self._attempt)
        if name == self._name:
            return 0.0
        self.finish()
        canonical_json(run)  # what JSON cannot hold fails here, in the caller's stack
        num_files = self._copy(slices)
        self._name = name
        self._pending = self._thread.submit(
            self._write, step, self._files[:num_files], run, before_commit, on_commit
        )
        return time.perf_counter() - started

    def finish(self) -> None:
        """Wait until the checkpoint under way is written, on worker 0 committed. CheckpointError if not."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            raise CheckpointError(f"checkpoint {self._name} was not written: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._abandoned.set()
        try:
            self.finish()
        except CheckpointError:
            if error is None:
                raise
            # The exception that ended the training is the one to see; an unfinished checkpoint does not
            # exist.
        finally:
            self._thread.shutdown()

    def _copy(self, slices: Iterable[StateSlice]) -> int:
        """Fill host files with the slices, cut where a file is full; the number of files."""
        for file in self._files:
            file.clear()
        number = 0
        on_gpu = False
        for state in slices:
            if state.data.dtype != torch.float32 or state.data.dim() != 1:
                found = f"{state.data.dim()}-D {state.data.dtype}"
                raise TypeError(f"{state.kind} of {state.name} is {found}; a slice is 1-D torch.float32")
            on_gpu |= state.data.is_cuda
            copied = 0
            while copied < len(state.data):
                if number == len(self._files):
                    self._files.append(HostFile(self._config.file_bytes))
                fitted = self._files[number].append(state, copied)
                copied += fitted
                number += not fitted
        if on_gpu:
            torch.cuda.synchronize()
        return min(number + 1, len(self._files))

    def _write(
        self,
        step: int,
        files: list[HostFile],
        run: Mapping[str, Any],
        before_commit: Callable[[], None],
        on_commit: Callable[[str], None],
    ) -> None:
        name = folder_name(step, self._world_size, self._attempt)
        with ThreadPoolExecutor(self._config.upload_threads) as pool:
            written = list(pool.map(lambda numbered: self._put(name, *numbered), enumerate(files)))
        part = WorkerPart(
            rank=self._rank,
            files=tuple(file for file, _ in written),
            extents=tuple(extent for _, extents in written for extent in extents),
        )
        self._store.put(file_path(name, _part_file(self._rank)), encode_part(part))
        if self._rank == 0:
            before_commit()
            self._commit(name, step, run)
            on_commit(name)
            try:
                retire(self._store, self._config, name, self._resumed_step)
            except StorageError as error:  # a bucket that lets nobody delete is no reason to stop training
                logger.warning("%s is committed, older checkpoints stay for now: %s", name, error)

    def _put(self, name: str, number: int, file: HostFile) -> tuple[StoredFile, list[PlacedRange]]:
        path = f"worker-{self._rank:05d}-{number:03d}.safetensors"
        view, placed = file.finish(path)
        self._store.put(file_path(name, path), view)
        return stored_file(path, view), placed

    def _commit(self, name: str, step: int, run: Mapping[str, Any]) -> None:
        sizes = self._wait_for_parts(name)
        with ThreadPoolExecutor(self._config.upload_threads) as pool:
            parts = list(pool.map(lambda rank: self._read_part(name, rank), range(self._world_size)))
        files = tuple(file for part in parts for file in part.files)
        for file in files:
            if sizes.get(file.path) != file.num_bytes:
                found = sizes.get(file.path, "no file")
                raise CheckpointError(f"{name}/{file.path}: wrote {file.num_bytes:,} bytes, found {found}")
        newer = latest_attempt(self._store)
        if newer > self._attempt:
            raise CheckpointError(f"attempt {newer} has taken the run over; attempt {self._attempt} ends")
        record = CheckpointRecord(
            name=name, step=step, world_size=self._world_size, attempt=self._attempt, created=time.time(),
            files=files, tensors=join_tensors(extent for part in parts for extent in part.extents),
            run=dict(run),
        )  # fmt: skip
        check_record(record)
        path, data = file_path(name, RECORD), encode_record(record)
        # A put that was repeated after a lost answer finds its own record.
        if not self._store.put_if_absent(path, data) and self._store.read(path) != data:
            raise CheckpointError(f"{path} was written by another process of attempt {self._attempt}")

    def _read_part(self, name: str, rank: int) -> WorkerPart:
        path = file_path(name, _part_file(rank))
        return decode_part(read_bounded(self._store, path), path, rank)

    def _wait_for_parts(self, name: str) -> dict[str, int]:
        """Sizes of the files in the checkpoint's folder, once every worker's part is among them."""
        deadline = time.monotonic() + self._config.commit_timeout_seconds
        poll_seconds = POLL_SECONDS
        prefix = f"{FOLDER}/{name}/"
        while True:
            sizes = {info.path.removeprefix(prefix): info.num_bytes for info in self._store.list(prefix)}
            missing = [rank for rank in range(self._world_size) if _part_file(rank) not in sizes]
            if not missing:
                return sizes
            if self._abandoned.is_set() or time.monotonic() > deadline:
                raise CheckpointError(
                    f"no part from {len(missing)} of {self._world_size} workers: {missing[:10]}"
                )
            self._abandoned.wait(poll_seconds)
            poll_seconds = min(2 * poll_seconds, SLOWEST_POLL_SECONDS)


def _part_file(rank: int) -> str:
    return f"part-{rank:05d}.json"
