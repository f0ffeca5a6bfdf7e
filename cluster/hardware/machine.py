"""What a machine has, how fast it could be at best, and what it draws: the ground under plan, MFU and energy.

Peaks of accelerators are the makers' figures for dense matrix products; a CPU, and an accelerator that is not
in the table, is measured. Power is an assumption, never a measurement, and is printed as such.
"""

import functools
import math
import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from cluster.configuration.keys import may_change

if TYPE_CHECKING:  # seconds to import
    import torch

Precision = Literal["bf16", "fp32"]

# For workers on CPUs. By default glibc returns each large activation to the kernel, and the kernel zeroes its pages
# at the next allocation: a fourth of a step. Here freed memory stays with the process, in huge pages where it can.
CPU_ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=0x1000000000:glibc.malloc.hugetlb=1"
}

MEASURED_SECONDS = 1.5
"""For a peak that no data sheet tells. In 0.2 s a machine with neighbours showed anything from a third of it on."""
SQUARE = {"cpu": 1_024, "cuda": 8_192}
"""Sides of a square product that is measured beside a model's."""

# Ray leaves the devices of a node visible to workers that asked for none.
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@dataclass(frozen=True)
class Accelerator:
    """A row of the table: devices with all of `words` in their name, unless an earlier row has them."""

    words: tuple[str, ...]
    bf16: float
    """FLOP/s, dense, tensor cores, float32 accumulation."""
    fp32: float
    """FLOP/s without TF32, torch's default for float32 matrix products."""
    watts: float
    """Board power limit (TDP)."""
    source: str


H100 = "NVIDIA H100 data sheet, halved where it counts sparsity"
ACCELERATORS = (
    Accelerator(("b200",), 2250e12, 75e12, 1000, "NVIDIA HGX B200 data sheet / 8, halved for sparsity"),
    Accelerator(("h200", "nvl"), 836e12, 60e12, 600, "NVIDIA H200 data sheet, halved for sparsity"),
    Accelerator(("h200",), 989e12, 67e12, 700, "NVIDIA H200 data sheet, halved for sparsity"),
    Accelerator(("h100", "pcie"), 756e12, 51e12, 350, H100),
    Accelerator(("h100", "nvl"), 835e12, 60e12, 400, H100),
    Accelerator(("h100",), 989e12, 67e12, 700, H100),
    Accelerator(("a100", "sxm4"), 312e12, 19.5e12, 400, "NVIDIA A100 data sheet"),
    Accelerator(("a100",), 312e12, 19.5e12, 300, "NVIDIA A100 data sheet"),
    Accelerator(("a10g",), 70e12, 35e12, 300, "NVIDIA A10G data sheet, halved for sparsity"),
    Accelerator(("a10",), 125e12, 31.2e12, 150, "NVIDIA A10 data sheet"),
    Accelerator(("l40s",), 362e12, 91.6e12, 350, "NVIDIA L40S data sheet"),
    Accelerator(("l4",), 121e12, 30.3e12, 72, "NVIDIA L4 data sheet, halved for sparsity"),
    Accelerator(("4090",), 165.2e12, 82.6e12, 450, "NVIDIA Ada GPU architecture, appendix A"),
    Accelerator(("3090",), 71e12, 35.6e12, 350, "NVIDIA GA102 GPU architecture, appendix A"),
    Accelerator(("mi300x",), 1307.4e12, 163.4e12, 750, "AMD Instinct MI300X data sheet"),
)

ASSUMED = next(row for row in ACCELERATORS if row.words == ("a100", "sxm4"))
"""What a plan assumes on a machine without accelerators; also the power of one that is not in the table."""


@dataclass(frozen=True, kw_only=True)
class EnergyConfig:
    """What the energy estimate assumes. None of it is measured."""

    watts_per_core: float = may_change(12.0, "until finished")
    """Watts per host core in use; "Any" CPU in the data of Green Algorithms (Lannelongue et al. 2021)."""
    watts_per_device: float = may_change(0.0, "until finished")
    """Watts per accelerator in use; 0: its board power limit."""
    overhead: float = may_change(1.58, "until finished")
    """Site's power / computers' power (PUE): mean of Uptime Institute's survey of 2023; 1 on a laptop."""
    grams_per_kwh: float = may_change(445.0, "until finished")
    """CO2 in grams per kWh of electricity: world mean of 2024, IEA, Electricity 2025."""


@dataclass(frozen=True)
class Peak:
    """The best FLOP/s of one device, and how it is known."""

    flops_per_second: float
    source: str
    is_measured: bool = False
    product: str = ""
    """The matrix product that reached it, if it is measured."""


@dataclass(frozen=True)
class Hardware:
    """One host as a process on it sees it, container limits included."""

    host: str
    cores: int
    memory_bytes: int
    device: Literal["cuda", "cpu"]
    device_name: str
    num_devices: int
    """Accelerators; 0 on a machine without."""
    device_memory_bytes: int
    """Per accelerator; 0 on a machine without."""


@dataclass(frozen=True)
class Energy:
    """An estimate with its assumption in words."""

    kwh: float
    co2_grams: float
    assumption: str


def this_host() -> Hardware:
    """Looks at this machine; imports torch, which is the one to say what it can use."""
    import torch

    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.cuda.get_device_properties(0) if num_devices else None
    return Hardware(
        host=platform.node(),
        cores=available_cores(),
        memory_bytes=available_memory_bytes(),
        device="cuda" if device else "cpu",
        device_name=device.name if device else cpu_name(),
        num_devices=num_devices,
        device_memory_bytes=device.total_memory if device else 0,
    )


def available_cores() -> int:
    """Cores that this process may use: the affinity mask, or the container's quota where that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = (*_control_group("cpu.max").split(), "max", "max")[:2]
    return cores if "max" in (quota, period) else max(1, min(cores, int(quota) // int(period)))


def available_memory_bytes() -> int:
    """Memory of this machine, or the container's limit where that is less."""
    total: int = psutil.virtual_memory().total
    limit = _control_group("memory.max").strip()
    return min(total, int(limit)) if limit.isdecimal() else total


def used_memory_bytes(device: str) -> int:
    """Most accelerator memory that this process has had in tensors; on a CPU its resident memory now."""
    if device == "cpu":
        rss: int = psutil.Process().memory_info().rss
        return rss
    import torch

    return torch.cuda.max_memory_allocated()


def cpu_name() -> str:
    """The processor as the system names it."""
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_version() -> str:
    """Family, model and stepping of the processor, for a cloud's name of it may hide them; empty where unknown."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    known = [re.search(rf"^{key}\s*: *(\S+)", text, re.M) for key in ("cpu family", "model", "stepping")]
    return f"({'/'.join(found[1] for found in known if found)})" if any(known) else ""


def find_accelerator(device_name: str) -> Accelerator | None:
    """The table's row for a device as torch names it ("NVIDIA H100 80GB HBM3"); None if it has none."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    return next((row for row in ACCELERATORS if words.issuperset(row.words)), None)


def peak_of(device: str, device_name: str, precision: Precision, threads: int = 1) -> Peak:
    """The best FLOP/s of one worker's device, "cuda" or "cpu": the maker's figure, else measured here."""
    return known_peak(device, device_name, precision) or measured_peak(device, precision, threads)


def known_peak(device: str, device_name: str, precision: Precision) -> Peak | None:
    """The table's; None of a device that is not there, and of CPUs.

    Of a CUDA device where there is none, as on a laptop that plans for a cluster, an A100's is assumed.
    """
    row = find_accelerator(device_name) if device == "cuda" else None
    if row is not None:
        return Peak(row.bf16 if precision == "bf16" else row.fp32, row.source)
    if device == "cuda" and device_here().type == "cpu":
        flops = ASSUMED.bf16 if precision == "bf16" else ASSUMED.fp32
        return Peak(flops, f"assumed, there is no GPU here: {ASSUMED.source}")
    return None


@functools.cache
def measured_peak(
    device: str,
    precision: Precision,
    threads: int,
    products: tuple[tuple[int, int, int], ...] = (),
    seconds: float = MEASURED_SECONDS,
) -> Peak:
    """The best rate that a matrix product reaches in `seconds`: a square one, and those of a model.

    They take turns, so that what disturbs for a while does not hit all repeats of one. A product of (m, k, n) is one
    of a layer's input [m, k] and its weight [n, k], and 2 m k n FLOP. Leaves torch's number of threads as it was.
    """
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shapes = dict.fromkeys([(SQUARE[device],) * 3, *products], math.inf)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made = [
            (
                shape,
                torch.ones(m, k, dtype=dtype, device=device),
                torch.ones(n, k, dtype=dtype, device=device),
            )
            for shape in shapes
            for m, k, n in [shape]
        ]
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for shape, rows, weight in made:
                start = time.perf_counter()
                _ = (rows @ weight.t())[0, 0].item()  # reading one element waits for the device
                shapes[shape] = min(shapes[shape], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads_before)
    flops, (m, k, n) = max((2 * math.prod(shape) / best, shape) for shape, best in shapes.items())
    product = f"[{m:,} x {k:,}] x [{k:,} x {n:,}]"
    source = f"measured here: {product} in {precision}, {threads} thread{'s' * (threads != 1)}"
    return Peak(flops, source, is_measured=True, product=product)


def worker_watts(config: EnergyConfig, device: str, device_name: str, threads: int) -> float:
    """Watts that one worker is taken to draw, in plans and reports: a host core for each thread that it computes on,
    and its accelerator where it has one. Memory, network and fans of its node are not counted.
    """
    watts = config.watts_per_core * threads
    if device == "cuda":
        watts += config.watts_per_device or (find_accelerator(device_name) or ASSUMED).watts
    return watts


def estimate_energy(config: EnergyConfig, watts: float, seconds: float) -> Energy:
    """Energy of computers that draw `watts` together for `seconds`, the site's overhead included."""
    kwh = watts * config.overhead * seconds / 3.6e6  # J per kWh
    return Energy(
        kwh=kwh,
        co2_grams=kwh * config.grams_per_kwh,
        assumption=(
            f"assumed, not measured: {watts:,.0f} W in all while running, "
            f"x {config.overhead:g} for the site (PUE), {config.grams_per_kwh:g} g CO2 per kWh"
        ),
    )


def device_here() -> "torch.device":
    """Where a model that this process asks belongs: on its GPU, if it sees one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _control_group(file: str) -> str:
    """A limit of the container (cgroup v2), empty where there is none."""
    path = Path("/sys/fs/cgroup") / file
    return path.read_text() if path.exists() else ""
