"""95 % bootstrap interval, over records, of the metric that judges a task.

Each resample's metric comes from sums over its records, or from their ranks, so that 2,000 resamples take less time
than scikit-learn, seqeval and sacrebleu would take for 200.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from trainers.tasks.metrics import bleu_and_chrf, rouge_l, same_text, squad_scores
from trainers.tasks.records import Example
from trainers.tasks.task import TaskConfig

# R resamples, N records, K sums, C labels
RESAMPLES = 2_000
"""Of 200 the width of an interval was off by up to a sixth, by the luck of the draw (`tests/test_bootstrap.py`)."""
INDICES_AT_A_TIME = 1 << 21
"""16 MB of row numbers."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""A metric of resamples [R, N], given as the numbers of their records: [R]."""


def bootstrap_interval(
    statistic: Statistic, num_rows: int, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval (Efron 1979) of a statistic over resamples of the rows."""
    generator = np.random.default_rng(seed)
    step = max(1, INDICES_AT_A_TIME // num_rows)
    found = [
        statistic(generator.integers(num_rows, size=(min(step, resamples - done), num_rows)))
        for done in range(0, resamples, step)
    ]
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975))
    return float(low), float(high)


def judged_interval(
    task: TaskConfig, examples: Sequence[Example], answers: Sequence[Any]
) -> tuple[float, float]:
    """95 % bootstrap interval of the metric that judges; no other is computed for it."""
    return bootstrap_interval(
        statistic_of(task, [example.target for example in examples], answers), len(examples)
    )


def statistic_of(task: TaskConfig, targets: Sequence[Any], answers: Sequence[Any]) -> Statistic:
    """The metric that judges, as `trainers.tasks.metrics.measure` has it of each resample."""
    metric = task.judged_by
    if task.kind == "regression":
        return _numbers(metric, np.array(targets), np.array(answers))
    if task.kind == "token_classification":
        return _tags(metric, targets, answers)
    if task.kind == "question_answering":
        return _mean([squad_scores(t["text"], a)[metric] for t, a in zip(targets, answers, strict=True)])
    if task.kind == "generation":
        return _texts(metric, targets, answers)
    return _labels(task, targets, answers)


def _summed(rows_NK: Any, of_sums: Callable[[np.ndarray], np.ndarray]) -> Statistic:
    """A metric that follows from sums over records [R, K]. `rows_NK` may be sparse."""

    def statistic(indices_RN: np.ndarray) -> np.ndarray:
        resamples, records = indices_RN.shape
        flat = indices_RN + records * np.arange(resamples)[:, None]
        times_RN = np.bincount(flat.ravel(), minlength=resamples * records).reshape(resamples, records)
        return of_sums(times_RN.astype(float) @ rows_NK)

    return statistic


def _ratio(over: Any, under: Any) -> Any:
    """A quotient; 0 where there is nothing to divide by."""
    return np.divide(over, under, out=np.zeros(np.shape(over)), where=under > 0)


def _mean(values: Sequence[float]) -> Statistic:
    values_N = np.asarray(values, float)
    return lambda indices_RN: values_N[indices_RN].mean(axis=1)


def _labels(task: TaskConfig, targets: Sequence[Any], answers: Sequence[Any]) -> Statistic:
    from scipy import sparse

    truth_NC, found_NC = (_having(task, each) for each in (targets, answers))
    if task.judged_by == "accuracy":
        return _mean(1.0 - (abs(truth_NC - found_NC).sum(axis=1) > 0))
    counted_NK = sparse.hstack([truth_NC.multiply(found_NC), found_NC, truth_NC], format="csr")
    return _summed(
        counted_NK, {"macro_f1": _macro_f1, "micro_f1": _micro_f1, "matthews": _matthews}[task.judged_by]
    )


def _having(task: TaskConfig, values: Sequence[Any]) -> Any:
    """Which labels each record has, [N, C], 0 or 1, sparse."""
    from scipy import sparse

    index = {label: number for number, label in enumerate(task.labels)}
    chosen = [value if task.multi_label else [value] for value in values]
    cells = {(row, index[label]) for row, labels in enumerate(chosen) for label in labels}
    rows, columns = zip(*sorted(cells), strict=True) if cells else ((), ())
    return sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(chosen), len(index)))


def _macro_f1(sums_RK: np.ndarray) -> np.ndarray:
    right, found, truth = np.split(sums_RK, 3, axis=1)
    return _ratio(2 * right, found + truth).mean(axis=1)


def _micro_f1(sums_RK: np.ndarray) -> np.ndarray:
    right, found, truth = (each.sum(axis=1) for each in np.split(sums_RK, 3, axis=1))
    return _ratio(2 * right, found + truth)


def _matthews(sums_RK: np.ndarray) -> np.ndarray:
    """The correlation of Gorodkin (2004), as scikit-learn has it; 0 where one side has a single label."""
    right, found, truth = np.split(sums_RK, 3, axis=1)
    records = truth.sum(axis=1)
    together = right.sum(axis=1) * records - (found * truth).sum(axis=1)
    apart = [records**2 - (each**2).sum(axis=1) for each in (found, truth)]
    return _ratio(together, np.sqrt(apart[0] * apart[1]))


def _numbers(metric: str, truth_N: np.ndarray, found_N: np.ndarray) -> Statistic:
    from scipy.stats import rankdata

    if metric == "mse":
        return _mean((truth_N - found_N) ** 2)

    def correlation(indices_RN: np.ndarray) -> np.ndarray:
        sides = [each[indices_RN] for each in (truth_N, found_N)]
        constant = np.any([np.ptp(each, axis=1) == 0 for each in sides], axis=0)
        if metric == "spearman":
            sides = [rankdata(each, axis=1) for each in sides]
        x, y = (each - each.mean(axis=1, keepdims=True) for each in sides)
        found = _ratio((x * y).sum(axis=1), np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1)))
        return np.where(constant, 0.0, found)

    return correlation


def _tags(metric: str, targets: Sequence[list[str]], answers: Sequence[list[str]]) -> Statistic:
    from seqeval.metrics.sequence_labeling import get_entities

    pairs = list(zip(targets, answers, strict=True))
    if metric == "token_accuracy":
        rows = [(sum(t == a for t, a in zip(*pair, strict=True)), len(pair[0])) for pair in pairs]
        return _summed(np.array(rows, float), lambda sums_RK: _ratio(*sums_RK.T))
    entities = [[set(get_entities(tags)) for tags in pair] for pair in pairs]
    return _summed(np.array([(len(t & a), len(a), len(t)) for t, a in entities], float), _micro_f1)


def _texts(metric: str, targets: Sequence[str], answers: Sequence[str]) -> Statistic:
    pairs = list(zip(targets, answers, strict=True))
    if metric == "exact_match":
        return _mean([same_text(*pair) for pair in pairs])
    if metric == "rouge_l":
        return _mean(rouge_l(targets, answers))
    scorer = bleu_and_chrf(targets)[metric]
    # The two functions of sacrebleu's own bootstrap (sacrebleu/significance.py); its public one tells no ends.
    rows = np.array(scorer._extract_corpus_statistics(list(answers), [list(targets)]), float)
    return _summed(rows, partial(_corpus_scores, scorer))


def _corpus_scores(scorer: Any, sums_RK: np.ndarray) -> np.ndarray:
    whole = sums_RK.round().astype(int).tolist()
    return np.array([scorer._compute_score_from_stats(sums).score / 100 for sums in whole])
