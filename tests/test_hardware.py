import os
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.benchmark import Timer

from cluster.hardware import machine as hardware
from cluster.hardware.machine import (
    EnergyConfig,
    estimate_energy,
    find_accelerator,
    measured_peak,
    peak_of,
    worker_watts,
)


@pytest.mark.parametrize(
    ("device_name", "bf16", "watts"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 700),
        ("NVIDIA H100 PCIe", 756e12, 350),
        ("NVIDIA H100 NVL", 835e12, 400),
        ("NVIDIA H200", 989e12, 700),
        ("NVIDIA A100-SXM4-80GB", 312e12, 400),
        ("NVIDIA A100 80GB PCIe", 312e12, 300),
        ("NVIDIA A10G", 70e12, 300),
        ("NVIDIA A10", 125e12, 150),
        ("NVIDIA L40S", 362e12, 350),
        ("NVIDIA L4", 121e12, 72),
        ("AMD Instinct MI300X", 1307.4e12, 750),
    ],
)
def test_each_device_finds_its_own_row(device_name, bf16, watts):
    row = find_accelerator(device_name)
    assert (row.bf16, row.watts) == (bf16, watts)
    assert peak_of("cuda", device_name, "bf16").flops_per_second == bf16
    assert peak_of("cuda", device_name, "fp32").flops_per_second == row.fp32 < bf16


def test_a_device_without_a_row_is_not_taken_for_another():
    assert find_accelerator("NVIDIA GeForce GTX 1080") is None
    assert find_accelerator("NVIDIA L40") is None


def test_the_peak_of_a_cpu_is_the_rate_of_the_product_that_it_names():
    """Held against torch's own timer, which repeats the named product by itself."""
    threads = torch.get_num_threads()
    peak = measured_peak("cpu", "fp32", 1, ((256, 384, 1_024), (256, 1_024, 384)))
    assert torch.get_num_threads() == threads and peak.is_measured
    m, k, k_again, n = (int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", peak.product))
    assert k == k_again and (m, k, n) in {(1_024,) * 3, (256, 384, 1_024), (256, 1_024, 384)}
    again = Timer("x @ w", globals={"x": torch.ones(m, k), "w": torch.ones(k, n)}, num_threads=1)
    alone = 2 * m * k * n / min(again.timeit(1).median for _ in range(200))
    assert 0.5 * alone < peak.flops_per_second < 2 * alone


def test_a_device_with_a_data_sheet_is_not_measured(monkeypatch):
    monkeypatch.setattr(hardware, "measured_peak", None)
    assert not peak_of("cuda", "NVIDIA H100 80GB HBM3", "bf16").is_measured


def test_a_plan_for_accelerators_can_be_made_without_one(monkeypatch):
    monkeypatch.setattr(hardware, "device_here", lambda: torch.device("cpu"))
    peak = peak_of("cuda", "Intel(R) Xeon(R) Processor", "bf16")
    assert peak.flops_per_second == 312e12 and "assumed" in peak.source and "A100" in peak.source
    assert worker_watts(EnergyConfig(), "cuda", "Intel(R) Xeon(R) Processor", threads=1) == 400 + 12


def test_energy_equals_the_computation_by_hand():
    config = EnergyConfig(watts_per_core=10, overhead=1.5, grams_per_kwh=400)
    assert worker_watts(config, "cpu", "any processor", threads=2) == 20
    assert worker_watts(config, "cuda", "NVIDIA A100-SXM4-80GB", threads=8) == 400 + 80
    assert worker_watts(EnergyConfig(watts_per_device=250), "cuda", "NVIDIA A100-SXM4-80GB", threads=0) == 250
    # 2,000 W x 1.5 = 3 kW for half an hour: 1.5 kWh, 600 g.
    energy = estimate_energy(config, watts=2000, seconds=1800)
    assert (energy.kwh, energy.co2_grams) == (pytest.approx(1.5), pytest.approx(600))
    assert all(number in energy.assumption for number in ("2,000 W", "1.5", "400 g"))


def test_a_container_quota_bounds_cores_and_memory(monkeypatch):
    limits = {"cpu.max": "100000 100000", "memory.max": "1073741824\n"}
    monkeypatch.setattr(hardware, "_control_group", limits.__getitem__)
    assert (hardware.available_cores(), hardware.available_memory_bytes()) == (1, 2**30)
    monkeypatch.setattr(
        hardware, "_control_group", {"cpu.max": "max 100000", "memory.max": "max"}.__getitem__
    )
    assert hardware.available_cores() == len(os.sched_getaffinity(0))
    assert hardware.available_memory_bytes() > 2**26


def test_this_host_is_described_in_full():
    host = hardware.this_host()
    assert host.cores >= 1 and host.memory_bytes > 2**26 and host.device_name
    assert (host.device == "cuda") == (host.num_devices > 0) == (host.device_memory_bytes > 0)


def test_importing_it_does_not_import_torch():
    code = "import sys, cluster.hardware.machine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
