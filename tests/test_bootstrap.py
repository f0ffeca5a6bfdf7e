"""Bootstrap intervals against scipy's, the metrics' own libraries, and how often they hold the truth."""

import math

import numpy as np
import pytest
from scipy import stats

from trainers.tasks.bootstrap import RESAMPLES, bootstrap_interval, judged_interval, statistic_of
from trainers.tasks.metrics import measure
from trainers.tasks.records import Example
from trainers.tasks.task import TaskConfig

LABELS = ("a", "b", "c", "rare")
TAGS = ("O", "B-X", "I-X", "B-Y")
WORDS = ["the", "king", "of", "the", "sea", "天", "气", "sings", "a", "storm", "at", "night"]
RNG = np.random.default_rng(0)


def examples(targets):
    return [Example(str(i), "text", "", [], target) for i, target in enumerate(targets)]


def drawn(values, number=60):
    return [str(value) for value in RNG.choice(list(values), number)]


def half_right(targets, others):
    return [
        t if keep else o for t, o, keep in zip(targets, others, RNG.random(len(targets)) < 0.5, strict=True)
    ]


def made(kind, **others):
    """A task of a kind with targets and answers, of which half are right."""
    given = TaskConfig(name="t", kind=kind, **others)
    if kind == "regression":
        truth = RNG.normal(size=60)
        return given, truth.tolist(), (truth + RNG.normal(size=60)).tolist()
    if kind == "token_classification":
        targets, answers = ([drawn(TAGS, 3 + i % 5) for i in range(60)] for _ in range(2))
    elif given.multi_label:
        targets, answers = ([sorted(set(drawn(LABELS[:3], i % 3))) for i in range(60)] for _ in range(2))
    elif kind in ("generation", "question_answering"):
        targets, answers = ([" ".join(drawn(WORDS, 6)) for _ in range(60)] for _ in range(2))
    else:
        targets, answers = drawn(LABELS[:3]), drawn(LABELS[:3])
    answers = half_right(targets, answers)
    if kind == "question_answering":
        return given, [{"text": target, "start": 0} for target in targets], answers
    return given, targets, answers


BOTH = ("accuracy", "macro_f1", "micro_f1")
CASES = [
    *[("classification", {"labels": LABELS, "metric": m}) for m in (*BOTH, "matthews")],
    *[("classification", {"labels": LABELS, "multi_label": True, "metric": m}) for m in BOTH],
    *[("regression", {"metric": m}) for m in ("mse", "pearson", "spearman")],
    *[("token_classification", {"labels": TAGS, "metric": m}) for m in ("entity_f1", "token_accuracy")],
    *[("question_answering", {"metric": m}) for m in ("f1", "exact_match")],
    *[("generation", {"metric": m}) for m in ("chrf", "bleu", "rouge_l", "exact_match")],
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "others"), CASES, ids=lambda each: each if isinstance(each, str) else each["metric"]
)
def test_the_metric_of_a_resample_is_that_of_the_metrics_own_library(kind, others):
    given, targets, answers = made(kind, **others)
    indices = np.concatenate([np.arange(60)[None], np.full((1, 60), 7), RNG.integers(60, size=(8, 60))])
    expected = [
        measure(given, examples([targets[i] for i in rows]), [answers[i] for i in rows])[given.judged_by]
        for rows in indices
    ]
    assert statistic_of(given, targets, answers)(indices) == pytest.approx(np.array(expected), abs=1e-12)


def test_the_interval_is_scipys_but_for_the_luck_of_the_draw():
    given, targets, answers = made("classification", labels=LABELS, metric="macro_f1")
    statistic = statistic_of(given, targets, answers)
    index = {label: number for number, label in enumerate(LABELS)}
    codes = [np.array([index[label] for label in each]) for each in (targets, answers)]

    def macro_f1(truth, found):
        f1 = []
        for label in range(len(LABELS)):
            right = ((truth == label) & (found == label)).sum()
            under = (truth == label).sum() + (found == label).sum()
            f1.append(2 * right / under if under else 0.0)
        return np.mean(f1)

    theirs = stats.bootstrap(
        codes, macro_f1, paired=True, vectorized=False, method="percentile", n_resamples=10_000, rng=1
    ).confidence_interval  # fmt: skip
    low, high = bootstrap_interval(statistic, 60, resamples=10_000)
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.05 * (theirs.high - theirs.low))


def test_an_interval_of_a_mean_is_as_wide_as_its_standard_error_says():
    """Of 200 resamples the narrowest of these is 0.86 of it, and the widest 1.17."""
    widths = []
    for num_rows in range(300, 3_400, 100):
        right = np.random.default_rng(num_rows).random(num_rows) < 0.8
        low, high = bootstrap_interval(lambda rows, right=right: right[rows].mean(axis=1), num_rows)
        widths.append((high - low) / (2 * stats.norm.ppf(0.975) * right.std() / math.sqrt(num_rows)))
    assert min(widths) > 0.94 and max(widths) < 1.06


def test_95_of_100_intervals_hold_the_truth():
    held, trials = 0, 300
    for trial in range(trials):
        right = np.random.default_rng(trial).random(250) < 0.7
        low, high = bootstrap_interval(lambda rows, right=right: right[rows].mean(axis=1), 250, seed=trial)
        held += low <= 0.7 <= high
    assert stats.binomtest(held, trials, 0.95).pvalue > 0.01


def test_the_interval_is_of_the_resamples_that_are_documented():
    given, targets, answers = made("classification", labels=LABELS)
    statistic = statistic_of(given, targets, answers)
    assert judged_interval(given, examples(targets), answers) == bootstrap_interval(
        statistic, 60, resamples=RESAMPLES
    )


def test_a_resample_does_not_depend_on_how_many_are_computed_at_a_time(monkeypatch):
    given, targets, answers = made("classification", labels=LABELS, metric="macro_f1")
    whole = judged_interval(given, examples(targets), answers)
    monkeypatch.setattr("trainers.tasks.bootstrap.INDICES_AT_A_TIME", 200)
    assert judged_interval(given, examples(targets), answers) == pytest.approx(whole, abs=1e-12)


def test_an_interval_computes_no_metric_that_does_not_judge(monkeypatch):
    import rouge_score.rouge_scorer
    import sacrebleu

    def computed(*arguments, **more):
        raise AssertionError("another metric was computed")

    monkeypatch.setattr(sacrebleu.CHRF, "_extract_corpus_statistics", computed)
    monkeypatch.setattr(sacrebleu.BLEU, "_extract_corpus_statistics", computed)
    monkeypatch.setattr(rouge_score.rouge_scorer.RougeScorer, "score", computed)
    given = TaskConfig(name="t", kind="generation", metric="exact_match")
    assert judged_interval(given, examples(["a", "b"]), ["a", "b"]) == (1.0, 1.0)
