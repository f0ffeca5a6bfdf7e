"""The text that a tokenizer is trained on: a bounded sample of the train split.

Which text that is depends on names of raw shards and content of documents, not on time or place.
"""

import hashlib
from collections.abc import Iterator, Sequence

from cluster.storage.uris import open_store
from data.curation.exact_duplicates import read_hashes
from data.preparing.pieces import Piece, changed_since_survey, hashes_path, read_piece
from data.reading.documents import Document
from data.reading.raw_shards import CorpusConfig
from data.reading.splits import keyed_points, split_of
from data.shards.manifest import SPLITS

# Enough to see all of a corpus whose shards differ; reading more takes longer than training.
SAMPLED_PIECES = 64
# A piece is read until it has shown its share so many times over: neighbours are often alike.
STRETCH = 4
# Any key: what is chosen must not depend on how documents were dealt to splits.
SAMPLE_KEY = 0x5A3B1E


def sample_texts(pieces: Sequence[Piece], train_bytes: Sequence[int], config: CorpusConfig) -> Iterator[str]:
    """Texts of the train split, at most `config.tokenizer.sample_bytes` in UTF-8; a piece's last may be cut.

    Args:
        pieces: The whole corpus.
        train_bytes: Bytes of each piece's train split.

    Raises:
        CorpusError: a piece's documents are not those of its survey.
    """
    by_hash = sorted(range(len(pieces)), key=lambda index: hashlib.sha256(_name(pieces[index])).digest())
    chosen = sorted([index for index in by_hash if train_bytes[index]][:SAMPLED_PIECES])
    share = _equal_share([train_bytes[index] for index in chosen], config.tokenizer.sample_bytes)
    seen: set[bytes] = set()
    for index in chosen:
        yield from _of_piece(pieces[index], train_bytes[index], share, seen, config)


def _of_piece(
    piece: Piece, train_bytes: int, share: int, seen: set[bytes], config: CorpusConfig
) -> Iterator[str]:
    stretch = min(train_bytes, STRETCH * share)
    passed = taken = 0
    contents, splits = read_hashes(open_store(config.prepared), hashes_path(piece.survey_digest(config)))
    ordinal = -1
    for shard, record in read_piece(piece, config):
        if not isinstance(record, Document):
            continue
        ordinal += 1
        split = split_of(config.splits, shard.path, record.id, record.content)
        surveyed = ordinal < len(splits) and (contents[ordinal].tobytes(), SPLITS[splits[ordinal]])
        if surveyed != (record.content, split):  # the tokenizer outlives the attempt that trains it
            raise changed_since_survey(piece, config)
        if split != "train":
            continue
        passed += record.num_bytes
        point = keyed_points(int.from_bytes(record.content[:8], "little"), SAMPLE_KEY)
        if point * stretch < share and record.content not in seen:
            seen.add(record.content)
            text = record.text.encode()[: share - taken]
            yield text.decode(errors="ignore")  # a character that the cut went through is dropped
            taken += len(text)
        if passed >= stretch or taken >= share:
            return


def _equal_share(sizes: Sequence[int], total: int) -> int:
    """The greatest share, equal for all, with which they take at most `total`; small ones take less."""
    remaining = total
    for left, size in zip(range(len(sizes), 0, -1), sorted(sizes), strict=True):
        if size * left > remaining:
            return remaining // left
        remaining -= size
    return max(sizes, default=0)


def _name(piece: Piece) -> bytes:
    return f"{piece.source}/{piece.shards[0].path}".encode()
