"""The winner of a sweep is trained once more and judged on the test split; then the sweep is closed.

Trials that came after the judgement would choose by a test split that has spoken already.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from typing_extensions import TypedDict

from cluster.configuration.stored_file import read_json, read_yaml
from cluster.console.errors import ConfigError
from cluster.storage.uris import Store
from trainers.finetuning.config import FinetuneConfig, seed_store
from trainers.finetuning.group import place_to_train
from trainers.finetuning.report import write_task_report
from trainers.finetuning.run import finetune
from trainers.reporting.metrics import finite
from trainers.tasks.splits import PreparedTask
from tune.search.config import SweepRunConfig
from tune.search.space import Point
from tune.sweeps.folder import CONFIG, PUT_BACK, StoredSweep

JUDGED = "judged.json"
REMEDY = "choose a new sweep.name with a test split that has chosen nothing"


def refuse_after_judgement(store: Store, sweep: SweepRunConfig) -> None:
    """Raise `ConfigError` if the test split has judged this sweep's winner and another search could come to another."""
    if problems := list(_chooses_anew(store, sweep)):
        raise ConfigError(problems)


def _chooses_anew(store: Store, sweep: SweepRunConfig) -> Iterator[str]:
    if not (store.exists(JUDGED) and store.exists(CONFIG)):
        return
    judged = read_judged(store)
    before = read_yaml(store, CONFIG, StoredSweep, PUT_BACK)["sweep"]
    for key, value in sweep.choosing().items():
        if value != before.get(key, value):
            yield (
                f"sweep.{key}={value!r}, but the test split has judged {judged} of {store.uri}, found with "
                f"{before[key]!r}: give it back, or {REMEDY}"
            )


class Judged(TypedDict):
    """`judged.json`."""

    point: Point


def read_judged(store: Store) -> Point:
    """The point that the test split judges. Raises `DamagedFileError`."""
    return read_json(store, JUDGED, Judged, PUT_BACK)["point"]


def claim_judgement(store: Store, point: Point) -> None:
    """Write down which point the test split judges; of a sweep it judges one. Raises `ConfigError` for another."""
    if store.put_if_absent(JUDGED, json.dumps({"point": point}, sort_keys=True, allow_nan=False).encode()):
        return
    if (first := read_judged(store)) != point:
        raise ConfigError(
            [f"the test split was opened to judge {first}, and cannot judge {point} too; {REMEDY}"]
        )


def judge(
    best: FinetuneConfig, point: Point, store: Store, prepared: PreparedTask, backbone: str = ""
) -> dict[str, Any]:
    """Train the winner once more, in the sweep's folder, and read the test split: once, also if asked again. `backbone`
    is the digest of what its trials started from.

    Raises:
        ConfigError: the sweep has judged another point.
    """
    claim_judgement(store, point)
    here = replace(best, run=replace(best.run, storage=store.uri, name="best", seeds=best.run.seeds[:1]))
    with place_to_train(best.cluster) as alone:
        result = finetune(here, prepared=prepared, alone=alone, backbone=backbone)
    run = seed_store(here, here.run.seeds[0])
    write_task_report(run, prepared)
    test = result.seeds[0]["test"]
    store.put("test.json", json.dumps(finite(test), indent=2, allow_nan=False).encode())
    return test
