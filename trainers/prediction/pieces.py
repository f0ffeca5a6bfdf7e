"""Answers of an exported task model to records without labels, piece by piece and part by part.

A piece is what one worker reads from its start to its end: some MiB of JSON lines, a row group of Parquet, or a whole
file of a format that cannot be entered in the middle. Its answers become parts of PART_ROWS records, each a file that
is there once it is whole; `finished/` names the pieces that are done. A job that was killed goes on at the next part.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, NotRequired

import pydantic
import torch
from pydantic import Field
from typing_extensions import TypedDict

from cluster.configuration.stored_file import (
    WITH_OTHER_KEYS,
    DamagedFileError,
    place_of,
    read_json,
    read_json_lines,
)
from cluster.hardware.machine import device_here
from cluster.storage.uris import Store, open_store
from trainers.exported.local_copy import local_copy
from trainers.exported.model_digest import hashed
from trainers.exported.model_files import ModelFolderError
from trainers.prediction.rows import Piece, Row, rows_of
from trainers.tasks.encoding import Encoded
from trainers.tasks.evaluation import answers_to, asked
from trainers.tasks.export import load_task_model
from trainers.tasks.record_files import LONGEST_REASON
from trainers.tasks.records import Example, asked_columns, example_of

PART_ROWS = 4_096
"""Records of a file of answers, and all that a worker holds: at most this much is done again."""
PART_BYTES = 64 << 20
"""Of the records of a part, give or take one."""
ENCODED_CHARACTERS = 1 << 20
"""Characters of the records that are tokenized together, give or take a record: bounds what their tokens take."""
FINISHED = "finished/"
_PIECE = r"([^/]+-[0-9a-f]{12})"
_OF_A_PIECE = re.compile(rf"{FINISHED}{_PIECE}|{_PIECE}-\d{{5,}}\.jsonl")
ANSWERED_AGAIN = "its records are answered again"
NOT_ANSWERED = "the model's scores for it are not finite"
as_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


@dataclass(frozen=True)
class Counts:
    """How records ended."""

    answered: Annotated[int, Field(ge=0)] = 0
    refused: Annotated[int, Field(ge=0)] = 0
    """Those that are no example, or that the model has no finite scores for: their line holds the error."""
    truncated: Annotated[int, Field(ge=0)] = 0
    """Answered ones that were cut: longer than the model's positions, or than an answer to write leaves of them."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.answered + other.answered, self.refused + other.refused, self.truncated + other.truncated
        )


@pydantic.with_config(WITH_OTHER_KEYS)
class Line(TypedDict):
    """Of a part: the answer to a record, or its error."""

    place: str
    error: NotRequired[str]


def finished_pieces(output: Store) -> dict[str, Counts]:
    """Names of the pieces whose answers are all there, with their counts. A damaged count is told, and none."""
    found = {}
    for info in output.list(FINISHED):
        try:
            counts = read_json(output, info.path, Counts, "its records are counted again")
        except DamagedFileError as damaged:
            print(damaged)
        else:
            found[info.path.removeprefix(FINISHED)] = counts
    return found


def answered_pieces(output: Store) -> set[str]:
    """Names of the pieces that have answers, or are said to be finished."""
    return {found[1] or found[2] for info in output.list() if (found := _OF_A_PIECE.fullmatch(info.path))}


class Predictor:
    """Holds a model, and answers pieces into a folder."""

    def __init__(
        self,
        model_uri: str,
        output_uri: str,
        rows_per_batch: int,
        threads: int,
        max_new_tokens: int = 64,
        digest: str = "",
    ) -> None:
        """`digest`: what the model that is loaded must have; empty: whatever there is. Raises ModelFolderError."""
        torch.set_num_threads(threads)
        source = hashed(local_copy(open_store(model_uri)))
        self._model, self._encoder = load_task_model(source)
        if digest and (found := source.digest()) != digest:
            raise ModelFolderError(
                f"--model {model_uri} was replaced while it answers: {digest} there, {found} here; put that one back, "
                "or choose another folder for the answers"
            )
        self._device = device_here()
        self._model.to(self._device)
        self._output, self._rows, self._max_new_tokens = (
            open_store(output_uri),
            rows_per_batch,
            max_new_tokens,
        )

    def answer(self, piece: Piece) -> Iterator[Counts]:
        """Answer the parts of a piece that are not there yet, and name it finished; the counts of each part."""
        there = {info.path for info in self._output.list(f"{piece.name}-")}
        rows, total = rows_of(piece, asked_columns(self._encoder.task, labelled=False)), Counts()
        for number in itertools.count():
            path = f"{piece.name}-{number:05d}.jsonl"
            before = self._answered(path) if path in there else None
            # A part that is there has as many records as it was once cut with.
            part = next_part(rows) if before is None else list(itertools.islice(rows, len(before)))
            if before is not None and self._are_answers_to(part, before, path):
                total += counts_of(before)
                continue
            if number and not part:
                break
            lines = self.lines(part)
            content = "".join(as_json(line) + "\n" for line in lines).encode(errors="backslashreplace")
            self._output.put(path, content)
            counts = counts_of(lines)
            total += counts
            yield counts
        self._output.put(f"{FINISHED}{piece.name}", json.dumps(asdict(total), allow_nan=False).encode())

    def _answered(self, path: str) -> list[dict[str, Any]] | None:
        """The lines of a part that is there; None where it is damaged, and to be answered again."""
        try:
            return read_json_lines(self._output, path, Line, ANSWERED_AGAIN, not_finite=True)
        except DamagedFileError as damaged:
            print(damaged)
            return None

    def _are_answers_to(self, rows: list[Row], lines: list[dict[str, Any]], path: str) -> bool:
        if [line["place"] for line in lines] == [place for place, _ in rows]:
            return True
        print(DamagedFileError(place_of(self._output, path), "it holds other records", ANSWERED_AGAIN))
        return False

    def lines(self, rows: list[Row]) -> list[dict[str, Any]]:
        """A line for each record, in their order; one that is no example is answered with its error."""
        lines: list[dict[str, Any]] = []
        examples: list[tuple[int, Example]] = []
        for place, row in rows:
            lines.append({"place": place})
            try:
                if isinstance(row, str):
                    raise ValueError(row)
                example = example_of(self._encoder.task, row, place, labelled=False)
            except (ValueError, RecursionError) as error:
                lines[-1]["error"] = str(error)[:LONGEST_REASON]
            else:
                examples.append((len(lines) - 1, example))
        # Lines are found by their numbers: like lengths come together, so that little of a batch is padding.
        examples.sort(key=lambda numbered: len(numbered[1].content))
        ends = itertools.accumulate(len(example.content) for _, example in examples)
        groups = itertools.groupby(
            zip(ends, examples, strict=True), lambda ended: ended[0] // ENCODED_CHARACTERS
        )
        for _, group in groups:
            self._answer([numbered for _, numbered in group], lines)
        return lines

    @torch.inference_mode()
    def _answer(self, examples: list[tuple[int, Example]], lines: list[dict[str, Any]]) -> None:
        """Write answers into the lines that the examples belong to."""
        chosen = [example for _, example in examples]
        encoded: list[Encoded] = self._encoder.encode(chosen)
        answers, _, _ = answers_to(
            self._model,
            self._encoder,
            chosen,
            encoded,
            rows_per_batch=self._rows,
            device=self._device,
            max_new_tokens=self._max_new_tokens,
        )
        rows = asked(self._encoder, chosen, encoded, self._max_new_tokens)
        for (at, example), row, answer in zip(examples, rows, answers, strict=True):
            lines[at]["id"] = example.id
            if not answer.is_finite:
                lines[at]["error"] = NOT_ANSWERED
                continue
            lines[at]["answer"] = answer.value
            if not math.isnan(answer.confidence):
                lines[at]["confidence"] = round(answer.confidence, 6)
            if row.truncated:
                lines[at]["truncated"] = True


def next_part(rows: Iterator[Row]) -> list[Row]:
    """The next rows, `PART_ROWS` at most, fewer where they are long."""
    part: list[Row] = []
    held = 0
    while len(part) < PART_ROWS and held < PART_BYTES and (row := next(rows, None)) is not None:
        part.append(row)
        held += _characters(row[1])
    return part


def _characters(value: Any) -> int:
    """About what a record holds, in characters; it may be nested as deep as JSON is read."""
    found, left = 0, [value]
    while left:
        each = left.pop()
        found += len(each) if isinstance(each, str) else 1
        left += each if isinstance(each, list) else each.values() if isinstance(each, dict) else ()
    return found


def counts_of(lines: Iterable[dict[str, Any]]) -> Counts:
    """The counts of a part, from its lines."""
    return sum(
        (Counts("error" not in line, "error" in line, "truncated" in line) for line in lines), Counts()
    )
