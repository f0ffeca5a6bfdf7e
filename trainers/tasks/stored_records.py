"""Records of a split task, and answers to them, read back from where this project put them."""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from typing_extensions import TypedDict

from cluster.configuration.stored_file import (
    WITH_OTHER_KEYS,
    DamagedFileError,
    matches,
    place_of,
    read_json_lines,
)
from cluster.storage.uris import Store
from trainers.tasks.records import Example
from trainers.tasks.task import TaskConfig


class _Span(TypedDict):
    text: str
    start: Annotated[int, Field(ge=0)]


@pydantic.with_config(WITH_OTHER_KEYS)
class _Answered(TypedDict):
    id: str
    text: str
    pair: str
    target: Any
    answer: Any
    confidence: float | None


def target_shape(task: TaskConfig, *, answered: bool = False) -> Any:
    """The type of a target, or of an answer."""
    if task.kind == "regression":
        return float
    if task.kind == "question_answering":
        return str if answered else _Span
    if not task.has_labels:
        return str
    label: Any = Literal[task.labels]  # type: ignore[valid-type]  # of a tuple it takes each
    return list[label] if task.kind == "token_classification" or task.multi_label else label


def read_split(
    store: Store, path: str, task: TaskConfig, remedy: str, *, count: int, checksum: str = ""
) -> list[Example]:
    """The examples of a split, which has so many, and that checksum if one was noted. Raises `DamagedFileError`."""
    examples: list[Example] = read_json_lines(store, path, Example, remedy, checksum=checksum)
    if len(examples) != count:
        more = f"it has {len(examples):,} records, not the {count:,} that were put there"
        raise DamagedFileError(place_of(store, path), more, remedy)
    shape = target_shape(task)
    for number, example in enumerate(examples, 1):
        wrong = matches(example.target, shape)
        if task.kind == "token_classification" and not wrong and len(example.target) != len(example.words):
            wrong = f"{len(example.target)} tags for {len(example.words)} words"
        if wrong:
            raise DamagedFileError(f"{place_of(store, path)}:{number}", wrong, remedy)
    return examples


def read_answers(store: Store, path: str, task: TaskConfig, remedy: str) -> list[dict[str, Any]]:
    """The answers to the test split. Raises `DamagedFileError`."""
    answers: list[dict[str, Any]] = read_json_lines(store, path, _Answered, remedy, not_finite=True)
    shapes = {"target": target_shape(task), "answer": target_shape(task, answered=True)}
    for number, answer in enumerate(answers, 1):
        wrong = next((wrong for key, shape in shapes.items() if (wrong := matches(answer[key], shape))), None)
        if (
            task.kind == "token_classification"
            and not wrong
            and len(answer["target"]) != len(answer["answer"])
        ):
            wrong = f"{len(answer['answer'])} answers for {len(answer['target'])} tags"
        if wrong:
            raise DamagedFileError(f"{place_of(store, path)}:{number}", wrong, remedy)
    return answers
