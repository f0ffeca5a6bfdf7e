"""Labelled records as they come: files of JSONL, CSV or Parquet become checked examples, or one clear error."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.configuration.keys import nearest
from cluster.console.errors import ConfigError
from cluster.limits.bounds import out_of_bounds
from cluster.storage.uris import Store
from data.reading.clean import normalise
from data.reading.parquet_rows import RepeatedColumnError
from trainers.tasks.record_files import LONGEST_REASON, BrokenRow, column_names, find_files, rows_in
from trainers.tasks.task import TaskConfig

SHOWN = 3
"""Wrong records that an error names."""
FREE_BYTES = 256 << 20
"""What a file of a task may unpack to, whatever its ratio. All its examples are in memory, and each counts for 256
bytes besides: 1 M of them at most."""

Target = Any
"""str (a label, or an answer), list[str] (labels or tags), float, or {"text": str, "start": int} of a span."""


@dataclass(frozen=True, slots=True)
class Example:
    """One record, checked."""

    id: str
    text: str
    """Of token classification the words, joined by blanks."""
    pair: str
    """Second text; empty where the task has none."""
    words: list[str]
    """Of token classification; else empty."""
    target: Target
    """None in records that are to be predicted."""

    @property
    def content(self) -> str:
        """What makes two records the same question."""
        return f"{self.text}\n{self.pair}" if self.pair else self.text


def read_examples(task: TaskConfig, uri: str, *, labelled: bool = True) -> list[Example]:
    """Read and check all records of a file or folder.

    Raises:
        ConfigError: no files, a column that is missing, or records that are no examples; each with the first
            few places.
    """
    examples: list[Example] = []
    problems: list[str] = []
    num_problems = 0
    store, paths = find_files(uri)
    for path in paths:
        for found in _examples_in(task, store, path, labelled):
            if isinstance(found, Example):
                examples.append(found)
            else:
                num_problems += 1
                problems += [found] if len(problems) < SHOWN else []
    if problems:
        more = [f"… and {num_problems - SHOWN:,} more such records"] if num_problems > SHOWN else []
        raise ConfigError([*problems, *more])
    if not examples:
        raise ConfigError([f"{uri} holds no records; a task needs some in every split"])
    return examples


def _examples_in(task: TaskConfig, store: Store, path: str, labelled: bool) -> Iterator[Example | str]:
    """The examples of a file; a record that is none is a line that names it."""
    at, columns = f"{store.uri}/{path}", asked_columns(task, labelled)
    try:
        names = column_names(store, path, columns)
    except RepeatedColumnError as twice:
        raise ConfigError([f"{at} {twice}"]) from None
    if names is not None and (missing := _missing_columns(task, names, labelled)):
        raise ConfigError([f"{at}: {line}" for line in missing])
    ordinal = 0  # of the records alone: a line that is blank names none
    for number, row in rows_in(store, path, columns, free_bytes=FREE_BYTES):
        ordinal += 1
        if isinstance(row, BrokenRow):
            place = at if row.ends_file else f"{at}: record {number}"
            yield f"{place} cannot be read: {row.reason}" + (f" (record {number})" if row.ends_file else "")
            continue
        try:
            yield example_of(task, row, f"{path}:{ordinal}", labelled)
        except (ValueError, RecursionError) as error:
            yield f"{at}: record {number}: {error}"[: len(at) + LONGEST_REASON]


def _missing_columns(task: TaskConfig, names: Sequence[str], labelled: bool) -> list[str]:
    wanted = needed_columns(task) | (
        {"label": task.columns.label} if labelled and not task.columns.messages else {}
    )
    return [
        f"there is no column {name!r} (columns.{key}); nearest: {nearest(name, names) or sorted(names)}"
        for key, name in wanted.items()
        if name not in names
    ]


def needed_columns(task: TaskConfig) -> dict[str, str]:
    """The columns that every record has, also an unlabelled one: their names by key."""
    columns = task.columns
    if columns.messages:
        return {"messages": columns.messages}
    wanted = {"tokens": columns.tokens} if task.kind == "token_classification" else {"text": columns.text}
    return wanted | ({"pair": columns.pair} if columns.pair else {})


def asked_columns(task: TaskConfig, labelled: bool) -> list[str]:
    """All columns that are read of a record."""
    label = [task.columns.label] if labelled else []
    return list(dict.fromkeys([*needed_columns(task).values(), task.columns.id, *label]))


def example_of(task: TaskConfig, row: Mapping[str, Any], place: str, labelled: bool = True) -> Example:
    """Check one record. Raises ValueError with what is wrong."""
    columns = task.columns
    for column in asked_columns(task, labelled):
        if (value := row.get(column)) is not None:
            _refuse_half_character(column, value)
    words: Any = []
    if columns.messages:
        row = dict(row) | _chat(task, row.get(columns.messages), labelled)
    if task.kind == "token_classification":
        words = row.get(columns.tokens)
        if not _texts(words) or not words or not all(word.strip() for word in words):
            raise ValueError(f"{columns.tokens}={words!r} is not a list of words")
        text = " ".join(words)
    else:
        text = _text(row, columns.text)
    pair = _text(row, columns.pair) if columns.pair else ""
    name = row.get(columns.id)
    target = _target(task, row, words) if labelled else None
    return Example(place if name in (None, "") else str(name), text, pair, words, target)


def _refuse_half_character(column: str, value: Any) -> None:
    """JSON can spell half a surrogate pair; no tokenizer, and no file of UTF-8, takes one."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"{column} holds {half}, half a character, which is not UTF-8; remove it") from None


def _text(row: Mapping[str, Any], column: str) -> str:
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{column}={text!r} is not a text")
    return normalise(text)


def _chat(task: TaskConfig, messages: Any, labelled: bool) -> dict[str, str]:
    """A chat as the text and the answer that other records of generation have in columns of their own."""
    columns = task.columns
    if not isinstance(messages, list) or not all(
        isinstance(each, dict) and _texts([each.get("role"), each.get("content")]) for each in messages
    ):
        raise ValueError(f'{columns.messages}={messages!r} is not a list of {{"role", "content"}}')
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    if labelled and not answered:
        raise ValueError(f"{columns.messages} does not end with what the assistant says")
    asked = messages[:-1] if answered else messages
    text = "\n".join(task.prompt.turn.format(role=each["role"], content=each["content"]) for each in asked)
    return {columns.text: text} | ({columns.label: messages[-1]["content"]} if labelled else {})


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _target(task: TaskConfig, row: Mapping[str, Any], words: Sequence[str]) -> Target:
    column = task.columns.label
    value: Any = row.get(column)
    if task.kind == "token_classification":
        if not _texts(value) or len(value) != len(words):
            raise ValueError(f"{column} has not one tag for each of the {len(words)} words: {value!r}")
        return value
    if task.kind == "regression":
        return _number(column, value)
    if task.kind == "question_answering":
        return _span(column, value, row[task.columns.pair])
    if task.multi_label:
        if not _texts(value):
            raise ValueError(f"{column}={value!r} is not a list of labels")
        return sorted(set(value))
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value, allow_nan=False)  # of JSON and Parquet: the label is how JSON writes it
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column}={value!r} is not a {'text' if task.kind == 'generation' else 'label'}")
    return value


def _number(column: str, value: Any) -> float:
    """A number, or a text that is one, as all values of a CSV are texts."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str) or "_" in str(value):
            raise ValueError  # float() reads the underscores of Python's own numbers
        number = float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{column}={value!r} is not a number")
    if beyond := out_of_bounds(column, number):
        raise ValueError(f"{column}={value!r} {beyond}; give it in another unit")
    return number


def _span(column: str, value: Any, context: str) -> dict[str, Any]:
    """An answer is a text, or {"text", "start"}; as SQuAD's, lists of one or more take the first. The start is one in
    the context as the record has it; what is returned is one in the normalised context, as the example has it."""
    start = None
    if isinstance(value, dict):
        start = value.get("start", value.get("answer_start"))
        value = value.get("text")
        value, start = (part[0] if isinstance(part, list) and part else part for part in (value, start))
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{column}={value!r} is not an answer: a text, or its text and start")
    if start is not None and (isinstance(start, bool) or not isinstance(start, int)):
        raise ValueError(f"{column}: start={start!r} is not a whole number of characters into the context")
    text, normalised = normalise(value), normalise(context)
    if start is None:
        at = normalised.find(text)
    else:
        stands = start >= 0 and context[start : start + len(value)] == value
        # With an x behind it, blank space before the answer is not taken for the end of a text.
        at = len(normalise(context[:start] + "x")) - 1 if stands else -1
    if at < 0 or normalised[at : at + len(text)] != text:
        raise ValueError(f"{column}={value!r} does not stand in the context at {start}")
    return {"text": text, "start": at}


def to_lines(examples: Sequence[Example]) -> bytes:
    """JSON lines that `trainers/tasks/stored_records.py` reads back."""
    return "".join(
        json.dumps(asdict(example), ensure_ascii=False, allow_nan=False) + "\n" for example in examples
    ).encode()
