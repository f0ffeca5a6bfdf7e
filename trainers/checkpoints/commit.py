"""What makes a checkpoint valid: its commit record, and that every file is the one that the record names.

    checkpoints/step-00000400-w2-a1/
        worker-00000-000.safetensors …   float32 ranges of the flattened tensors, some files per worker
        part-00000.json …                what each worker wrote; read once, by the committing worker
        COMMIT.json                      written last, if absent; without it the checkpoint does not exist

The folder's name holds step, world size and attempt, so that no two writers ever share one. The record holds
all that a reader needs: each file's size and SHA-256, where each range of each tensor lies, and the trainer's
own state as JSON. It carries a hash of itself, so that a damaged record is told from a good one before
anything in it is believed; whoever can write a record can write that hash too, so its keys, types, names and the
layout of its tensors are checked as well. SHA-256 tells whether a checkpoint may be taken; what is then read of it, a
range at a time, is held against CRC-32 of its blocks.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from cluster.storage.uris import Store
from trainers.checkpoints.layout import (
    STRICT,
    CheckpointError,
    Count,
    Extent,
    PlacedRange,
    Shape,
    StoredFile,
    StoredTensor,
    by_file,
    check_layout,
    header_fault,
)

Sealed = TypeVar("Sealed")

FOLDER = "checkpoints"
RECORD = "COMMIT.json"
_WRITTEN = re.compile(r"COMMIT\.json|part-\d{5,}\.json|worker-\d{5,}-\d{3,}\.safetensors")
FORMAT = 2
UNCHECKED_BLOCKS = 1
"""The format of records without CRC-32."""
RECORD_BYTES = 256 << 20
"""At most, of a record and of a part: 7B on 512 workers at stage 3 has 25 MB."""
# Bounds the memory of verification; S3 reaches its full rate for one request from about this size.
READ_BYTES = 16 << 20  # whole blocks
BLOCK_BYTES = 8 << 20
"""What a reader fetches at a time. A worker's ranges are mostly neighbours in one or two files: whole blocks turn
thousands of small requests into a few that run at the store's full rate."""
# One connection to S3 gives about 100 MB/s; hashing releases the GIL, so local files gain up to the number of
# cores.
VERIFY_THREADS = 8


@dataclass(frozen=True)
class WorkerPart:
    """What one worker wrote: its files and every range in them."""

    __pydantic_config__ = STRICT

    rank: Count
    files: tuple[StoredFile, ...]
    extents: tuple[PlacedRange, ...]


@dataclass(frozen=True)
class CheckpointRecord:
    name: str
    """Of the folder: step, world size and attempt."""
    step: int
    """Finished steps."""
    world_size: int
    """Workers that wrote it; any number may read it."""
    attempt: int
    created: float
    """Unix seconds."""
    files: tuple[StoredFile, ...]
    tensors: dict[str, StoredTensor]
    run: dict[str, Any]
    """The trainer's own state: data order, tokenizer, schedule, guard, configuration, versions. JSON."""


def folder_name(step: int, world_size: int, attempt: int) -> str:
    return f"step-{step:08d}-w{world_size}-a{attempt}"


def parse_folder_name(name: str) -> tuple[int, int, int] | None:
    """(step, world size, attempt) of a checkpoint's folder; None for anything else."""
    match = re.fullmatch(r"step-([0-9]{8,18})-w([0-9]{1,9})-a([0-9]{1,9})", name)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def file_path(name: str, file: str) -> str:
    """Path of a checkpoint's file within the run's store."""
    return f"{FOLDER}/{name}/{file}"


def is_checkpoint_file(path: str) -> bool:
    """Whether a path within a run's store is one that a checkpoint's writer writes to: no other may be deleted."""
    folder, name, file = (*path.split("/", 2), "", "")[:3]
    return folder == FOLDER and parse_folder_name(name) is not None and bool(_WRITTEN.fullmatch(file))


def stored_file(path: str, content: memoryview) -> StoredFile:
    """What the record says of a file with this content."""
    return StoredFile(path, content.nbytes, hashlib.sha256(content).hexdigest(), block_sums(content))


def block_sums(content: memoryview) -> tuple[int, ...]:
    """CRC-32 of each block; `content` begins at one."""
    blocks = (content[start : start + BLOCK_BYTES] for start in range(0, content.nbytes, BLOCK_BYTES))
    return tuple(zlib.crc32(block) for block in blocks)


def canonical_json(content: Mapping[str, Any]) -> bytes:
    """The one byte string for a content. ValueError for NaN and infinities, which JSON does not have."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def seal(content: Mapping[str, Any]) -> bytes:
    """JSON that carries its own hash."""
    return canonical_json({"content": content, "sha256": hashlib.sha256(canonical_json(content)).hexdigest()})


def unseal(data: bytes, path: str) -> dict[str, Any]:
    """The content of a sealed JSON file. CheckpointError, naming `path`, if so much as one byte differs."""
    try:
        content = json.loads(data)["content"]
        intact = seal(content) == data
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if not intact:
        raise CheckpointError(f"{path} is damaged: its content does not have the hash that it states")
    return content


def encode_part(part: WorkerPart) -> bytes:
    return seal(asdict(part))


def decode_part(data: bytes, path: str, rank: int) -> WorkerPart:
    """The part of the worker of this rank. CheckpointError if it is damaged, malformed or another one's."""
    part = _decode(_PART, data, path).content
    for file in part.files:
        if part.rank != rank or not file.path.startswith(f"worker-{rank:05d}-"):
            raise CheckpointError(f"{path} is of worker {part.rank} and names {file.path}")
    return part


def encode_record(record: CheckpointRecord) -> bytes:
    """Extents are [start, stop, file's index, offset]: 7B on 512 workers at stage 3 has half a million."""
    index = {file.path: number for number, file in enumerate(record.files)}
    tensors = {
        name: {
            "shape": tensor.shape,
            "kinds": {kind: [[e.start, e.stop, index[e.file], e.offset] for e in extents]
                      for kind, extents in tensor.kinds.items()},
        }
        for name, tensor in record.tensors.items()
    }  # fmt: skip
    shallow = {key: value for key, value in vars(record).items() if key not in ("files", "tensors")}
    return seal(shallow | {"format": FORMAT, "files": [asdict(f) for f in record.files], "tensors": tensors})


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the record has it; a row is [start, stop, file's index, offset]."""

    __pydantic_config__ = STRICT

    shape: Shape
    kinds: dict[str, tuple[tuple[Count, Count, Count, Count], ...]]


@dataclass(frozen=True)
class _Record:
    """The content of COMMIT.json."""

    __pydantic_config__ = STRICT

    format: Literal[1, 2]
    name: str
    step: Count
    world_size: Count
    attempt: Count
    created: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    files: tuple[StoredFile, ...]
    tensors: dict[str, _Tensor]
    run: dict[str, Any]


@dataclass(frozen=True)
class _SealedRecord:
    __pydantic_config__ = STRICT

    content: _Record
    sha256: str


@dataclass(frozen=True)
class _SealedPart:
    __pydantic_config__ = STRICT

    content: WorkerPart
    sha256: str


_RECORD, _PART = TypeAdapter(_SealedRecord), TypeAdapter(_SealedPart)


def _decode(adapter: TypeAdapter[Sealed], data: bytes, path: str) -> Sealed:
    """A sealed file's content in its types. CheckpointError, naming the first key that is wrong."""
    unseal(data, path)
    try:
        return adapter.validate_json(data)
    except ValidationError as malformed:
        first, *others = malformed.errors(include_url=False, include_input=False)
        at = ".".join(str(part) for part in first["loc"][1:])[:200]
        more = f", and {len(others):,} more" if others else ""
        raise CheckpointError(f"{path} is malformed: {at!r}: {first['msg']}{more}") from malformed


def read_record(store: Store, name: str) -> CheckpointRecord:
    """The commit record of a checkpoint.

    Raises:
        FileNotFoundError: it is not committed.
        CheckpointError: the record is damaged or malformed.
    """
    path = file_path(name, RECORD)
    content = _decode(_RECORD, read_bounded(store, path), path).content
    stated = folder_name(content.step, content.world_size, content.attempt)
    if content.name != name or stated != name:
        raise CheckpointError(f"{path} is the record of {content.name}; checkpoints cannot be renamed")
    try:
        record = CheckpointRecord(
            name, content.step, content.world_size, content.attempt, content.created, content.files,
            _tensors(content), content.run,
        )  # fmt: skip
        check_record(record, checked_blocks=content.format != UNCHECKED_BLOCKS)
    except CheckpointError as impossible:
        raise CheckpointError(f"{path} is malformed: {impossible}") from impossible
    return record


def _tensors(content: _Record) -> dict[str, StoredTensor]:
    paths = [file.path for file in content.files]

    def extent(start: int, stop: int, index: int, offset: int) -> Extent:
        if index >= len(paths):
            raise CheckpointError(f"a tensor lies in file {index} of {len(paths)}")
        return Extent(start, stop, paths[index], offset)

    return {
        name: StoredTensor(
            tensor.shape, {kind: tuple(extent(*row) for row in rows) for kind, rows in tensor.kinds.items()}
        )
        for name, tensor in content.tensors.items()
    }


def check_record(record: CheckpointRecord, *, checked_blocks: bool = True) -> None:
    """CheckpointError if the record's tensors do not lie in its files as `check_layout` wants, or blocks lack sums."""
    check_layout(record.files, record.tensors)
    for file in record.files:
        num_blocks = -(-file.num_bytes // BLOCK_BYTES) if checked_blocks else 0
        if len(file.crc32) != num_blocks:
            raise CheckpointError(f"{file.path}: {len(file.crc32)} checksums for {num_blocks} blocks")


def read_bounded(store: Store, path: str) -> bytes:
    """A record or part; CheckpointError before it is read if no run writes one so large."""
    if (num_bytes := store.size(path)) > RECORD_BYTES:
        raise CheckpointError(f"{path} is malformed: {num_bytes:,} bytes, more than {RECORD_BYTES:,}")
    return store.read(path)


def faults(store: Store, record: CheckpointRecord, files: Sequence[StoredFile]) -> list[str]:
    """What is wrong with these files of a checkpoint: path, expected, found. Reads every byte."""
    placed = by_file(record.tensors)
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        found = pool.map(lambda file: _fault(store, record.name, file, placed.get(file.path, [])), files)
        return [fault for fault in found if fault]


def _fault(store: Store, name: str, file: StoredFile, placed: Sequence[tuple[str, Extent]]) -> str | None:
    path = file_path(name, file.path)
    try:
        num_bytes = store.size(path)
        if num_bytes != file.num_bytes:
            return f"{path}: expected {file.num_bytes:,} bytes, found {num_bytes:,}"
        found = ""
        for _ in range(2):  # once more, for a read that was corrupted on its way is no fault of the file
            sha256, crc32, beginning = hashlib.sha256(), list[int](), b""
            for start in range(0, num_bytes, READ_BYTES):
                part = store.read_range(path, start, min(READ_BYTES, num_bytes - start))
                beginning = beginning or part
                sha256.update(part)
                crc32 += block_sums(memoryview(part))
            if (found := sha256.hexdigest()) == file.sha256:
                if file.crc32 not in ((), tuple(crc32)):
                    return f"{path}: the record's CRC-32 of blocks are not those of its bytes"
                fault = header_fault(beginning, placed)
                return fault and f"{path}: {fault}"
    except FileNotFoundError:
        return f"{path}: expected {file.num_bytes:,} bytes, found no file"
    return f"{path}: expected sha256 {file.sha256}, found {found}"
