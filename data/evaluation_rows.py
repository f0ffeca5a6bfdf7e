"""Rows of a split that is not trained on: a fixed set, the same for every run, dealt to the workers. No Ray
here.

Legend: T tokens with a loss per row (`seq_len`), R rows in the set, B rows per batch.

Unlike in training, a fragment's last row is padded, so each of its tokens but the first is predicted exactly
once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.storage import Store
from data.manifest import Manifest
from data.permutation import key_of, permute
from data.shards import read_fragment


@dataclass(frozen=True)
class EvaluationBatch:
    """Rows of one worker."""

    tokens: NDArray[np.unsignedinteger]
    """[B, T + 1] uint16 or uint32."""
    weights: NDArray[np.float32]
    """[B, T]: 1 for targets, 0 for padding."""
    num_bytes: float
    """UTF-8 bytes of the text behind the targets: the fragments' bytes, shared out by tokens where one is
    cut.
    """


def evaluation_batches(
    manifest: Manifest,
    store: Store,
    split: str,
    *,
    seq_len: int,
    rows_per_batch: int,
    rank: int,
    world_size: int,
    max_rows: int = 0,
) -> Iterator[EvaluationBatch]:
    """This worker's share of the set, in as many batches as every other worker gets.

    The set is the first `max_rows` rows (0: all) of the split's fragments in a fixed random order.

    Raises:
        ValueError: the split has no tokens.
        ShardError, StorageError: as `data.shards.read_fragment`.
    """
    fragments = manifest.select(split)
    fragments = fragments[
        permute(np.arange(len(fragments)), max(1, len(fragments)), key_of("evaluation", split))
    ]
    targets = np.maximum(manifest.fragments.num_tokens[fragments] - 1, 0)
    first_row = np.concatenate([[0], np.cumsum(-(-targets // seq_len))])
    num_rows = min(int(first_row[-1]), max_rows or int(first_row[-1]))
    if num_rows == 0:
        raise ValueError(
            f"the {split} split of manifest {manifest.digest} is empty; give it a larger fraction"
        )
    num_batches = -(-num_rows // (rows_per_batch * world_size))
    rows = _Rows(manifest, store, fragments, first_row, seq_len)
    for batch in range(num_batches):
        begin = min((rank * num_batches + batch) * rows_per_batch, num_rows)
        yield rows.batch(begin, min(begin + rows_per_batch, num_rows), rows_per_batch)


@dataclass
class _Rows:
    """The rows of fragments one after another; row i of fragment f has the number `first_row[f] + i`."""

    manifest: Manifest
    store: Store
    fragments: NDArray[np.int64]
    first_row: NDArray[np.int64]
    seq_len: int
    _kept: tuple[int, NDArray[np.unsignedinteger]] | None = None

    def batch(self, begin: int, end: int, size: int) -> EvaluationBatch:
        """Rows `begin` up to `end`, padded to `size` rows."""
        dtype = np.dtype(self.manifest.token_dtype)
        tokens = np.full((size, self.seq_len + 1), self.manifest.boundary_id, dtype)
        weights = np.zeros((size, self.seq_len), np.float32)
        num_bytes = 0.0
        for place, number in enumerate(range(begin, end)):
            index = int(np.searchsorted(self.first_row, number, side="right")) - 1
            start = (number - int(self.first_row[index])) * self.seq_len
            whole = self._fragment(index)
            piece = whole[start : start + self.seq_len + 1]
            tokens[place, : len(piece)] = piece
            weights[place, : len(piece) - 1] = 1
            of_fragment = int(self.manifest.fragments.num_bytes[self.fragments[index]])
            num_bytes += of_fragment * (len(piece) - 1) / (len(whole) - 1)
        return EvaluationBatch(tokens, weights, num_bytes)

    def _fragment(self, index: int) -> NDArray[np.unsignedinteger]:
        if self._kept is None or self._kept[0] != index:
            self._kept = (index, read_fragment(self.store, self.manifest, int(self.fragments[index])))
        return self._kept[1]
