"""The accounts of a real run that compiles, held against the clock of whoever started it."""

import statistics
import time
from pathlib import Path

import pytest

from cluster.storage.uris import Store, open_store
from tests.small_run import SmallRun, put_corpus
from trainers.reporting.goodput import Goodput
from trainers.reporting.metrics import events_of, read_attempts, steps_of, validations_of
from trainers.reporting.results import CONCLUDED, read_run

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def finished(run: SmallRun, store: Store, **changes: object) -> tuple[Goodput, float, float]:
    """The accounts once the command has ended, and when it began and let go of the run; Python's own end takes seconds
    where the machine is busy."""
    began = time.time()
    assert run.finish(run.start(**changes), seconds=500) == 0, run.output()[-4000:]
    left = max(Path(store.uri.removeprefix("file://"), "drivers").glob("*.ended"))
    return read_run(store).goodput, began, left.stat().st_mtime


def test_a_compiled_runs_accounts_are_those_of_the_clock_from_its_asking_for_workers_to_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    run, changes = SmallRun(str(tmp_path), tmp_path / "log.txt"), {"engine__compile": True, "run__steps": 40}
    put_corpus(open_store(f"{run.root}/raw"))
    store = open_store(f"{run.root}/runs/pretrain")
    found, _, ended = finished(run, store, **changes)

    records = read_attempts(store)
    [start], [trained], steps = events_of(records, "start"), events_of(records, "trained"), steps_of(records)
    assert found.total == pytest.approx(ended - start["asked"], abs=2.0)
    # By the clock alone: what passed before the second step, less a usual step, was no training.
    later = [s["step_seconds"] - s["data_wait_seconds"] - s["checkpoint_stall_seconds"] for s in steps[1:]]
    usual = statistics.median(later)
    by_clock = steps[0]["time"] - start["began"] - usual
    compiled_later = sum(s["compile_seconds"] for s in steps[1:])
    in_validation = sum(v["validation"]["compile_seconds"] for v in validations_of(records))
    assert found.starting + found.compiling - compiled_later - in_validation == pytest.approx(
        by_clock, abs=0.1
    )
    assert found.training == pytest.approx(usual + sum(later) - compiled_later, abs=0.1)
    assert found.compiling > 0.5 * (steps[0]["step_seconds"] - usual) > 1.0
    assert found.concluding == pytest.approx(ended - trained["time"], abs=2.0)
    assert 0 <= found.other < 3.0

    # As if it had been killed before it had a floor: the same command trains nothing, and concludes.
    for path in ("floor.json", "samples.json", "metrics.jsonl", "report.html", CONCLUDED):
        store.delete(path)
    again, began, ended = finished(run, store, **changes)
    last = max(record["time"] for record in records)
    assert again.total == pytest.approx(ended - start["asked"], abs=2.0)
    assert 0 < again.down - (began - last) < ended - began
    assert again.concluding == pytest.approx(last - trained["time"] + (ended - began), abs=15.0)
    # Its page is made again later: no time of the run.
    assert finished(run, store, **changes)[0] == again
