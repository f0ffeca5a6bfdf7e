"""GPUs as one buys them: memory, links and the share of their peak that matrix products reach, for plans.

Peak FLOP/s and power are in cluster/hardware/machine.py. Bandwidths are the makers' figures per direction; networks are
those of the machines that the clouds offer the GPU in. So is the memory of a node: AWS's list of instance types, of
p6-b200.48xlarge, p5en.48xlarge, p5.48xlarge, p4de.24xlarge, p4d.24xlarge and g6e.48xlarge, in the table's order.
"""

from dataclasses import dataclass

from cluster.hardware.machine import ASSUMED, Accelerator, find_accelerator

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU of a cluster of equal ones."""

    name: str
    """As on the command line."""
    device: str
    """As torch names it: leads to its row in cluster/hardware/machine.py."""
    memory_bytes: int
    memory_bandwidth: float
    """Bytes/s between the GPU and its own memory."""
    link: float
    """Bytes/s to another GPU of the same node."""
    network: float
    """Bytes/s to another node, for each GPU."""
    matrix_share: float
    """Share of the peak that large bf16 matrix products reach, clocks and power included; fitted, with the other
    constants of trainers/planning/throughput.py, to published speeds."""
    host_bytes: int
    """Memory of a node."""
    source: str
    per_node: int = 8

    @property
    def accelerator(self) -> Accelerator:
        row = find_accelerator(self.device)
        assert row is not None, self.device
        return row


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="b200-180gb",
            device="NVIDIA B200",
            memory_bytes=180 * GIB,
            memory_bandwidth=8.0e12,
            link=900e9,
            network=50e9,
            matrix_share=0.60,
            host_bytes=2_048 * GIB,
            source="NVIDIA HGX B200 data sheet; 400 Gb/s a GPU; share as H100, not fitted",
        ),
        Gpu(
            name="h200-141gb",
            device="NVIDIA H200",
            memory_bytes=141 * GIB,
            memory_bandwidth=4.8e12,
            link=450e9,
            network=50e9,
            matrix_share=0.60,
            host_bytes=2_048 * GIB,
            source="NVIDIA H200 data sheet; 400 Gb/s a GPU; share as H100, not fitted",
        ),
        Gpu(
            name="h100-80gb",
            device="NVIDIA H100 80GB HBM3",
            memory_bytes=80 * GIB,
            memory_bandwidth=3.35e12,
            link=450e9,
            network=50e9,
            matrix_share=0.60,
            host_bytes=2_048 * GIB,
            source="NVIDIA H100 SXM data sheet; 400 Gb/s a GPU (AWS p5; GCP a3-mega has half)",
        ),
        Gpu(
            name="a100-80gb",
            device="NVIDIA A100-SXM4-80GB",
            memory_bytes=80 * GIB,
            memory_bandwidth=2.04e12,
            link=300e9,
            network=25e9,
            matrix_share=0.85,
            host_bytes=1_152 * GIB,
            source="NVIDIA A100 data sheet; 200 Gb/s a GPU (llm-foundry's cluster)",
        ),
        Gpu(
            name="a100-40gb",
            device="NVIDIA A100-SXM4-40GB",
            memory_bytes=40 * GIB,
            memory_bandwidth=1.555e12,
            link=300e9,
            network=25e9,
            matrix_share=0.85,
            host_bytes=1_152 * GIB,
            source="NVIDIA A100 data sheet; 200 Gb/s a GPU (llm-foundry's cluster)",
        ),
        Gpu(
            name="l40s-48gb",
            device="NVIDIA L40S",
            memory_bytes=48 * GIB,
            memory_bandwidth=0.864e12,
            link=32e9,
            network=6.25e9,
            matrix_share=0.60,
            host_bytes=1_536 * GIB,
            source="NVIDIA L40S data sheet; PCIe 4 x16; 400 Gb/s a node (AWS g6e); share not fitted",
        ),
    )
}


def find_gpu(device_name: str) -> Gpu | None:
    """The row of a device as torch names it, else one of the same chip and board; None if there is none."""
    found = find_accelerator(device_name)
    same = [gpu for gpu in GPUS.values() if gpu.accelerator is found]
    return next((gpu for gpu in same if gpu.device == device_name), same[0] if same else None)


ASSUMED_GPU = next(gpu for gpu in GPUS.values() if gpu.accelerator is ASSUMED)
"""What a run for GPUs is planned for on a machine without any."""
