"""Answers of an exported task model to records without labels, piece by piece.

A piece is some MiB of one input file; its answers become one output file. A piece whose file is there is finished, so a
job that was killed goes on with the others.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
import torch

from cluster.storage import Store, open_store
from trainers.task_evaluation import answers_to
from trainers.task_export import load_task_model
from trainers.task_records import example_of, find_files, read_rows

PIECE_BYTES = 4 << 20
"""About 10,000 to 40,000 short records: minutes of a model's work, seconds of a piece that is done again."""


@dataclass(frozen=True)
class Piece:
    """A part of one input file: bytes [start, stop) of JSON lines, one row group of Parquet, or all of another file."""

    uri: str
    path: str
    start: int = 0
    stop: int = -1
    row_group: int = -1

    @property
    def output(self) -> str:
        """Name of the file with its answers."""
        digest = hashlib.blake2b(repr(self).encode(), digest_size=6).hexdigest()
        return f"{self.path.rpartition('/')[2].partition('.')[0]}-{digest}.jsonl"


def pieces_of(uri: str) -> list[Piece]:
    """Cut all files at a URI. Raises `ConfigError` where there are none."""
    store, paths = find_files(uri)
    return [piece for path in paths for piece in _cut(store, path)]


def _cut(store: Store, path: str) -> Iterator[Piece]:
    if path.endswith(".jsonl"):
        size = store.size(path)
        for start in range(0, size, PIECE_BYTES):
            yield Piece(store.uri, path, start, min(size, start + PIECE_BYTES))
    elif path.endswith(".parquet"):
        with store.open(path) as file:
            groups = pq.ParquetFile(file).num_row_groups
        yield from (Piece(store.uri, path, row_group=group) for group in range(groups))
    else:
        yield Piece(store.uri, path)


def rows_of(piece: Piece) -> list[tuple[str, dict[str, Any]]]:
    """The piece's records, each with its place. A JSON line belongs to the piece that it begins in."""
    store = open_store(piece.uri)
    if piece.row_group >= 0:
        with store.open(piece.path) as file:
            rows = pq.ParquetFile(file).read_row_group(piece.row_group).to_pylist()
        return [(f"{piece.path}:{piece.row_group}:{n}", row) for n, row in enumerate(rows, 1)]
    if piece.stop < 0:
        return [(f"{piece.path}:{n}", row) for n, row in enumerate(read_rows(store, piece.path), 1)]
    found = []
    with store.open(piece.path) as file:
        file.seek(max(0, piece.start - 1))
        if piece.start:
            file.readline()  # the line before: one byte of it at least, the line feed
        while (place := file.tell()) < piece.stop and (line := file.readline()):
            if line.strip():
                found.append((f"{piece.path}@{place}", json.loads(line)))
    return found


class Predictor:
    """Holds a model, and answers pieces into a folder."""

    def __init__(self, model_uri: str, output_uri: str, rows_per_batch: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model, self._encoder = load_task_model(open_store(model_uri))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device)
        self._output, self._rows = open_store(output_uri), rows_per_batch

    @torch.inference_mode()
    def answer(self, piece: Piece) -> dict[str, int]:
        """Answer a piece and put its file; the numbers of records answered and refused.

        A record that is no example is answered with its error, so that every record of the input has a line.
        """
        lines: list[dict[str, Any]] = []
        places, examples = [], []
        for place, row in rows_of(piece):
            lines.append({"place": place})
            try:
                example = example_of(self._encoder.task, row, place, labelled=False)
            except ValueError as error:
                lines[-1]["error"] = str(error)
                continue
            places.append(len(lines) - 1)
            examples.append(example)
        if examples:
            encoded = self._encoder.encode(examples)
            answers, _, _ = answers_to(
                self._model, self._encoder, examples, encoded, rows_per_batch=self._rows, device=self._device
            )
            for at, example, answer in zip(places, examples, answers, strict=True):
                sure = {} if math.isnan(answer.confidence) else {"confidence": round(answer.confidence, 6)}
                lines[at] |= {"id": example.id, "answer": answer.value, **sure}
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self._output.put(piece.output, text.encode())
        return {"answered": len(examples), "refused": len(lines) - len(examples)}
