import io
import json

import pytest
from rich.console import Console

from cluster.storage.uris import open_store
from trainers.reporting.page import render
from trainers.reporting.results import (
    RunFiles,
    attempts_of,
    energy_of,
    measures_of,
    read_run,
    results_table,
    scores_of,
    summary_lines,
    totals_of,
)


def step(number, attempt=1, time=0.0, **values):
    record = {
        "step": number,
        "attempt": attempt,
        "time": time,
        "loss": 4.0,
        "tokens": 4_000,
        "step_seconds": 2.0,
        "data_wait_seconds": 0.1,
        "checkpoint_stall_seconds": 0.0,
        "tokens_per_second": 2_000.0,
        "mfu": 0.2,
    }
    return record | values


def start(number, attempt, time, workers=2):
    return {"step": number, "event": "start", "attempt": attempt, "time": time, "world_size": workers}


def validation(number, bits_per_byte, time=0.0, seconds=5.0, attempt=1):
    found = {"loss": 4.0, "bits_per_byte": bits_per_byte, "perplexity": 54.6, "seconds": seconds}
    return {"step": number, "validation": found, "attempt": attempt, "time": time}


def run_of(attempts, **files):
    names = ("config", "manifest", "environment", "plan", "best", "test", "samples", "floor")
    return RunFiles(**(dict.fromkeys(names) | files), attempts=attempts)


# One second passes before the first step. Attempt 2 goes back from step 3 to step 2 with one worker.
RECORDS = [
    start(0, 1, time=100.0),
    step(1, time=103.0, step_seconds=3.0, tokens_per_second=4_000 / 3, data_wait_seconds=1.0, mfu=0.1),
    step(2, time=105.0, checkpoint_stall_seconds=0.5),
    validation(2, 2.2, time=110.0),
    step(3, time=112.0),
    start(2, 2, time=200.0, workers=1),
    step(3, attempt=2, time=204.0, step_seconds=4.0, tokens_per_second=1_000.0, mfu=None),
    {"step": 3, "event": "skipped", "attempt": 2, "time": 204.0, "reason": "loss", "documents": ["a"]},
    validation(3, 2.1, time=209.0, attempt=2),
]

TEST = {"step": 3, "bits_per_byte": 1.8, "perplexity": 30.0}
FLOOR = {
    "order": 6,  # as of runs before the order was chosen
    "smoothing": "modified Kneser-Ney",
    "fitted_bytes": 10**6,
    "validation": 2.0,
    "test": 2.25,
}


def test_totals_equal_the_computation_by_hand():
    totals = totals_of(run_of(RECORDS))
    assert (totals.steps, totals.tokens, totals.step_seconds) == (3, 12_000, 3.0 + 2.0 + 4.0)
    assert totals.tokens_per_second * totals.step_seconds == pytest.approx(totals.tokens)
    assert totals.median_tokens_per_second == pytest.approx(4_000 / 3)
    assert totals.data_wait_share == pytest.approx(1.2 / 9)
    assert totals.stall_share == pytest.approx(0.5 / 9)
    assert totals.mfu == pytest.approx((0.1 * 3 + 0.2 * 2) / 5)  # of the steps that know it
    assert (totals.validation_seconds, totals.skipped, totals.repeated) == (10.0, 1, 1)


def test_energy_counts_every_attempt_with_its_own_workers():
    assert [(a.first_step, a.last_step, a.num_workers, a.seconds) for a in attempts_of(RECORDS)] == [
        (0, 3, 2, 12.0),
        (2, 3, 1, 9.0),
    ]
    config = {"energy": {"overhead": 1.5, "grams_per_kwh": 400.0}}
    energy = energy_of(run_of(RECORDS, config=config, environment={"watts_per_worker": 100.0}))
    joules = 100 * (2 * 12 + 1 * 9) * 1.5
    assert energy.kwh == pytest.approx(joules / 3.6e6)
    assert energy.co2_grams == pytest.approx(energy.kwh * 400)


def test_what_a_worker_says_it_draws_comes_before_what_the_driver_would():
    records = [
        {**each, "watts": 700.0} if each.get("event") == "start" and each["attempt"] == 1 else each
        for each in RECORDS
    ]
    config = {"energy": {"overhead": 1.0}}
    energy = energy_of(run_of(records, config=config, environment={"watts_per_worker": 100.0}))
    assert energy.kwh == pytest.approx((700 * 2 * 12 + 100 * 9) / 3.6e6)
    assert energy_of(run_of(records, config=config)) is None, "the second attempt is anyone's guess"


def test_without_a_known_power_no_energy_is_claimed():
    assert energy_of(run_of(RECORDS)) is None
    assert energy_of(run_of([], environment={"watts_per_worker": 100.0})) is None


def test_an_attempt_without_its_start_lasts_from_the_start_of_its_first_step():
    assert attempts_of([step(1, time=50.0, step_seconds=4.0), step(2, time=52.0)])[0].seconds == 6.0


def test_scores_stand_next_to_the_floor_of_the_same_split():
    scores = scores_of(run_of(RECORDS, best={"step": 2}, test=TEST, floor=FLOOR))
    assert [(s.split, s.step, s.bits_per_byte, s.floor) for s in scores] == [
        ("validation", 2, 2.2, 2.0),
        ("test", 3, 1.8, 2.25),
    ]
    assert scores[0].below_floor == pytest.approx(-0.1)
    assert scores[1].below_floor == pytest.approx(0.2)


def test_half_way_the_best_validation_so_far_is_shown_and_no_test():
    scores = scores_of(run_of(RECORDS))
    assert [(s.split, s.step, s.bits_per_byte, s.below_floor) for s in scores] == [
        ("validation", 3, 2.1, None)
    ]


MASKED = {
    "loss": 3.5,
    "masked_loss": 3.0,
    "masked_accuracy": 0.4,
    "next_sentence_accuracy": 0.75,
    "seconds": 5.0,
}
BASELINES = {"fitted_tokens": 10**6, "validation": {"masked_loss": 6.5, "masked_accuracy": 0.05}}
MASKED_RUN = [
    step(1),
    {"step": 1, "validation": MASKED | {"loss": 9.0}, "attempt": 1, "time": 1.0},
    {"step": 2, "validation": MASKED, "attempt": 1, "time": 2.0},
]


def test_hidden_tokens_stand_next_to_counting_and_are_never_given_per_byte():
    run = run_of(MASKED_RUN, baselines=BASELINES)
    found = [(m.split, m.step, m.title, m.text(m.value), m.baseline) for m in measures_of(run)]
    assert scores_of(run) == [] and found == [
        ("validation", 2, "masked loss", "3.000", 6.5),
        ("validation", 2, "masked accuracy", "40.0%", 0.05),
        ("validation", 2, "next sentence accuracy", "75.0%", None),
    ]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(results_table(run))
    text = console.export_text() + render(run, "masked")
    for part in ("masked accuracy", "40.0%", "5.0%", "next sentence accuracy", "75.0%", "6.500"):
        assert part in text
    assert "bits/byte" not in text and "6-gram" not in text


def test_before_the_first_step_there_is_nothing_to_show():
    assert totals_of(run_of([])) is None and scores_of(run_of([])) == [] and summary_lines(run_of([])) == []


def test_the_table_for_the_terminal_holds_the_numbers():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(results_table(run_of(RECORDS, test=TEST, floor=FLOOR)))
    text = console.export_text()
    for part in (
        "byte 6-gram",
        "1.800",
        "2.250",
        "20.0%",
        "30.00",
        "-5.0%",
        "1,333 tokens/s",
        "13.33%",
        "5.56%",
    ):
        assert part in text


def test_a_run_directory_is_read_with_whatever_it_holds(tmp_path):
    store = open_store(str(tmp_path))
    store.put("config.yaml", b"run: {steps: 10}\n")
    assert read_run(store).config == {"run": {"steps": 10}}
    best = {"step": 2, "checkpoint": "step-00000002-w2-a1", "loss": 4.0}
    store.put("best.json", json.dumps(best).encode())
    store.put("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in RECORDS).encode())
    run = read_run(store)
    assert run.best == best and len(run.attempts) == len(RECORDS) and run.test is None


def test_a_place_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_run(open_store(str(tmp_path)))
