"""Reading a checkpoint by ranges, whatever number of workers wrote it and whatever number reads it."""

import zlib
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from math import prod

import torch

from cluster.storage.uris import Store
from trainers.checkpoints.commit import BLOCK_BYTES, CheckpointRecord, file_path
from trainers.checkpoints.layout import FLOAT32_BYTES, CheckpointError, Extent, StoredTensor
from trainers.checkpoints.state import VALUE

CACHED_BLOCKS = 16
"""128 MiB."""
READ_THREADS = 8


class CheckpointReader:
    """A `StateSource` over a committed checkpoint, as `trainers/checkpoints/keeping.py` found and verified it."""

    def __init__(self, store: Store, record: CheckpointRecord) -> None:
        self.record = record
        self._store = store
        self._files = {file.path: file for file in record.files}
        self._block = lru_cache(CACHED_BLOCKS)(self._read_block)
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="checkpoint-read")

    @property
    def step(self) -> int:
        return self.record.step

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parameters."""
        return tuple(self.record.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def kinds(self, name: str) -> tuple[str, ...]:
        return tuple(sorted(self._tensor(name).kinds, key=lambda kind: (kind != VALUE, kind)))

    def read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, 1-D float32; KeyError or IndexError without."""
        tensor = self._tensor(name)
        if kind not in tensor.kinds:
            raise KeyError(f"{self.record.name} holds no {kind} of {name}; it holds {self.kinds(name)}")
        if not 0 <= start <= stop <= prod(tensor.shape):
            raise IndexError(f"[{start}, {stop}) is not within the {prod(tensor.shape)} elements of {name}")
        # Not what the memory held before: where nothing is read, nothing may pass for weights.
        result = torch.full((stop - start,), torch.nan, dtype=torch.float32)
        target = result.numpy().data.cast("B")
        extents = tensor.kinds[kind]
        for extent in extents[max(0, bisect_right(extents, start, key=_start) - 1) :]:
            if extent.start >= stop:
                break
            first, last = max(start, extent.start), min(stop, extent.stop)
            offset = extent.offset + (first - extent.start) * FLOAT32_BYTES
            low, high = (first - start) * FLOAT32_BYTES, (last - start) * FLOAT32_BYTES
            self._fill(target[low:high], extent.file, offset)
        return result

    def load_full(self, name: str, kind: str = VALUE) -> torch.Tensor:
        """A whole tensor in its shape, float32."""
        shape = self.shape(name)
        return self.read(name, kind, 0, prod(shape)).view(shape)

    def values(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter, whole, one at a time: for evaluation and export."""
        for name in self.names:
            yield name, self.load_full(name)

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self.record.tensors:
            raise KeyError(f"{self.record.name} holds no parameter {name}")
        return self.record.tensors[name]

    def _fill(self, target: memoryview, file: str, offset: int) -> None:
        """Copy the file's bytes from `offset` on into `target`, several blocks at a time."""
        stop = offset + target.nbytes
        numbers = range(offset // BLOCK_BYTES, -(-stop // BLOCK_BYTES))
        # In bounded groups: each block is copied and may leave the cache before the next group is asked for.
        for group in (numbers[i : i + READ_THREADS] for i in range(0, len(numbers), READ_THREADS)):
            blocks = self._pool.map(lambda number: self._block(file, number), group)
            for number, block in zip(group, blocks, strict=True):
                block_start = number * BLOCK_BYTES
                first, last = max(offset, block_start), min(stop, block_start + len(block))
                target[first - offset : last - offset] = block[first - block_start : last - block_start]

    def _read_block(self, file: str, number: int) -> bytes:
        """A block as the record has it; read once more where it is not, for it may have been corrupted on its way.

        Raises:
            CheckpointError: it was not, either time.
        """
        path, stored, start = file_path(self.record.name, file), self._files[file], number * BLOCK_BYTES
        length = min(BLOCK_BYTES, stored.num_bytes - start)
        for _ in range(2):
            block = self._store.read_range(path, start, length)
            if not stored.crc32 or zlib.crc32(block) == stored.crc32[number]:
                return block
        raise CheckpointError(
            f"{path}: bytes {start:,} to {start + length:,} are not those that were saved, also when read again"
        )


def _start(extent: Extent) -> int:
    return extent.start
