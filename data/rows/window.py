"""Reading one window of one lane into one Arrow block, and taking such blocks apart. No Ray here.

Legend: N steps in the block, k rows per lane and step, T tokens with a loss per row.

A block has a row for each of its N * k rows, in the order of training: the row's identity beside its T + 1
tokens, or T where they are framed (data/rows/framing.py), and the step and lane that it is for, so that who gets a
block can tell that it is the right one.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from cluster.storage.uris import open_store
from data.order.epochs import Rows
from data.order.order import Order, Window
from data.rows.framing import NO_LABEL, FramingConfig, framing_of
from data.shards.manifest import Manifest
from data.shards.shards import read_fragment

READ_CPUS = 0.25
"""CPUs that Ray reserves for a reader. It works for a small part of the time: a second for minutes of
training.
"""
FILLER_LANE = -1
"""Of blocks that only make up for lanes where the workers do not divide them."""
SCHEMA = pa.schema(
    {
        "step": pa.int64(),
        "lane": pa.int32(),
        "source": pa.int16(),
        "epoch": pa.int32(),
        "fragment": pa.int64(),
        "row": pa.int32(),
        "start": pa.int64(),
        "label": pa.int8(),
        "tokens": pa.binary(),
    }
)
_IDENTITY = ("source", "epoch", "fragment", "row", "start")


@dataclass(frozen=True)
class WindowRead:
    """One read of a window: everything a reader on another machine needs, a few KiB."""

    prepared: str
    """URI of the prepared corpus."""
    window: Window
    fragments: NDArray[np.int64]
    """Indices in the manifest of the fragments concerned, ascending."""
    part: Manifest
    """The manifest of these fragments alone."""
    framing: FramingConfig | None = None
    """How rows are framed; None: they are plain consecutive tokens."""

    def read(self) -> pa.Table:
        """Read the fragments, each verified, and pick the rows.

        A store that is away is waited for, within the limits of `cluster.storage.store.RetryPolicy`.

        Raises:
            ShardError: a fragment does not have the manifest's checksum; the message names shard and
                fragment.
            StorageError: the store stayed away, or a shard is missing.
        """
        store, rows, seq_len = open_store(self.prepared), self.window.rows(), self.window.seq_len
        framing = self.framing and framing_of(self.framing, self.prepared, self.part, seq_len)
        width = row_width(seq_len, self.framing)
        tokens = np.empty((len(rows), width), np.dtype(self.part.token_dtype).newbyteorder("<"))
        labels = np.full(len(rows), NO_LABEL, np.int8)
        local = np.searchsorted(self.fragments, rows.fragment)
        for fragment in np.unique(local):
            here = np.flatnonzero(local == fragment)
            whole = read_fragment(store, self.part, int(fragment))
            if framing:
                tokens[here], labels[here] = framing.frame(whole, rows[here])
            else:
                tokens[here] = sliding_window_view(whole, width)[rows.start[here]]
        return _block(self.window.lane, self._steps(), rows, labels, tokens)

    def _steps(self) -> NDArray[np.int64]:
        steps = np.arange(self.window.start, self.window.stop)
        return np.repeat(steps, self.window.slots.mixture.rows_per_lane)


@dataclass(frozen=True)
class Block:
    """One window of one lane, as read."""

    lane: int
    steps: NDArray[np.int64]
    """[N * k]"""
    rows: Rows
    """[N * k]"""
    labels: NDArray[np.int8]
    """[N * k]: of sentence pairs; -1: none."""
    tokens: NDArray[np.unsignedinteger]
    """[N * k, T + 1], or [N * k, T] where framed; uint16 or uint32, little-endian, read-only; zeros in a
    filler."""


def plan_read(
    order: Order, manifest: Manifest, prepared: str, window: Window, framing: FramingConfig | None = None
) -> WindowRead:
    """What reading a window takes."""
    fragments = np.unique(window.runs.fragment)
    return WindowRead(prepared, window, fragments, manifest.part(fragments), framing)


def row_width(seq_len: int, framing: FramingConfig | None) -> int:
    """Tokens of a row: plain ones end with the last target."""
    return seq_len if framing else seq_len + 1


def filler(start: int, stop: int, rows_per_lane: int) -> pa.Table:
    """A block for no lane, of the steps from `start` up to `stop`: rows without tokens."""
    steps = np.repeat(np.arange(start, stop), rows_per_lane)
    nothing = np.full(len(steps), -1)
    identity, tokens = Rows(*[nothing] * len(_IDENTITY)), np.empty((len(steps), 0), np.uint16)
    return _block(FILLER_LANE, steps, identity, nothing.astype(np.int8), tokens)


def unpack(block: pa.Table, width: int, token_dtype: str) -> Block:
    """Take a block of rows of `width` tokens apart, without a copy of the tokens."""
    column = block.column("tokens").combine_chunks()
    tokens = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    dtype = np.dtype(token_dtype).newbyteorder("<")
    lane = int(block.column("lane")[0].as_py())
    if lane == FILLER_LANE:
        values = np.zeros((len(tokens), width), dtype)
    else:
        row_bytes = width * dtype.itemsize
        start, size = tokens.offset * row_bytes, len(tokens) * row_bytes
        values = np.frombuffer(tokens.buffers()[2], np.uint8)[start : start + size].view(dtype)
    identity = (block.column(name).to_numpy().astype(np.int64) for name in _IDENTITY)
    labels = block.column("label").to_numpy()
    return Block(lane, block.column("step").to_numpy(), Rows(*identity), labels, values.reshape(-1, width))


def _block(
    lane: int,
    steps: NDArray[np.int64],
    rows: Rows,
    labels: NDArray[np.int8],
    tokens: NDArray[np.unsignedinteger],
) -> pa.Table:
    offsets = np.arange(len(tokens) + 1, dtype=np.int32) * (tokens.shape[1] * tokens.itemsize)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(tokens))]
    identity = [getattr(rows, name).astype(SCHEMA.field(name).type.to_pandas_dtype()) for name in _IDENTITY]
    columns = [
        pa.array(steps),
        pa.array(np.full(len(steps), lane, np.int32)),
        *(pa.array(column) for column in identity),
        pa.array(labels),
        pa.Array.from_buffers(pa.binary(), len(tokens), buffers),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)
