"""The peak that MFU is counted against: the maker's figure or, of a device that has none, a measured one.

What is measured depends on what else the machine does meanwhile. A run measures once for each kind of machine, before
its workers train, and keeps the figure in environment.json: its restarts count against the same peak.
"""

import json
from typing import Any

from cluster.configuration.stored_file import read_json
from cluster.hardware.machine import Peak, available_cores, cpu_name, cpu_version, known_peak, measured_peak
from cluster.storage.uris import Store
from trainers.model.shape import ModelConfig, matrix_products
from trainers.pretraining.config import PretrainConfig
from trainers.stored.run_files import MADE_ANEW, Environment, MeasuredPeak

ENVIRONMENT = "environment.json"
MOST_TOKENS = 2_048
"""Rows of a product that is measured: longer ones are no faster, and less often undisturbed."""
MOST_WIDTH = 4_096
"""Sides of its weight: a larger one is no faster, and that of a large vocabulary takes a gigabyte."""


def peak_of_run(run: Store, config: PretrainConfig, model: ModelConfig, device_name: str) -> Peak:
    """The best FLOP/s of a device like this host's, as the run keeps it or, where it does not yet, measured now.

    Raises:
        DamagedFileError: environment.json holds none.
    """
    device, engine = "cuda" if config.cluster.gpus_per_worker else "cpu", config.engine
    if known := known_peak(device, device_name, engine.precision):
        return known
    if kept := kept_peaks(run).get(kind_of_machine(config, device_name)):
        source = f"measured at the run's start: {kept['product']} in {engine.precision}"
        return Peak(kept["peak_flops_per_second"], source, is_measured=True)
    tokens = min(engine.micro_batch_rows * config.batch.seq_len, MOST_TOKENS)
    products = dict.fromkeys(
        (m, min(k, MOST_WIDTH), min(n, MOST_WIDTH)) for m, k, n in matrix_products(model, tokens)
    )
    return measured_peak(device, engine.precision, config.cluster.threads, tuple(products))


def keep_peak(run: Store, config: PretrainConfig, device_name: str, peak: Peak) -> None:
    """Put a measured peak into environment.json, unless one of this kind of machine is there."""
    peaks, kind = kept_peaks(run), kind_of_machine(config, device_name)
    if peak.is_measured and kind not in peaks:
        peaks[kind] = {"peak_flops_per_second": peak.flops_per_second, "product": peak.product}
        content = environment_of(run) | {"measured": peaks}
        run.put(ENVIRONMENT, json.dumps(content, indent=2, allow_nan=False).encode())


def kept_peaks(run: Store) -> dict[str, MeasuredPeak]:
    """What the run has measured, by kind of machine. Raises `DamagedFileError`."""
    peaks: dict[str, MeasuredPeak] = environment_of(run).get("measured", {})
    return peaks


def environment_of(run: Store) -> dict[str, Any]:
    """What environment.json holds; nothing yet in the folder of a sweep's trial."""
    found: dict[str, Any] = {}
    if run.exists(ENVIRONMENT):
        found = read_json(run, ENVIRONMENT, Environment, MADE_ANEW)
    return found


def kind_of_machine(config: PretrainConfig, device_name: str) -> str:
    """What two machines have in common that are as fast: device, cores, and what a worker computes with."""
    if not config.cluster.gpus_per_worker:
        device_name = f"{cpu_name()} {cpu_version()}".strip()
    threads = config.cluster.threads
    return f"{device_name}, {available_cores()} cores, {config.engine.precision} on {threads} threads"
