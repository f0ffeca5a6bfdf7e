"""The whole system against a bare PyTorch loop: tokens/s with one worker, and with two against plain DDP.

    python benchmarks/bench_training.py [--steps 60] [--workers 1 2]
    python benchmarks/bench_training.py --config trainers/configs/gpt2-124m.yaml --rows 64 --workers 1 --raw URI
    python benchmarks/bench_training.py --workers 2 --idle-ray 7

Same model, precision, threads, compilation and batch (those of a preset), AdamW in both. The bare loop knows nothing
but a forward and backward pass and an optimiser: no data to read, no ZeRO, no checkpoint, no metrics. Two workers of it
are torch's DistributedDataParallel, over gloo or, where the preset asks for GPUs, NCCL. The system is the real entry,
Ray and all, on a small corpus; its rate is that of its own step records. The first steps, in which both compile, count
for neither. `--idle-ray` also runs the bare loop beside a Ray that does nothing but hold so many actors, as many as Ray
Train and Ray Data have of their own in a run: what is lost then is no doing of the system's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.bare import BareLoop
from cluster.configuration.config import load_config
from cluster.hardware.machine import CPU_ALLOCATOR
from cluster.sessions.session import PROJECT, ray_session
from cluster.sessions.workers import ClusterConfig
from cluster.storage.uris import open_store
from tests.small_run import put_corpus
from trainers.model.backbone import build
from trainers.objectives.causal import causal_lm
from trainers.pretraining.config import PretrainConfig
from trainers.reporting.metrics import read_metrics, steps_of

WARMUP_STEPS = 10
SAMPLE = PROJECT / "trainers" / "configs" / "sample.yaml"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="steps of each run")
    parser.add_argument("--workers", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--config", type=Path, default=SAMPLE, help="preset")
    parser.add_argument("--rows", type=int, help="rows of a step, instead of the preset's")
    parser.add_argument("--idle-ray", type=int, default=0, metavar="N", help="see above; 0: not")
    parser.add_argument("--raw", help="corpus that the system trains on, instead of a small one")
    arguments = parser.parse_args(argv)
    preset = Preset(arguments.config, arguments.rows)
    print(
        "| workers | threads each | bare loop, tokens/s | whole system, tokens/s | ratio |\n|---|---|---|---|---|"
    )
    for workers in arguments.workers:
        threads = max(1, (os.cpu_count() or 2) // max(arguments.workers))
        bare = bare_rate(preset, workers, threads, arguments.steps)
        system = system_rate(preset, workers, threads, arguments.steps, arguments.raw)
        print(f"| {workers} | {threads} | {bare:,.0f} | {system:,.0f} | {system / bare:.2f} |", flush=True)
        if arguments.idle_ray:
            with idle_ray(arguments.idle_ray):
                beside = bare_rate(preset, workers, threads, arguments.steps)
            print(
                f"the bare loop beside {arguments.idle_ray} idle actors: {beside:,.0f}, {beside / bare:.3f}"
            )


@dataclass(frozen=True)
class Preset:
    """What both train."""

    path: Path
    rows: int | None

    @property
    def config(self) -> PretrainConfig:
        given = ["--config", str(self.path), "--corpus.uri", "raw", "--corpus.prepared", "prepared"]
        given += ["--run.storage", "runs"]
        if self.rows:
            given += ["--batch.rows_per_step", str(self.rows)]
        return load_config(PretrainConfig, given, description="").config


def system_rate(preset: Preset, workers: int, threads: int, steps: int, raw: str | None) -> float:
    """Tokens/s of a run through the entry."""
    config = preset.config
    with tempfile.TemporaryDirectory() as folder:
        if raw is None:
            put_corpus(open_store(f"{folder}/raw"))
        settings = {
            "corpus.uri": raw or f"{folder}/raw",
            "corpus.prepared": f"{folder}/prepared",
            "corpus.splits.validation_documents": "[]",
            "corpus.splits.test_documents": "[]",
            "corpus.splits.validation": 0.1,
            "corpus.splits.test": 0.1,
            "run.name": "system",
            "run.storage": folder,
            "run.steps": steps,
            "run.floor_bytes": 0,
            "optimizer.kind": "adamw",
            # Whatever entries so small a corpus makes.
            "model.vocab_size": config.corpus.tokenizer.vocab_size,
            "batch.rows_per_step": config.batch.rows_per_step,
            "cluster.num_workers": workers,
            "cluster.threads_per_worker": threads,
            "validation.every_steps": steps,
            "checkpoint.every_steps": steps,
        }
        changes = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        entry = [sys.executable, str(PROJECT / "trainers" / "pretrain.py"), "--config", str(preset.path)]
        log = Path(folder, "log.txt")
        with open(log, "wb") as file:
            done = subprocess.run([*entry, *changes], stdout=file, stderr=file)
        if done.returncode:
            raise SystemExit(log.read_text(errors="replace")[-4000:])
        records = steps_of(read_metrics(open_store(f"{folder}/system")))[WARMUP_STEPS:]
        return sum(r["tokens"] for r in records) / sum(r["step_seconds"] for r in records)


class Idle:
    """An actor without work."""

    def is_up(self) -> bool:
        return True


@contextmanager
def idle_ray(num_actors: int) -> Iterator[None]:
    """A local Ray with idle actors, for the length of a with-block."""
    with ray_session(ClusterConfig(address="local")):
        import ray  # here: the session sets what Ray reads when imported

        actors = [ray.remote(num_cpus=0)(Idle).remote() for _ in range(num_actors)]
        ray.get([actor.is_up.remote() for actor in actors])
        yield


def bare_rate(preset: Preset, workers: int, threads: int, steps: int) -> float:
    """Tokens/s of the bare loop, in processes of their own."""
    os.environ.update(CPU_ALLOCATOR)  # they start with it, as the system's workers do
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "rate.json")
        mp.start_processes(
            bare_loop,
            args=(preset, workers, threads, steps, folder, result),
            nprocs=workers,
            start_method="spawn",
        )
        return json.loads(result.read_text())


def bare_loop(
    rank: int, preset: Preset, workers: int, threads: int, steps: int, folder: str, result: Path
) -> None:
    """Train on random tokens. bf16 weights with float32 masters, as the engine has them."""
    torch.set_num_threads(threads)
    config = preset.config
    device = torch.device(f"cuda:{rank}" if config.cluster.gpus_per_worker else "cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{folder}/init", rank=rank, world_size=workers)
    shape = replace(config.model, vocab_size=config.corpus.tokenizer.vocab_size)
    rows = config.batch.rows_per_step // workers
    size = min(rows, config.engine.micro_batch_rows)
    loop = BareLoop(
        build(shape, seed=0, dtype=torch.bfloat16).to(device),
        replace(config.optimizer, kind="adamw"),
        config.engine.gradient_clip,
    )
    tokens = torch.randint(shape.vocab_size, (rows, config.batch.seq_len + 1), device=device)
    weights, targets = torch.ones(size, device=device), rows * workers * config.batch.seq_len
    started = 0.0
    for step in range(steps):
        if step == WARMUP_STEPS:
            wait_for(device)
            started = time.perf_counter()
        loop.step(
            lambda model: (
                causal_lm(model, micro, weights, boundary_id=0).total / targets
                for micro in tokens.split(size)
            )
        )
    wait_for(device)
    if rank == 0:
        result.write_text(json.dumps((steps - WARMUP_STEPS) * targets / (time.perf_counter() - started)))
    dist.destroy_process_group()


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
