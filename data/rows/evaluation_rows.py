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

from cluster.storage.uris import Store
from data.order.epochs import Rows
from data.order.permutation import key_of, permute
from data.rows.framing import NO_LABEL, Framing
from data.shards.manifest import Manifest
from data.shards.shards import read_fragment


@dataclass(frozen=True)
class EvaluationBatch:
    """Rows of one worker."""

    tokens: NDArray[np.unsignedinteger]
    """[B, T + 1], or [B, T] where framed; uint16 or uint32."""
    labels: NDArray[np.int8]
    """[B]: of sentence pairs; -1: none."""
    weights: NDArray[np.float32]
    """[B, T]: 1 for targets of plain rows, 0 for padding; of framed rows, 0 for those that only fill up."""
    num_bytes: float
    """UTF-8 bytes of the text behind the targets: the fragments' bytes, shared out by tokens where one is
    cut.
    """
    rows: Rows
    """[B]: which rows they are; -1 for padding."""


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
    framing: Framing | None = None,
    source: str | None = None,
) -> Iterator[EvaluationBatch]:
    """This worker's share of the set, in as many batches as every other worker gets.

    The set is the first `max_rows` rows (0: all) of the split's fragments in a fixed random order; of one source's
    where `source` names it.

    Raises:
        ValueError: the split has no tokens.
        ShardError, StorageError: as `data.shards.shards.read_fragment`.
    """
    fragments = manifest.select(split, source)
    fragments = fragments[
        permute(np.arange(len(fragments)), max(1, len(fragments)), key_of("evaluation", split))
    ]
    targets = np.maximum(manifest.fragments.num_tokens[fragments] - 1, 0)
    first_row = np.concatenate([[0], np.cumsum(-(-targets // seq_len))])
    num_rows = min(int(first_row[-1]), max_rows or int(first_row[-1]))
    if num_rows == 0:
        raise ValueError(
            f"the {split} split of {source or 'all sources'} in manifest {manifest.digest} is empty; "
            "give it a larger fraction"
        )
    num_batches = -(-num_rows // (rows_per_batch * world_size))
    rows = _Rows(manifest, store, fragments, first_row, seq_len, framing)
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
    framing: Framing | None
    _kept: tuple[int, NDArray[np.unsignedinteger]] | None = None

    def batch(self, begin: int, end: int, size: int) -> EvaluationBatch:
        """Rows `begin` up to `end`, padded to `size` rows."""
        dtype = np.dtype(self.manifest.token_dtype)
        width = self.seq_len if self.framing else self.seq_len + 1
        tokens = np.full((size, width), self.manifest.boundary_id, dtype)
        labels = np.full(size, NO_LABEL, np.int8)
        weights = np.zeros((size, self.seq_len), np.float32)
        num_bytes = 0.0
        identity = np.full((5, size), -1)
        for place, number in enumerate(range(begin, end)):
            index = int(np.searchsorted(self.first_row, number, side="right")) - 1
            start = (number - int(self.first_row[index])) * self.seq_len
            whole, fragment = self._fragment(index), int(self.fragments[index])
            piece = whole[start : start + self.seq_len + 1]
            shard = self.manifest.shards[self.manifest.fragments.shard[fragment]]
            source = self.manifest.sources.index(shard.source)
            identity[:, place] = source, 0, fragment, number - int(self.first_row[index]), start
            if self.framing:
                row = Rows(*identity[:, place : place + 1])
                tokens[place : place + 1], labels[place : place + 1] = self.framing.frame(whole, row)
                weights[place] = 1
            else:
                tokens[place, : len(piece)] = piece
                weights[place, : len(piece) - 1] = 1
            of_fragment = int(self.manifest.fragments.num_bytes[fragment])
            num_bytes += of_fragment * (len(piece) - 1) / (len(whole) - 1)
        return EvaluationBatch(tokens, labels, weights, num_bytes, Rows(*identity))

    def _fragment(self, index: int) -> NDArray[np.unsignedinteger]:
        if self._kept is None or self._kept[0] != index:
            self._kept = (index, read_fragment(self.store, self.manifest, int(self.fragments[index])))
        return self._kept[1]
