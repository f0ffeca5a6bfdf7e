"""What a sweep's folder belongs to. Trials count for the experiment that they were made in, and for no other."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from typing_extensions import TypedDict

from cluster.configuration.config import to_yaml
from cluster.configuration.stored_file import read_json, read_yaml
from cluster.console.errors import ConfigError
from cluster.storage.uris import Store
from trainers.stored.changes import differences

CONFIG, ORIGIN = "config.yaml", "origin.json"
CHANGEABLE = (
    "base.cluster.",
    "base.checkpoint.",
    "base.heartbeat.",
    "base.energy.",
    "base.run.name",
    "base.run.storage",
    "base.run.prepared",
    "base.run.max_failures",
    "base.run.log",
    "base.run.prompts",
    "base.run.floor_bytes",
    # What lies there has a digest, wherever it lies.
    "base.run.task",
    "base.backbone.uri",
    "base.corpus.",
)
"""Keys of what is searched over that change no score."""
SEARCHED_OVER = ("base.", "space")


BEFORE = {"base.batch.draw": "balanced"}
"""What was done by sweeps that are older than a key."""

PUT_BACK = "put the file back from a copy, or choose a new sweep.name"


class StoredSweep(TypedDict):
    """`config.yaml`."""

    sweep: dict[str, Any]
    base: dict[str, Any]
    space: dict[str, Any]


def pin(sweep: Store, config: Any, origin: Mapping[str, str]) -> None:
    """Write down configuration and origin (digests of what is read, by name) at the first start, and hold later ones
    against them. How many trials there are, and how they are chosen, may change.

    Raises:
        ConfigError: one line for each key that differs.
    """
    first = sweep.put_if_absent(ORIGIN, json.dumps(origin, indent=2, allow_nan=False).encode())
    if not first and (changed := list(changes(sweep, config, origin))):
        raise ConfigError(
            [f"sweep {sweep.uri}: {line}; give it back, or choose a new sweep.name" for line in changed]
        )
    sweep.put(CONFIG, to_yaml(config).encode())


def changes(sweep: Store, config: Any, origin: Mapping[str, str]) -> Iterator[str]:
    """One line for each key whose trials would not be comparable."""
    before = read_json(sweep, ORIGIN, dict[str, str], PUT_BACK)
    for name, digest in origin.items():
        if before.get(name) != digest:
            yield f"{name} is {digest} now, its trials were made with {before.get(name)}"
    if not sweep.exists(CONFIG):
        return  # the first start was cut off before its first trial
    stored = read_yaml(sweep, CONFIG, StoredSweep, PUT_BACK)
    for each in differences(stored, config, former=BEFORE):
        if each.name.startswith(SEARCHED_OVER) and not each.name.startswith(CHANGEABLE):
            yield f"{each.name}={each.now!r}, its trials were made with {each.before!r}"
