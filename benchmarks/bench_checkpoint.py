"""What a checkpoint costs: the training thread's stall and the writing, against a plain safetensors save.

    python benchmarks/bench_checkpoint.py [--store URI] [--megabytes 32 128 512] [--repeats 5]

One worker, value and two moments of AdamW, medians over the repeats after one save that makes the buffers.
The plain save writes the same tensors with `safetensors.torch.save_file` to a local file and waits for the
disk (fsync), as a commit does.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from safetensors.torch import save_file

from cluster.storage.uris import open_store
from trainers.checkpoints.keeping import CheckpointConfig, latest_checkpoint
from trainers.checkpoints.reader import CheckpointReader
from trainers.checkpoints.state import StateSlice
from trainers.checkpoints.writer import CheckpointWriter

KINDS = ("value", "exp_avg", "exp_avg_sq")
WIDTH = 1_024


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def make_state(num_bytes: int) -> dict[tuple[str, str], torch.Tensor]:
    """Matrices [4 x WIDTH, WIDTH] (16 MiB each) and one of the rest, so that the sum is as asked."""
    rows = num_bytes // (4 * WIDTH * len(KINDS))
    heights = [4 * WIDTH] * (rows // (4 * WIDTH)) + [rows % (4 * WIDTH)]
    return {
        (f"w{i}", kind): torch.randn(height, WIDTH)
        for i, height in enumerate(heights)
        for kind in KINDS
        if height
    }


def slices(state: dict[tuple[str, str], torch.Tensor]) -> Iterator[StateSlice]:
    for (name, kind), tensor in state.items():
        yield StateSlice(name, kind, tuple(tensor.shape), 0, tensor.view(-1))


def plain_save(state: dict[tuple[str, str], torch.Tensor], path: Path) -> None:
    save_file({f"{name}/{kind}": tensor for (name, kind), tensor in state.items()}, path)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def measure(num_bytes: int, uri: str, repeats: int) -> dict[str, float]:
    """Seconds and ratios for a state of this size."""
    state, store = make_state(num_bytes), open_store(uri).child(f"size-{num_bytes}")
    stalls, writes, plain = [], [], []
    with CheckpointWriter(store, CheckpointConfig(keep_last=1), rank=0, world_size=1, attempt=1) as writer:
        for step in range(repeats + 1):
            stall = writer.save(step, slices(state), {})
            written = seconds(writer.finish)
            with tempfile.TemporaryDirectory() as folder:
                plain.append(seconds(lambda: plain_save(state, Path(folder) / "plain.safetensors")))  # noqa: B023
            if step:
                stalls.append(stall)
                writes.append(written)
        host_bytes = writer.host_bytes
    verify_seconds = seconds(lambda: latest_checkpoint(store))
    reader = CheckpointReader(store, latest_checkpoint(store))
    read_seconds = seconds(lambda: [reader.load_full(name, kind) for name, kind in state])
    total, stall, write = num_bytes / 1e9, median(stalls), median(writes)
    return {
        "state MB": num_bytes / 1e6,
        "host MB": host_bytes / 1e6,
        "stall ms": stall * 1e3,
        "copy GB/s": total / stall,
        "write s": write,
        "write GB/s": total / write,
        "plain save s": median(plain[1:]),
        "stall / plain": stall / median(plain[1:]),
        "write / plain": write / median(plain[1:]),
        "verify GB/s": total / verify_seconds,
        "read GB/s": total / read_seconds,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", help="URI to write to (default: a temporary folder)")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(n * 10**6, arguments.store or folder, arguments.repeats) for n in arguments.megabytes]
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(f"{value:.3g}".rjust(len(key)) for key, value in row.items()))


if __name__ == "__main__":
    main()
