"""Metrics against hand computation, where the kept libraries do not speak for themselves."""

import math

import numpy as np
import pytest
from scipy import stats

from trainers.task import TaskConfig
from trainers.task_encoding import Encoded
from trainers.task_metrics import (
    bootstrap_interval,
    judged_interval,
    measure,
    read_scores,
    seeds_interval,
    squad_scores,
)
from trainers.task_records import Example

LABELS = ("a", "b")


def examples(targets):
    return [Example(str(i), "text", "", [], target) for i, target in enumerate(targets)]


def task(kind="classification", **others) -> TaskConfig:
    return TaskConfig(name="t", kind=kind, **others)


def test_classification_metrics_are_those_counted_by_hand():
    found = measure(task(labels=LABELS), examples(["a", "a", "a", "b"]), ["a", "a", "b", "b"])
    assert found["accuracy"] == 3 / 4
    assert found["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_several_labels_are_right_only_all_together():
    found = measure(task(multi_label=True, labels=LABELS), examples([["a"], ["a", "b"]]), [["a"], ["a"]])
    assert found["accuracy"] == 1 / 2
    assert found["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1))


def test_an_entity_counts_only_whole():
    targets = [["B-PER", "I-PER", "O", "B-LOC"]]
    answers = [["B-PER", "O", "O", "B-LOC"]]
    found = measure(task("token_classification", labels=("O",)), examples(targets), answers)
    assert found == {"entity_f1": pytest.approx(1 / 2), "token_accuracy": 3 / 4}


def test_a_constant_answer_correlates_with_nothing():
    assert measure(task("regression"), examples([1.0, 2.0, 3.0]), [2.0, 2.0, 2.0]) == {
        "pearson": 0.0, "spearman": 0.0, "mse": pytest.approx(2 / 3),
    }  # fmt: skip


def test_answers_are_compared_as_squad_does():
    assert squad_scores("the Eiffel Tower", "Eiffel tower.") == {"f1": 1.0, "exact_match": 1.0}
    assert squad_scores("in the year 1889", "1889")["f1"] == pytest.approx(2 * 1 / (3 + 1))


def test_chinese_answers_are_compared_by_characters():
    found = measure(task("generation"), examples(["天上有月"]), ["天上有云"])
    assert found["rouge_l"] == pytest.approx(3 / 4)


def test_an_answer_in_a_script_without_blanks_shares_characters_and_its_punctuation_is_none():
    assert squad_scores("一八八九年。", "一八八九") == {
        "f1": pytest.approx(2 * 4 / (5 + 4)),
        "exact_match": 0.0,
    }
    assert squad_scores("「巴黎」", "巴黎，") == {"f1": 1.0, "exact_match": 1.0}
    assert squad_scores("“Paris”", "paris") == {"f1": 1.0, "exact_match": 1.0}
    assert squad_scores("दिल्ली", "दल्ली")["f1"] == 0.0  # a vowel sign is no punctuation


@pytest.mark.parametrize(
    ("given", "targets", "answers"),
    [
        (task(labels=LABELS, metric="macro_f1"), ["a", "b", "a", "a", "b"], ["a", "a", "b", "a", "b"]),
        (
            task("question_answering"),
            [{"text": t, "start": 0} for t in ("one two", "three")],
            ["one", "three"],
        ),
        (task("generation", metric="exact_match"), ["one two", "three", "four"], ["one two", "free", "four"]),
        (task("regression", metric="mse"), [1.0, 2.0, 4.0], [1.5, 2.0, 3.0]),
        (task("token_classification"), [["B-X", "O"], ["B-X", "I-X"]], [["B-X", "O"], ["O", "I-X"]]),
    ],
)
def test_the_interval_is_that_of_the_metric_that_judges(given, targets, answers):
    records = examples(targets)

    def of_rows(rows):
        return measure(given, [records[i] for i in rows], [answers[i] for i in rows])[given.judged_by]

    assert judged_interval(given, records, answers) == bootstrap_interval(
        of_rows, len(records), resamples=200
    )


def test_an_interval_computes_no_metric_that_does_not_judge(monkeypatch):
    import rouge_score.rouge_scorer
    import sacrebleu

    def computed(*arguments, **more):
        raise AssertionError("another metric was computed")

    monkeypatch.setattr(sacrebleu, "corpus_chrf", computed)
    monkeypatch.setattr(sacrebleu, "corpus_bleu", computed)
    monkeypatch.setattr(rouge_score.rouge_scorer.RougeScorer, "score", computed)
    given = task("generation", metric="exact_match")
    assert judged_interval(given, examples(["a", "b"]), ["a", "b"]) == (1.0, 1.0)


def test_a_span_ends_where_it_begins_or_later_and_lies_in_the_context():
    spans = [(-1, -1), (0, 3), (4, 7), (8, 11)]
    encoded = Encoded([0, 1, 2, 3], [0] * 4, None, spans, False)
    example = Example("q", "who", "one two sun", [], {"text": "two", "start": 4})
    first, last = np.array([9.0, 0.0, 3.0, 2.0]), np.array([9.0, 4.0, 0.0, 1.0])
    answer = read_scores(
        task("question_answering"), example, encoded, np.stack([first, last], 1), (0, 1), True
    )
    p, q = (np.exp(x[1:]) / np.exp(x[1:]).sum() for x in (first, last))
    pairs = {(i, j): p[i] * q[j] for i in range(3) for j in range(i, 3)}
    i, j = max(pairs, key=lambda pair: pairs[pair])
    assert answer.value == example.pair[spans[i + 1][0] : spans[j + 1][1]]
    assert answer.confidence == pytest.approx(pairs[i, j])


def test_a_number_is_answered_on_the_scale_of_the_targets():
    answer = read_scores(task("regression"), examples([0.0])[0], None, np.float32(1.5), (10.0, 2.0), True)
    assert answer.value == 13.0 and math.isnan(answer.confidence)


def test_the_bootstrap_interval_of_a_mean_agrees_with_its_standard_error():
    right = np.random.default_rng(0).random(400) < 0.8
    low, high = bootstrap_interval(lambda rows: right[rows].mean(), 400)
    error = right.std() / math.sqrt(400)
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)
    assert low < right.mean() < high


def test_the_interval_over_seeds_is_students():
    values = [0.70, 0.74, 0.72]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert seeds_interval(values) == pytest.approx((0.72, expected.low, expected.high))
    assert seeds_interval([0.7]) == (0.7, 0.7, 0.7)
