"""A task: what is to be learnt from labelled records, as a small YAML file.

name: movie-sentiment
kind: classification
data: {uri: corpora/tasks/movies.jsonl}
columns: {text: text, label: label}
metric: accuracy
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter
from typing import Literal

from cluster.configuration.config import load_config
from cluster.configuration.keys import nearest
from cluster.console.errors import ConfigError
from cluster.limits.bounds import name_problems
from cluster.storage.uris import open_store

Kind = Literal[
    "classification", "pairs", "token_classification", "regression", "question_answering", "generation"
]

Draw = Literal["random", "balanced"]
"""How some records of many are chosen: each as likely as any other, or labels in turn where a record has one. Turns
find rare labels by those of all records, and change the labels' shares."""

METRICS: Mapping[str, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "micro_f1", "matthews", "loss"),
    "pairs": ("accuracy", "macro_f1", "micro_f1", "matthews", "loss"),
    "token_classification": ("entity_f1", "token_accuracy", "loss"),
    "regression": ("pearson", "spearman", "mse", "loss"),
    "question_answering": ("f1", "exact_match", "loss"),
    "generation": ("chrf", "bleu", "rouge_l", "exact_match", "loss"),
}
"""What may judge each kind; the first one is taken where a task names none."""

LOWER_IS_BETTER = ("mse", "loss")
MAX_FIELDS = 16
"""Of a template: each time that it names a text, the prompt grows by that text."""
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """Where the records lie: JSONL, CSV (first line: columns; all values are texts) or Parquet, by the ending; .gz and
    .zst too."""

    uri: str = ""
    """One file, or a folder of files, to be split by content."""
    train: str = ""
    """File or folder of training records, where the split is given."""
    validation: str = ""
    """File or folder; empty: a fraction of train, by content."""
    test: str = ""
    """File or folder; empty: a fraction of train, by content."""

    def problems(self, at: str) -> Iterator[str]:
        if bool(self.uri) == bool(self.train):
            yield f"{at}.uri={self.uri!r} and {at}.train={self.train!r}: give exactly one of them"
        if self.uri and (self.validation or self.test):
            yield f"{at}.uri={self.uri} is split by content; with given files, name {at}.train instead"


@dataclass(frozen=True, kw_only=True)
class TaskColumns:
    """Names of the columns, as the records have them."""

    text: str = "text"
    """The text; of question answering the question, of generation what the answer follows."""
    pair: str = ""
    """The second text of pairs and, if there is one, of regression; of question answering the context."""
    label: str = "label"
    """Label, list of labels, number, list of tags, or answer."""
    tokens: str = "tokens"
    """Words of token classification, as a list."""
    messages: str = ""
    """Of generation, instead of text and label: a chat as a list of {"role", "content"}. What the last message, an
    assistant's, says is the answer to those before it."""
    id: str = "id"
    """A name for the record in reports; a record without one gets its place in its file."""


@dataclass(frozen=True, kw_only=True)
class TaskSplit:
    """Fractions by content, where no files are given: near-duplicates always fall on the same side."""

    validation: float = 0.1
    """Share of the records."""
    test: float = 0.2
    """Share of the records."""
    seed: int = 0
    """Another seed, another choice."""
    similarity: float = 0.7
    """Jaccard similarity of character 5-grams from which two texts count as near-duplicates; 1: only equal
    ones."""

    def problems(self, at: str) -> Iterator[str]:
        for key in ("validation", "test"):
            share = getattr(self, key)
            if not 0 <= share < 1:
                yield f"{at}.{key}={share} is not a share of the records; give a number in 0 to 1, as 0.1"
        if self.validation + self.test >= 1:
            yield f"{at}.validation + {at}.test = {self.validation + self.test:g} leave nothing to train on"
        if not 0.3 <= self.similarity <= 1:
            yield f"{at}.similarity={self.similarity} must be 0.3 to 1; texts of one topic reach 0.2"


@dataclass(frozen=True, kw_only=True)
class TaskPrompt:
    """The task as a text to go on with: for generation, and for zero- and few-shot evaluation."""

    template: str = "{text}"
    """What the answer follows; {text} and {pair} are filled in."""
    answers: dict[str, str] = field(default_factory=dict)
    """How a label is written; one that is not named is written as it is."""
    turn: str = "{role}: {content}"
    """A line of {text} for each message of a chat; a template as "{text}\\nassistant:" asks for the next."""
    separator: str = "\n\n"
    """Between two shots."""
    before_answer: str = " "
    """Between template and answer."""

    def problems(self, at: str) -> Iterator[str]:
        for key, needed, other in (("template", "text", "pair"), ("turn", "content", "role")):
            yield from _template_problems(f"{at}.{key}", getattr(self, key), needed, other)


def _template_problems(at: str, template: str, needed: str, other: str) -> Iterator[str]:
    """What of a template is more than names in braces: a width in a format, as in {text:>9}, is as much memory."""
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        yield f"{at}={template!r}: {error}; write a brace that is meant twice: {{{{"
        return
    names = {name for _, name, _, _ in parts}
    if unknown := sorted(str(name) for name in names - {needed, other}):
        yield f"{at} names {{{unknown[0]}}}; it can name {{{needed}}} and {{{other}}}"
    if formatted := [name for _, name, spec, conversion in parts if spec or conversion]:
        yield f"{at}={template!r} formats {formatted[0]}; write {{{formatted[0]}}} alone: it is put in as it is"
    if len(parts) > MAX_FIELDS:
        yield f"{at} fills in {len(parts):,} texts; it can fill in {MAX_FIELDS}"
    if needed not in names:
        yield f"{at}={template!r} has no {{{needed}}}: all would read the same"


LONGEST_SUFFIX = "-0123456789ab"
"""Follows a task's name in that of its prepared folder: a digest. All else that is named after it is shorter."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What a task file holds."""

    name: str
    """Names the task in reports."""
    kind: Kind
    """What is learnt: a label (or several) of a text or of a pair of texts, a tag of each word, a number, a
    span of a context, or a text."""
    multi_label: bool = False
    """Of classification: a record's label is a list, of any length."""
    labels: tuple[str, ...] = ()
    """The labels, in the order of reports; empty: those of the training records, sorted."""
    metric: str = ""
    """What chooses and judges; empty: the usual one of the kind."""
    data: TaskFiles = field(default_factory=TaskFiles)
    columns: TaskColumns = field(default_factory=TaskColumns)
    split: TaskSplit = field(default_factory=TaskSplit)
    prompt: TaskPrompt = field(default_factory=TaskPrompt)

    def problems(self, at: str = "") -> Iterator[str]:
        """What does not fit together."""
        for part in self.name.split("/"):
            yield from name_problems("name", part, LONGEST_SUFFIX)
        known = METRICS[self.kind]
        if self.metric and self.metric not in known:
            alike = nearest(self.metric, known)
            remedy = f"nearest: {alike}" if alike else f"it has {', '.join(known)}"
            yield f"metric={self.metric} is not a metric of kind={self.kind}; {remedy}"
        if self.kind in ("pairs", "question_answering") and not self.columns.pair:
            yield f"kind={self.kind} needs columns.pair, the column of the second text"
        if self.columns.messages and self.kind != "generation":
            yield f"columns.messages is for kind=generation, not {self.kind}"
        if self.multi_label and self.kind != "classification":
            yield f"multi_label is for kind=classification, not {self.kind}"
        if len(set(self.labels)) < len(self.labels):
            yield f"labels={list(self.labels)} names one twice"
        if self.labels and not self.has_labels:
            yield f"labels are not used by kind={self.kind}; remove them"
        if unknown := sorted(set(self.prompt.answers) - set(self.labels or self.prompt.answers)):
            yield f"prompt.answers names {unknown[0]!r}, which is not among labels={list(self.labels)}"

    @property
    def has_labels(self) -> bool:
        """Whether what is learnt is one of a list of labels."""
        return self.kind in ("classification", "pairs", "token_classification")

    @property
    def judged_by(self) -> str:
        """The metric that chooses and judges."""
        return self.metric or METRICS[self.kind][0]

    def oriented(self, value: float) -> float:
        """The metric's value as a score of which more is better."""
        return -value if self.judged_by in LOWER_IS_BETTER else value


def load_task(path: str) -> TaskConfig:
    """Read a task file, with absolute URIs: workers have another working directory. Raises `ConfigError`."""
    if not Path(path).is_file():
        raise ConfigError([f"{path} is no task file; trainers/tasks/ has some"])
    task = load_config(TaskConfig, ["--config", path], description="").config
    files = task.data
    found = {key: getattr(files, key) for key in ("uri", *SPLITS)}
    return replace(task, data=TaskFiles(**{key: uri and open_store(uri).uri for key, uri in found.items()}))
