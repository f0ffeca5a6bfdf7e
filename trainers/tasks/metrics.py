"""What a model's scores say about a record, and how good a set of such answers is.

Metrics are those of scikit-learn, scipy, seqeval, sacrebleu and rouge-score; F1 and exact match of answers are SQuAD's
(Rajpurkar et al. 2016, section 6.1).
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from trainers.tasks.encoding import Encoded, word_positions
from trainers.tasks.records import Example
from trainers.tasks.task import TaskConfig

LONGEST_ANSWER = 30
"""Tokens of an extracted answer at most, as in BERT's SQuAD code."""


@dataclass(frozen=True)
class Answer:
    """What a model says about one record."""

    value: Any
    """As the record's target: label, list of labels or tags, number, or text."""
    confidence: float
    """Probability that the model gives it; of tags the least of a record; NaN for numbers and free texts."""
    is_finite: bool = True
    """Whether the scores behind it are numbers; without, there is no value."""


NOT_FINITE = Answer(None, math.nan, is_finite=False)
"""What a diverged model says."""


def read_scores(
    task: TaskConfig,
    example: Example,
    encoded: Encoded,
    likely: np.ndarray,
    scale: tuple[float, float],
    causal: bool,
) -> Answer:
    """The answer in one row of `trainers.tasks.heads.likelihoods` ([C], [], [T, C] or [T, 2], without padding)."""
    if task.kind == "regression":
        number = float(likely) * scale[1] + scale[0]
        return Answer(number, math.nan) if math.isfinite(number) else NOT_FINITE
    if task.kind == "question_answering":
        return _span(example, encoded, likely)
    if task.kind == "token_classification":
        return _tags(task, example, encoded, likely, causal)
    if task.multi_label:
        chosen = [label for label, p in zip(task.labels, likely, strict=True) if p > 0.5]
        return Answer(chosen, float(np.maximum(likely, 1 - likely).min()))
    best = int(likely.argmax())
    return Answer(task.labels[best], float(likely[best]))


def _softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def _tags(
    task: TaskConfig, example: Example, encoded: Encoded, probabilities: np.ndarray, causal: bool
) -> Answer:
    """One tag a word; a word that was cut off gets the outside tag, or the first label."""
    outside = "O" if "O" in task.labels else task.labels[0]
    positions = word_positions(example.words, encoded.spans, causal)
    tags = [outside if p is None else task.labels[int(probabilities[p].argmax())] for p in positions]
    sure = [float(probabilities[p].max()) for p in positions if p is not None]
    return Answer(tags, min(sure, default=0.0))


def _span(example: Example, encoded: Encoded, scores: np.ndarray) -> Answer:
    """The likeliest span of the context: first before last, and not longer than LONGEST_ANSWER."""
    inside = np.array([start >= 0 for start, _ in encoded.spans])
    if not inside.any():
        return Answer("", 0.0)
    first, last = (np.where(inside, scores[:, i], -np.inf) for i in (0, 1))
    joint = _softmax(first)[:, None] * _softmax(last)[None, :]
    joint = np.tril(np.triu(joint), LONGEST_ANSWER - 1)
    begin, end = np.unravel_index(int(joint.argmax()), joint.shape)
    text = example.pair[encoded.spans[begin][0] : encoded.spans[end][1]].strip()
    return Answer(text, float(joint[begin, end]))


Metrics = Mapping[str, Callable[[], Any]]
"""Metrics by name, each to be computed when it is asked for."""


def measure(
    task: TaskConfig, examples: Sequence[Example], answers: Sequence[Any], only: str = ""
) -> dict[str, float]:
    """Every metric of the kind but the loss, or one `only`, over the values of answers; 0 to 1, but mse and
    correlations."""
    found = _metrics(task, [example.target for example in examples], answers)
    return {name: float(found[name]()) for name in ([only] if only else found)}


def _metrics(task: TaskConfig, targets: Sequence[Any], answers: Sequence[Any]) -> Metrics:
    if task.kind == "regression":
        return _regression(targets, answers)
    if task.kind == "token_classification":
        return _tagging(targets, answers)
    if task.kind == "question_answering":
        scores = [squad_scores(t["text"], a) for t, a in zip(targets, answers, strict=True)]
        return {name: partial(np.mean, [score[name] for score in scores]) for name in ("f1", "exact_match")}
    if task.kind == "generation":
        return _texts(targets, answers)
    return _labels(task, targets, answers)


def _labels(task: TaskConfig, targets: Sequence[Any], answers: Sequence[Any]) -> Metrics:
    from sklearn import (
        metrics,
    )  # here and below: these packages take a second to load, and workers start often

    truth: Any = targets
    found: Any = answers
    index: dict[str, Any] = {"labels": list(task.labels)}
    if task.multi_label:
        truth, found = (
            np.array([[label in chosen for label in task.labels] for chosen in each])
            for each in (targets, answers)
        )
        index = {}
    f1 = partial(metrics.f1_score, truth, found, zero_division=0, **index)
    scores: dict[str, Callable[[], Any]] = {
        "accuracy": lambda: metrics.accuracy_score(truth, found),
        "macro_f1": lambda: f1(average="macro"),
        "micro_f1": lambda: f1(average="micro"),
    }
    if not task.multi_label:
        scores["matthews"] = lambda: metrics.matthews_corrcoef(truth, found)
    return scores


def _regression(targets: Sequence[float], answers: Sequence[float]) -> Metrics:
    from scipy import stats

    truth, found = np.array(targets), np.array(answers)
    constant = (
        np.ptp(truth) == 0 or np.ptp(found) == 0
    )  # then a correlation is not defined: nothing was learnt
    return {
        "pearson": lambda: 0.0 if constant else stats.pearsonr(truth, found).statistic,
        "spearman": lambda: 0.0 if constant else stats.spearmanr(truth, found).statistic,
        "mse": lambda: np.mean((truth - found) ** 2),
    }


def _tagging(targets: Sequence[list[str]], answers: Sequence[list[str]]) -> Metrics:
    from seqeval.metrics import accuracy_score, f1_score

    return {
        "entity_f1": lambda: f1_score(list(targets), list(answers), zero_division=0),
        "token_accuracy": lambda: accuracy_score(list(targets), list(answers)),
    }


def _texts(targets: Sequence[str], answers: Sequence[str]) -> Metrics:
    pairs = list(zip(targets, answers, strict=True))

    def corpus(name: str) -> float:
        scorer = bleu_and_chrf(targets)[name]
        return float(scorer.corpus_score(list(answers), [list(targets)]).score / 100)

    return {
        "chrf": partial(corpus, "chrf"),
        "bleu": partial(corpus, "bleu"),
        "rouge_l": lambda: np.mean(rouge_l(targets, answers)),
        "exact_match": lambda: np.mean([same_text(t, a) for t, a in pairs]),
    }


def bleu_and_chrf(targets: Sequence[str]) -> dict[str, Any]:
    """sacrebleu's metrics of a corpus, BLEU with the tokenizer for the targets' script."""
    import sacrebleu

    chinese = any("\u4e00" <= char <= "\u9fff" for target in targets for char in target)
    return {"bleu": sacrebleu.BLEU(tokenize="zh" if chinese else "13a"), "chrf": sacrebleu.CHRF()}


def rouge_l(targets: Sequence[str], answers: Sequence[str]) -> list[float]:
    """ROUGE-L's F of each answer."""
    from rouge_score.rouge_scorer import RougeScorer

    # Its own tokenizer keeps Latin letters and digits alone; characters are the words of other scripts.
    rouge = RougeScorer(["rougeL"], tokenizer=_WordsOrCharacters())
    return [rouge.score(t, a)["rougeL"].fmeasure for t, a in zip(targets, answers, strict=True)]


def same_text(target: str, answer: str) -> bool:
    """Exact match of a written answer: but for blanks around it."""
    return target.strip() == answer.strip()


CHARACTERS = r"\u3040-\u30ff\u3400-\u9fff"
"""Kana and Chinese: written without blanks, so that a character counts as a word."""


class _WordsOrCharacters:
    def tokenize(self, text: str) -> list[str]:
        return re.findall(rf"[{CHARACTERS}]|[^\W{CHARACTERS}]+", text.lower())


ARTICLES = re.compile(r"\b(a|an|the)\b")


def squad_scores(target: str, answer: str) -> dict[str, float]:
    """F1 of shared words, or characters of scripts without blanks, and exact match; without case, punctuation and
    articles."""
    truth, found = ([*_squad_words(text)] for text in (target, answer))
    shared = sum((Counter(truth) & Counter(found)).values())
    f1 = 2 * shared / (len(truth) + len(found)) if shared else float(truth == found)
    return {"f1": f1, "exact_match": float(truth == found)}


def _squad_words(text: str) -> list[str]:
    """SQuAD's, but of any script: its punctuation is ASCII's. Marks stay, which vowels are in many scripts."""
    plain = "".join(char for char in text.lower() if not _is_punctuation(char))
    return re.findall(rf"[{CHARACTERS}]|[^\s{CHARACTERS}]+", ARTICLES.sub(" ", plain))


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")


def seeds_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and 95 % interval over runs with different seeds, by Student's t. One run, or runs that all came to the
    same, say nothing of the spread: then there is no interval."""
    from scipy import stats

    mean = float(np.mean(values))
    if len(set(values)) < 2:
        return mean, None, None
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def interval_told(low: float | None, high: float | None, digits: int = 4) -> str:
    """Its ends, or a dash where there is none."""
    return "–" if low is None or high is None else f"{low:.{digits}f} to {high:.{digits}f}"
