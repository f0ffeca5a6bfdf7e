"""Metrics against hand computation, where the kept libraries do not speak for themselves."""

import math

import numpy as np
import pytest
from scipy import stats

from trainers.tasks.encoding import Encoded
from trainers.tasks.metrics import interval_told, measure, read_scores, seeds_interval, squad_scores
from trainers.tasks.records import Example
from trainers.tasks.task import TaskConfig

LABELS = ("a", "b")


def examples(targets):
    return [Example(str(i), "text", "", [], target) for i, target in enumerate(targets)]


def task(kind="classification", **others) -> TaskConfig:
    return TaskConfig(name="t", kind=kind, **others)


def test_classification_metrics_are_those_counted_by_hand():
    found = measure(task(labels=LABELS), examples(["a", "a", "a", "b"]), ["a", "a", "b", "b"])
    assert found["accuracy"] == 3 / 4
    assert found["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert found["micro_f1"] == pytest.approx(3 / 4)
    # Of a: 2 found, 1 missed, none found in vain, 1 rightly not found (Matthews 1975).
    assert found["matthews"] == pytest.approx((2 * 1 - 0 * 1) / math.sqrt(2 * 3 * 1 * 2))


@pytest.mark.parametrize("kind", ["classification", "pairs"])
def test_matthews_is_the_correlation_of_what_is_and_what_is_said(kind):
    truth, said = (np.random.default_rng(seed).choice([0, 1], 60, p=[0.7, 0.3]) for seed in (1, 2))
    said = np.where(np.arange(60) % 3, truth, said)
    found = measure(
        task(kind, labels=LABELS), examples([LABELS[i] for i in truth]), [LABELS[i] for i in said]
    )
    assert found["matthews"] == pytest.approx(np.corrcoef(truth, said)[0, 1])
    assert found["micro_f1"] == found["accuracy"] == pytest.approx((truth == said).mean())
    swapped = measure(task(kind, labels=LABELS), examples(["a", "b"]), ["b", "a"])
    assert swapped["matthews"] == -1 and swapped["micro_f1"] == 0


def test_a_label_that_is_neither_there_nor_said_counts_as_a_zero_in_macro_f1_alone():
    found = measure(task(labels=("a", "b", "c")), examples(["a", "b"]), ["a", "b"])
    assert found == {"accuracy": 1, "macro_f1": pytest.approx(2 / 3), "micro_f1": 1, "matthews": 1}


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


def test_correlations_are_those_counted_by_hand():
    found = measure(task("regression"), examples([1.0, 2.0, 3.0, 5.0]), [2.0, 1.0, 4.0, 6.0])
    # Products of the deviations from 2.75 and 3.25 sum to 10.25, squares to 8.75 and 14.75; two ranks are swapped.
    assert found["pearson"] == pytest.approx(10.25 / math.sqrt(8.75 * 14.75))
    assert found["spearman"] == pytest.approx(1 - 6 * (1 + 1) / (4 * (4**2 - 1)))
    assert found["mse"] == pytest.approx((1 + 1 + 1 + 1) / 4)


def test_pearson_knows_lines_and_spearman_orders():
    truth = [1.0, 2.0, 3.0, 4.0]
    line, curve, down = [3.0, 5.0, 7.0, 9.0], [math.exp(3 * x) for x in truth], [4.0, 3.0, 2.0, 1.0]
    of_line, of_curve, of_down = (
        measure(task("regression"), examples(truth), x) for x in (line, curve, down)
    )
    assert of_line["pearson"] == pytest.approx(1) == of_line["spearman"]
    assert of_curve["pearson"] < 0.8 and of_curve["spearman"] == pytest.approx(1)
    assert of_down["pearson"] == pytest.approx(-1) == of_down["spearman"]


def test_numbers_that_tie_share_the_mean_of_their_ranks():
    found = measure(task("regression"), examples([1.0, 1.0, 2.0, 3.0]), [1.0, 2.0, 2.0, 4.0])
    expected = np.corrcoef([1.5, 1.5, 3, 4], [1, 2.5, 2.5, 4])[0, 1]
    assert found["spearman"] == pytest.approx(expected)


def written(targets, answers):
    return measure(task("generation"), examples(targets), answers)


def test_bleu_is_that_counted_by_hand():
    target = "the cat sat on the mat"
    # Of "the cat sat on a mat" these n-grams stand in the target: 5 of 6, 3 of 5, 2 of 4, 1 of 3.
    one = written([target], ["the cat sat on a mat"])["bleu"]
    assert one == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4))
    # All stand there, but 6 words answer 7.
    assert written([f"{target} now"], [target])["bleu"] == pytest.approx(math.exp(1 - 7 / 6))
    # Of a corpus the counts are summed, not the scores (Papineni et al. 2002, section 2.2).
    both = written([target, f"{target} now"], ["the cat sat on a mat", target])["bleu"]
    assert both == pytest.approx(math.exp(1 - 13 / 12) * (11 / 12 * 8 / 10 * 6 / 8 * 4 / 6) ** (1 / 4))


def test_bleu_counts_characters_in_chinese():
    found = written(["天上有月亮"], ["天上有月光"])["bleu"]
    assert found == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4))


def test_chrf_is_that_counted_by_hand():
    # Of the 1-, 2- and 3-grams 2 of 3, 1 of 2 and 0 of 1; there are no longer ones, and blanks are no characters.
    assert written(["a bc"], ["ab d"])["chrf"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    # All that is written is right, and 3 of 4, 2 of 3, 1 of 2 are written: recall weighs double (Popović 2015).
    recall = (3 / 4 + 2 / 3 + 1 / 2) / 3
    assert written(["abcd"], ["abc"])["chrf"] == pytest.approx((1 + 2**2) * recall / (2**2 + recall))


def test_rouge_l_is_that_counted_by_hand():
    # "the cat on mat" is common: 4 of the answer's 5 words, 4 of the target's 6.
    target, answer = "The cat sat on the mat.", "the cat on a mat"
    assert written([target], [answer])["rouge_l"] == pytest.approx(2 * 4 / (5 + 6))
    assert written([target, "yes"], [answer, "yes"])["rouge_l"] == pytest.approx((8 / 11 + 1) / 2)
    assert written(["cats"], ["cat"])["rouge_l"] == 0, "words are not cut to their stems"


def test_a_written_answer_matches_exactly_but_for_blanks_around_it():
    assert written(["yes", "Yes", "no"], [" yes\n", "yes", "no."])["exact_match"] == pytest.approx(1 / 3)


def test_an_empty_answer_is_worth_nothing():
    assert written(["the cat sat"], [""]) == {"chrf": 0, "bleu": 0, "rouge_l": 0, "exact_match": 0}


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


def test_the_interval_over_seeds_is_students():
    values = [0.70, 0.74, 0.72]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert seeds_interval(values) == pytest.approx((0.72, expected.low, expected.high))


@pytest.mark.parametrize("values", [[0.7], [0.7, 0.7, 0.7]])
def test_runs_that_show_no_spread_have_no_interval_instead_of_one_without_width(values):
    mean, low, high = seeds_interval(values)
    assert mean == pytest.approx(0.7) and low is high is None
    assert interval_told(low, high) == "–"
