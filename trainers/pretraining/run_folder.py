"""The folder of a run: what it was started with, and what stays fixed from then on.

config.yaml  manifest.json  environment.json  plan.txt     written when the run starts
metrics/  metrics.jsonl  tensorboard/                      trainers/reporting/metrics.py
checkpoints/  best.json                                    trainers/checkpoints/, trainers/evaluation/selection.py
test.claim.json  test.json                                 trainers/evaluation/verdict.py
export/  samples.json  floor.json  concluded.json          trainers/pretraining/closing.py
baselines.json                                             trainers/pretraining/baselines.py
stacks/                                                    trainers/recovery/heartbeat.py
"""

import json
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.configuration.config import to_yaml
from cluster.configuration.stored_file import read_json, read_yaml
from cluster.console.errors import ConfigError
from cluster.hardware.machine import this_host
from cluster.sessions.session import PROJECT
from cluster.storage.uris import Store, open_store
from data.shards.manifest import Manifest
from trainers.checkpoints.commit import parse_folder_name
from trainers.checkpoints.keeping import committed
from trainers.evaluation.verdict import CLAIM, EXPORT, VERDICT
from trainers.exported.model_digest import content_digest
from trainers.exported.replacing import foreign_problem
from trainers.pretraining.config import PretrainConfig, watts_per_worker
from trainers.pretraining.peak import ENVIRONMENT, kept_peaks
from trainers.stored.changes import changed_keys
from trainers.stored.run_files import PUT_BACK, Pinned

CONFIG, MANIFEST, PLAN = "config.yaml", "manifest.json", "plan.txt"
PACKAGES = ("ray", "torch", "deepspeed", "pyarrow", "tokenizers", "safetensors", "numpy")


def pinned_manifest(run: Store) -> str | None:
    """Digest of the manifest that the run was started on; None before its first start."""
    try:
        return read_json(run, MANIFEST, Pinned, PUT_BACK)["digest"]
    except FileNotFoundError:
        return None


def pinned_initial(run: Store) -> str:
    """Digest of the model that the run was started from; empty where there is none, or an older run noted none."""
    return read_json(run, MANIFEST, Pinned, PUT_BACK).get("init_from", "")


def check_unchanged(run: Store, config: PretrainConfig) -> None:
    """Refuse to go on under another configuration, to hand out what was finished under another one, or to export at
    the end over a model that no run wrote.

    Raises:
        ConfigError: one line per key that differs and may not, or `run.steps` that are no more than what is done.
    """
    begun = run.exists(CONFIG)
    if not run.exists(VERDICT) and (problem := foreign_problem(run.child(EXPORT), begun=begun)):
        raise ConfigError([problem])
    try:
        before = read_yaml(run, CONFIG, dict[str, Any], PUT_BACK)
    except FileNotFoundError:
        return
    if changed := changed_keys(before, config, judged=run.exists(CLAIM), finished=is_finished(run)):
        raise ConfigError([f"run {run.uri}: {line}" for line in changed])
    # A run that had these steps before has validated the last of them, and goes on to its judgement.
    steps, section = config.run.steps, before.get("run") or {}
    steps_before = section.get("steps", PretrainConfig().run.steps)
    if steps != steps_before and steps <= (done := finished_steps(run)):
        wrong = f"run.steps={steps:,} is not above the {done:,} steps that are done"
        raise ConfigError([f"run {run.uri}: {wrong}; give more, or choose a new run.name"])


def finished_steps(run: Store) -> int:
    """Steps of the newest checkpoint; 0 before the first."""
    return max((found[0] for name in committed(run) if (found := parse_folder_name(name))), default=0)


def write_start(run: Store, config: PretrainConfig, manifest: Manifest, plan: str) -> None:
    """Write down what the run is. The first start pins the manifest, and all of the configuration that may not change:
    `check_unchanged` holds each later start to it."""
    run.put(CONFIG, to_yaml(config).encode())  # first: a manifest without it would be any corpus's
    content = {"digest": manifest.digest, "tokenizer": manifest.tokenizer, "vocab_size": manifest.vocab_size}
    if config.run.init_from and not run.exists(MANIFEST):
        content["init_from"] = content_digest(open_store(config.run.init_from))
    run.put_if_absent(
        MANIFEST, json.dumps({**content, "summary": manifest.summary()}, indent=2, allow_nan=False).encode()
    )
    content = environment(config) | {"measured": kept_peaks(run)}
    run.put(ENVIRONMENT, json.dumps(content, indent=2, allow_nan=False).encode())
    run.put(PLAN, plan.encode())


def environment(config: PretrainConfig) -> dict[str, Any]:
    """Versions and machine, of the driver. Nothing from its environment variables, which hold secrets."""
    host = this_host()
    device = "cuda" if config.cluster.gpus_per_worker else "cpu"
    return {
        "hardware": asdict(host),
        "watts_per_worker": watts_per_worker(config, device, host.device_name),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": _commit(PROJECT),
    }


def is_finished(run: Store) -> bool:
    """Whether the run was trained to its end, judged on the test split and exported."""
    return run.exists(VERDICT) and run.exists(f"{EXPORT}/config.json")


def _commit(folder: Path) -> str | None:
    """The project's commit; None outside of a git checkout, as in an uploaded working directory."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
