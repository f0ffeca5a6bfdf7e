"""Limits on what stored bytes may unpack to, and compressed streams read within them."""

import io
import os
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa

from cluster.storage.uris import StorageError

RATIO = 1_000
"""Bytes that each stored byte may unpack to: twice what the log of a probe reaches whose lines differ in the time alone
(504 under zstd at level 19; a web server's log 16; `python benchmarks/bench_unpacking.py`). Deflate ends at 1,032."""
FREE_BYTES = 1 << 30
"""What any file may unpack to, whatever its ratio: one line repeated reaches 294 under gzip and 11,552 under zstd."""
RECORD_BYTES = 256
"""What a record counts for besides. Preparing sorts the hashes of a shard in 80 bytes each: 340 MB at FREE_BYTES."""
# Of a torn compressed file the block at the tear is lost: small blocks lose little.
BLOCK_BYTES = 65_536


class UnpackingError(ValueError):
    """A file that unpacks, or claims to unpack, to more than it may; names the sizes."""


class Expansion:
    """Counts the bytes that a file unpacks to, and refuses more than it may."""

    def __init__(self, stored_bytes: int, ratio: float = RATIO, free_bytes: int = FREE_BYTES) -> None:
        self._stored = stored_bytes
        self._limit = self._left = max(free_bytes, ratio * max(1, stored_bytes))

    def add(self, num_bytes: int) -> None:
        """Count some more. Raises `UnpackingError` past the limit."""
        self._left -= num_bytes
        if self._left < 0:
            raise UnpackingError(f"its {self._stored:,} bytes unpack to more than {self._limit:,.0f}")


class Watched:
    """A file whose failures to read are told from what torn content does to its decoder."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, num_bytes: int = -1) -> bytes:
        try:
            return self._file.read(num_bytes)
        except StorageError:
            raise
        except OSError as failed:
            raise StorageError(f"cannot read a raw shard: {failed}; run the same command again") from failed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Unpacked(io.RawIOBase):
    """The content of a file, unpacked as it is read if it is compressed. A zstd frame that asks for a window of more
    than 128 MiB is refused by its decoder."""

    def __init__(self, file: Any, compression: str | None, expansion: Expansion) -> None:
        self._is_packed, self._expansion = compression is not None, expansion
        self._stream = (
            pa.CompressedInputStream(pa.PythonFile(file, mode="r"), compression) if compression else file
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._stream.read(min(len(buffer), BLOCK_BYTES))
        if self._is_packed:
            self._expansion.add(len(block))
        buffer[: len(block)] = block
        return len(block)

    def skip_line(self) -> None:
        """Count a blank line as a record: a MiB of them takes a second to step over, and a KiB of a file."""
        if self._is_packed:
            self._expansion.add(RECORD_BYTES)


def stored_bytes(file: IO[bytes]) -> int:
    """Size of an open file, which is left at its start."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


def read_exactly(stream: Any, num_bytes: int) -> Iterator[bytes]:
    """Blocks that come to `num_bytes`, or to fewer at the end."""
    while num_bytes > 0 and (block := stream.read(min(num_bytes, BLOCK_BYTES))):
        num_bytes -= len(block)
        yield block


def lines_of(stream: Any, max_bytes: int) -> Iterator[bytes]:
    """Lines without their line feeds; of a line longer than `max_bytes` somewhat more than that, no end."""
    pieces: list[bytes] = []
    held = 0
    while block := stream.read(BLOCK_BYTES):
        first, *others = block.split(b"\n")
        for piece, ends in [(first, bool(others)), *((line, True) for line in others[:-1])]:
            if held <= max_bytes:
                pieces.append(piece)
                held += len(piece)
            if ends:
                yield b"".join(pieces)
                pieces, held = [], 0
        if others:
            pieces, held = [others[-1]], len(others[-1])
    if held:
        yield b"".join(pieces)
