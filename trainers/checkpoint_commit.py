"""What makes a checkpoint valid: its commit record, and that every file is the one that the record names.

    checkpoints/step-00000400-w2-a1/
        worker-00000-000.safetensors …   float32 ranges of the flattened tensors, some files per worker
        part-00000.json …                what each worker wrote; read once, by the committing worker
        COMMIT.json                      written last, if absent; without it the checkpoint does not exist

The folder's name holds step, world size and attempt, so that no two writers ever share one. The record holds
all that a reader needs: each file's size and SHA-256, where each range of each tensor lies, and the trainer's
own state as JSON. It carries a hash of itself, so that a damaged record is told from a good one before
anything in it is believed. SHA-256 tells whether a checkpoint may be taken; what is then read of it, a range at a time,
is held against CRC-32 of its blocks.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from cluster.config import UserError
from cluster.storage import Store

FOLDER = "checkpoints"
RECORD = "COMMIT.json"
_WRITTEN = re.compile(r"COMMIT\.json|part-\d{5,}\.json|worker-\d{5,}-\d{3,}\.safetensors")
FORMAT = 2
READABLE = (1, FORMAT)
"""Records of format 1 have no CRC-32."""
FLOAT32_BYTES = 4
# Bounds the memory of verification; S3 reaches its full rate for one request from about this size.
READ_BYTES = 16 << 20
BLOCK_BYTES = 8 << 20
"""What a reader fetches at a time. A worker's ranges are mostly neighbours in one or two files: whole blocks turn
thousands of small requests into a few that run at the store's full rate."""
# One connection to S3 gives about 100 MB/s; hashing releases the GIL, so local files gain up to the number of
# cores.
VERIFY_THREADS = 8


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be used or made. The message names the file, the expected and the found."""


@dataclass(frozen=True)
class StoredFile:
    path: str
    """Within the checkpoint's folder."""
    num_bytes: int
    sha256: str
    crc32: tuple[int, ...] = ()
    """Of each block of `BLOCK_BYTES`; none in records of format 1."""


@dataclass(frozen=True)
class Extent:
    """Where elements [start, stop) of a flattened tensor lie."""

    start: int
    stop: int
    file: str
    """Path of the file within the checkpoint's folder."""
    offset: int
    """Of element `start`, in bytes from the file's beginning."""


PlacedRange = tuple[str, str, tuple[int, ...], Extent]
"""Parameter, kind, shape of the whole parameter, and where the range lies."""


@dataclass(frozen=True)
class StoredTensor:
    """One parameter: its shape, and for each kind (value, moments) the extents, in order, no gap."""

    shape: tuple[int, ...]
    kinds: dict[str, tuple[Extent, ...]]


@dataclass(frozen=True)
class WorkerPart:
    """What one worker wrote: its files and every range in them."""

    rank: int
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
    match = re.fullmatch(r"step-(\d{8,})-w(\d+)-a(\d+)", name)
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
    blocks = (content[start : start + BLOCK_BYTES] for start in range(0, content.nbytes, BLOCK_BYTES))
    crc32 = tuple(zlib.crc32(block) for block in blocks)
    return StoredFile(path, content.nbytes, hashlib.sha256(content).hexdigest(), crc32)


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


def decode_part(data: bytes, path: str) -> WorkerPart:
    content = unseal(data, path)
    return WorkerPart(
        rank=content["rank"],
        files=decode_files(content["files"]),
        extents=tuple(
            (name, kind, tuple(shape), Extent(**extent)) for name, kind, shape, extent in content["extents"]
        ),
    )


def decode_files(files: Iterable[Mapping[str, Any]]) -> tuple[StoredFile, ...]:
    return tuple(StoredFile(**{**file, "crc32": tuple(file.get("crc32", ()))}) for file in files)


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


def read_record(store: Store, name: str) -> CheckpointRecord:
    """The commit record of a checkpoint. FileNotFoundError if not committed, CheckpointError if damaged."""
    path = file_path(name, RECORD)
    content = unseal(store.read(path), path)
    if content.pop("format") not in READABLE:
        raise CheckpointError(f"{path} is of no format of {READABLE}; read it with the version that wrote it")
    if content["name"] != name:
        raise CheckpointError(f"{path} is the record of {content['name']}; checkpoints cannot be renamed")
    files = decode_files(content.pop("files"))
    tensors = {
        tensor_name: StoredTensor(
            tuple(tensor["shape"]),
            {kind: tuple(Extent(begin, end, files[index].path, at) for begin, end, index, at in rows)
             for kind, rows in tensor["kinds"].items()},
        )
        for tensor_name, tensor in content.pop("tensors").items()
    }  # fmt: skip
    return CheckpointRecord(files=files, tensors=tensors, **content)


def join_tensors(parts: Iterable[WorkerPart]) -> dict[str, StoredTensor]:
    """All workers' extents, each tensor covered exactly once; CheckpointError where one is not."""
    shapes: dict[str, tuple[int, ...]] = {}
    extents: dict[str, dict[str, list[Extent]]] = {}
    for part in parts:
        for name, kind, shape, extent in part.extents:
            if shapes.setdefault(name, shape) != shape:
                raise CheckpointError(f"{name} has shape {shapes[name]} and, on worker {part.rank}, {shape}")
            extents.setdefault(name, {}).setdefault(kind, []).append(extent)
    for name, kinds in extents.items():
        for kind, pieces in kinds.items():
            pieces.sort(key=lambda extent: extent.start)
            reached = 0
            for piece in pieces:
                if piece.start != reached:
                    fault = "is missing" if piece.start > reached else "was given twice"
                    low, high = sorted((reached, piece.start))
                    raise CheckpointError(f"{kind} of {name}: [{low}, {high}) {fault}")
                reached = piece.stop
            if reached != prod(shapes[name]):
                raise CheckpointError(f"{kind} of {name}: {reached} elements for shape {shapes[name]}")
    return {
        name: StoredTensor(shapes[name], {kind: tuple(pieces) for kind, pieces in kinds.items()})
        for name, kinds in extents.items()
    }


def faults(store: Store, name: str, files: Sequence[StoredFile]) -> list[str]:
    """What is wrong with these files of a checkpoint: path, expected, found. Reads every byte."""
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        found = pool.map(lambda file: _fault(store, name, file), files)
        return [fault for fault in found if fault]


def _fault(store: Store, name: str, file: StoredFile) -> str | None:
    path = file_path(name, file.path)
    try:
        num_bytes = store.size(path)
        if num_bytes != file.num_bytes:
            return f"{path}: expected {file.num_bytes:,} bytes, found {num_bytes:,}"
        found = ""
        for _ in range(2):  # once more, for a read that was corrupted on its way is no fault of the file
            sha256 = hashlib.sha256()
            for start in range(0, num_bytes, READ_BYTES):
                sha256.update(store.read_range(path, start, min(READ_BYTES, num_bytes - start)))
            if (found := sha256.hexdigest()) == file.sha256:
                return None
    except FileNotFoundError:
        return f"{path}: expected {file.num_bytes:,} bytes, found no file"
    return f"{path}: expected sha256 {file.sha256}, found {found}"
