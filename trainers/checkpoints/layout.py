"""Where a checkpoint's tensors lie in its files: every element once, every byte of a file accounted for.

A reader fills its buffers by these numbers alone. A gap would show what stood in memory before, an offset off by one
element would load as wrong weights, so a layout is checked before it is committed and before it is believed.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated

from pydantic import ConfigDict, Field

from cluster.console.errors import UserError

FLOAT32_BYTES = 4
HEADER_LENGTH_BYTES = 8
"""Of a safetensors file; the header's JSON follows, then the data to the file's end."""
EMPTY_FILE_BYTES = HEADER_LENGTH_BYTES + 8
"""Of one without a tensor: its header is `{}`, filled up to 8."""
STRICT = ConfigDict(strict=True, extra="forbid")
"""Of what is decoded from a store: no key more or less, no value of another type."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Shape = Annotated[tuple[Count, ...], Field(max_length=16)]
FileName = Annotated[str, Field(pattern=r"^worker-[0-9]{5,9}-[0-9]{3,9}\.safetensors$")]


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be used or made. The message names the file, the expected and the found."""


@dataclass(frozen=True)
class StoredFile:
    __pydantic_config__ = STRICT

    path: FileName
    """Within the checkpoint's folder."""
    num_bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    crc32: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = ()
    """Of each block of `BLOCK_BYTES`; none in records of format 1."""


@dataclass(frozen=True)
class Extent:
    """Where elements [start, stop) of a flattened tensor lie."""

    __pydantic_config__ = STRICT

    start: Count
    stop: Count
    file: FileName
    """Path of the file within the checkpoint's folder."""
    offset: Count
    """Of element `start`, in bytes from the file's beginning."""

    @property
    def num_bytes(self) -> int:
        return (self.stop - self.start) * FLOAT32_BYTES


PlacedRange = tuple[str, str, Shape, Extent]
"""Parameter, kind, shape of the whole parameter, and where the range lies."""


@dataclass(frozen=True)
class StoredTensor:
    """One parameter: its shape, and for each kind (value, moments) the extents, in order, no gap."""

    shape: tuple[int, ...]
    kinds: dict[str, tuple[Extent, ...]]


def join_tensors(ranges: Iterable[PlacedRange]) -> dict[str, StoredTensor]:
    """The ranges of all workers by parameter; CheckpointError where they differ on a shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    extents: dict[str, dict[str, list[Extent]]] = {}
    for name, kind, shape, extent in ranges:
        if shapes.setdefault(name, shape) != shape:
            raise CheckpointError(f"{name} has shape {shapes[name]} and, in {extent.file}, {shape}")
        extents.setdefault(name, {}).setdefault(kind, []).append(extent)
    return {
        name: StoredTensor(
            shapes[name],
            {kind: tuple(sorted(pieces, key=lambda e: e.start)) for kind, pieces in kinds.items()},
        )
        for name, kinds in extents.items()
    }


def check_layout(files: Sequence[StoredFile], tensors: Mapping[str, StoredTensor]) -> None:
    """Every element of every tensor stands in one place, and every file is full of them from its header to its end.

    Raises:
        CheckpointError: the first tensor or file of which that is not so.
    """
    if not tensors:
        raise CheckpointError("it has no tensor")
    for name, tensor in tensors.items():
        for kind, extents in tensor.kinds.items():
            _check_covered(f"{kind} of {name}", tensor.shape, extents)
    placed = by_file(tensors)
    known = {file.path for file in files}
    if len(known) != len(files):
        raise CheckpointError(f"of {len(files)} files some have the same name")
    if unknown := placed.keys() - known:
        raise CheckpointError(f"tensors lie in {min(unknown)}, which is none of the files")
    for file in files:
        _check_filled(file, [extent for _, extent in placed.get(file.path, ())])


def _check_covered(what: str, shape: tuple[int, ...], extents: Sequence[Extent]) -> None:
    reached = 0
    for extent in extents:
        if extent.start != reached:
            fault = "is missing" if extent.start > reached else "was given twice"
            low, high = sorted((reached, extent.start))
            raise CheckpointError(f"{what}: [{low}, {high}) {fault}")
        if extent.stop <= extent.start:
            raise CheckpointError(f"{what}: [{extent.start}, {extent.stop}) is no range")
        reached = extent.stop
    if reached != prod(shape):
        raise CheckpointError(f"{what}: {reached} elements for shape {shape}")


def _check_filled(file: StoredFile, extents: Sequence[Extent]) -> None:
    if not extents:
        if file.num_bytes != EMPTY_FILE_BYTES:
            raise CheckpointError(f"{file.path}: no tensor lies in its {file.num_bytes:,} bytes")
        return
    ordered = sorted(extents, key=lambda extent: extent.offset)
    ends = [extent.offset + extent.num_bytes for extent in ordered]
    begins = [extent.offset for extent in ordered[1:]] + [file.num_bytes]
    if ordered[0].offset <= HEADER_LENGTH_BYTES:
        raise CheckpointError(f"{file.path}: a tensor at byte {ordered[0].offset} lies in the header")
    for end, begin in zip(ends, begins, strict=True):
        if end != begin:
            raise CheckpointError(
                f"{file.path}: a tensor ends at byte {end:,}, the next or the end is {begin:,}"
            )


def by_file(tensors: Mapping[str, StoredTensor]) -> dict[str, list[tuple[str, Extent]]]:
    """What stands in each file: the keys of its header, and where their data lie."""
    placed: dict[str, list[tuple[str, Extent]]] = {}
    for name, tensor in tensors.items():
        for kind, extents in tensor.kinds.items():
            for extent in extents:
                placed.setdefault(extent.file, []).append((header_key(name, kind, extent.start), extent))
    return placed


def header_key(name: str, kind: str, start: int) -> str:
    """The name of a range in its file's own header."""
    return f"{name}/{kind}/{start}"


def header_entry(num_elements: int, begin: int) -> dict[str, object]:
    """What safetensors has in a header of float32 data that begin `begin` bytes behind it."""
    return {
        "dtype": "F32",
        "shape": [num_elements],
        "data_offsets": [begin, begin + num_elements * FLOAT32_BYTES],
    }


def header_fault(beginning: bytes, placed: Sequence[tuple[str, Extent]]) -> str | None:
    """What of a file's own header is not as the record has it; None if all is.

    Args:
        beginning: Of the file, as much of it as a header may take.
        placed: Of `by_file`. That these fill a file tells nothing of their order; its header does.
    """
    header_bytes = int.from_bytes(beginning[:HEADER_LENGTH_BYTES], "little")
    data_start = HEADER_LENGTH_BYTES + header_bytes
    if data_start > len(beginning):
        return f"its header claims {header_bytes:,} bytes"
    try:
        header = json.loads(beginning[HEADER_LENGTH_BYTES:data_start])
    except (ValueError, RecursionError) as error:
        return f"its header is no JSON: {error}"
    expected = {
        key: header_entry(extent.stop - extent.start, extent.offset - data_start) for key, extent in placed
    }
    return None if header == expected else "its header has its tensors in other places than the record"
