"""What a pretrained model has to beat: the commonest label, and a linear model on n-grams."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from trainers.tasks.labels import labels_in
from trainers.tasks.metrics import measure
from trainers.tasks.records import Example
from trainers.tasks.task import TaskConfig

STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""Inverse strengths of regularisation that validation chooses from."""


def majority(task: TaskConfig, known: Sequence[Example], test: Sequence[Example]) -> dict[str, float]:
    """Metrics of always answering the commonest label of `known`, which must have the shares of the pool: a balanced
    draw has none. Of labels that are equally common the mean: none of them is the better guess."""
    counts = labels_in(task, known)
    most = max(counts.values())
    found = [measure(task, test, [label] * len(test)) for label in task.labels if counts[label] == most]
    return {name: fmean(metrics[name] for metrics in found) for name in found[0]}


def linear(
    task: TaskConfig, train: Sequence[Example], validation: Sequence[Example], test: Sequence[Example]
) -> dict[str, float]:
    """Metrics of logistic regression on tf-idf of words, pairs of words and 2 to 5 characters, whose
    regularisation validation chose. Characters serve scripts without blanks, and word stems in others."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    def texts(examples: Sequence[Example]) -> list[str]:
        return [example.content for example in examples]

    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, max_features=200_000),
    )
    known: list[Any] = [example.target for example in train]
    if len(set(known)) < 2:
        return majority(task, train, test)
    rows = features.fit_transform(texts(train))
    best = max(
        (LogisticRegression(C=strength, max_iter=1_000).fit(rows, known) for strength in STRENGTHS),
        key=lambda model: measure(
            task, validation, list(model.predict(features.transform(texts(validation))))
        )[task.judged_by],
    )
    return measure(task, test, list(make_pipeline(features, best).predict(texts(test))))
