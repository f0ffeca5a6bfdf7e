"""Ways to train a model on one GPU: speed and memory as measured, beside what the planner says and the bare loop does.

    python benchmarks/bench_gpu.py [--config trainers/configs/gpt2-124m.yaml] [--rows 64] [--ways bare 1 3+recompute]

A way is a ZeRO stage, and what is added to it: `recompute` (activation checkpointing), `offload` (optimiser states in
host memory), `offload-all` (parameters too), `serial` (no overlap_comm of DeepSpeed's), `eager` (not compiled). Each
has a process of its own, and NCCL with this one worker. Rows are random tokens: no corpus, no Ray, no checkpoints, so
what differs from the bare loop is the engine. Memory is the most that torch allocated; the planner's is
trainers/plan_cluster.py's for the same step.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.bare import RATE, BareLoop
from cluster.configuration.config import load_config
from cluster.hardware.fleet import GPUS
from cluster.hardware.machine import this_host
from cluster.sessions.session import PROJECT
from trainers.engine.config import EngineConfig
from trainers.engine.engine import Engine
from trainers.model.backbone import build, build_hollow, initial_value
from trainers.model.shape import flops_per_token
from trainers.objectives.causal import causal_lm
from trainers.planning.cluster_plan import ClusterPlanConfig, Option, model_of, option_of

PRESET = PROJECT / "trainers" / "configs" / "gpt2-124m.yaml"
WAYS = ("bare", "0", "1", "1+eager", "1+serial", "2", "3", "1+recompute", "1+offload", "3+offload-all")
OFFLOADS = {"offload": "optimizer", "offload-all": "optimizer+parameters"}
WARMUP_STEPS = 3


@dataclass(frozen=True)
class Measured:
    tokens_per_second: float
    """By the median step."""
    bytes: int
    loss: float
    """Of the last step."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=PRESET, help="preset")
    parser.add_argument("--rows", type=int, default=64, help="rows of a step")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--ways", nargs="+", default=WAYS)
    arguments = parser.parse_args(argv)
    host = this_host()
    if host.device == "cpu":
        print("skipped: there is no GPU here")
        return
    gpu = next((gpu.name for gpu in GPUS.values() if gpu.device == host.device_name), "h100-80gb")
    given = ["--config", str(arguments.config), "--gpus", "1", "--gpu", gpu]
    given += ["--batch.rows_per_step", str(arguments.rows), "--optimizer.kind", "adamw"]
    config = load_config(ClusterPlanConfig, given, description="").config
    model, seq_len = model_of(config), config.batch.seq_len
    print(f"{host.device_name}; planned for {gpu}; {arguments.rows} rows of {seq_len:,} tokens a step\n")
    print("| way | tokens/s | of the bare loop | MFU | planned | memory | planned | loss |")
    print("|---|---|---|---|---|---|---|---|")
    bare, failed = None, []
    for way in arguments.ways:
        found = measure(config, way, arguments.steps)
        if found is None:
            print(f"| {way} | failed | | | | | | |", flush=True)
            failed.append(way)
            continue
        bare = found.tokens_per_second if way == "bare" else bare
        flops = found.tokens_per_second * flops_per_token(model, seq_len)
        print(
            f"| {way} | {found.tokens_per_second:,.0f} | "
            + (f"{found.tokens_per_second / bare:.2f}" if bare else "")
            + f" | {flops / GPUS[gpu].accelerator.bf16:.1%} | "
            + planned(config, way, found)
            + f" | {found.loss:.3f} |",
            flush=True,
        )
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def planned(config: ClusterPlanConfig, way: str, found: Measured) -> str:
    """The planner's speed, and its memory beside the one found."""
    gib = 1 << 30
    if way == "bare":
        return f"| {found.bytes / gib:.2f} GiB |"
    option = option_by(config, way)
    return (
        f"{option.tokens_per_second:,.0f} | {found.bytes / gib:.2f} GiB | {option.device_bytes / gib:.2f} GiB"
    )


def option_by(config: ClusterPlanConfig, way: str) -> Option:
    return option_of(config, engine_of(config, way))


def engine_of(config: ClusterPlanConfig, way: str) -> EngineConfig:
    stage, *added = way.split("+")
    own = {"zero_optimization": {"overlap_comm": False}} if "serial" in added else {}
    return replace(
        config.engine,
        zero_stage=int(stage),  # type: ignore[arg-type]
        micro_batch_rows=config.engine.rows_per_pass(config.batch.rows_per_step),
        activation_checkpointing="recompute" in added,
        offload=next((OFFLOADS[name] for name in added if name in OFFLOADS), "none"),  # type: ignore[arg-type]
        compile="eager" not in added,
        deepspeed={**config.engine.deepspeed, **own},
    )


def measure(config: ClusterPlanConfig, way: str, steps: int) -> Measured | None:
    """In a process of its own; None if it failed, which it has printed then."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "found.json")
        try:
            mp.start_processes(
                worker, args=(config, way, steps, folder, result), nprocs=1, start_method="spawn"
            )
        except mp.ProcessRaisedException as error:
            print(error, file=sys.stderr, flush=True)
            return None
        return Measured(**json.loads(result.read_text()))


def worker(rank: int, config: ClusterPlanConfig, way: str, steps: int, folder: str, result: Path) -> None:
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("nccl", f"file://{folder}/init", rank=rank, world_size=1)
    device = torch.device("cuda:0")
    model, batch, rows = model_of(config), config.batch, config.batch.rows_per_step
    size = config.engine.rows_per_pass(rows)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (rows, batch.seq_len + 1), generator=generator).to(device)
    weights, targets = torch.ones(size, device=device), rows * batch.seq_len

    def losses(model: Callable[..., Tensor]) -> Iterator[Tensor]:
        for micro in tokens.split(size):
            yield causal_lm(model, micro, weights, boundary_id=0).total / targets

    step = bare_step(config, device, losses) if way == "bare" else engine_step(config, way, losses)
    seconds: list[float] = []
    for _ in range(WARMUP_STEPS + steps):
        started = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - started)
    found = Measured(
        tokens_per_second=targets / statistics.median(seconds[WARMUP_STEPS:]),
        bytes=torch.cuda.max_memory_allocated(),
        loss=loss,
    )
    result.write_text(json.dumps(found.__dict__))
    dist.destroy_process_group()


Losses = Callable[[Callable[..., Tensor]], Iterable[Tensor]]


def bare_step(config: ClusterPlanConfig, device: torch.device, losses: Losses) -> Callable[[], float]:
    model = build(model_of(config), seed=0, dtype=torch.bfloat16).to(device)
    loop = BareLoop(model, config.optimizer, config.engine.gradient_clip)

    def step() -> float:
        kept: list[Tensor] = []
        loop.step(partial(keeping, losses, kept))
        return float(torch.stack(kept).sum())

    return step


def engine_step(config: ClusterPlanConfig, way: str, losses: Losses) -> Callable[[], float]:
    engine_config = engine_of(config, way)
    model = build_hollow(model_of(config))
    model.activation_checkpointing = engine_config.activation_checkpointing
    engine = Engine(
        model,
        engine_config,
        config.optimizer,
        lambda step: RATE / config.optimizer.learning_rate,
        micro_batches=config.batch.rows_per_step // engine_config.micro_batch_rows,
        values=partial(initial_value, model_of(config), 0),
    )

    def step() -> float:
        kept: list[Tensor] = []
        for loss in keeping(losses, kept, engine):
            engine.backward(loss)
        engine.step()
        return float(torch.stack(kept).sum())

    return step


def keeping(losses: Losses, kept: list[Tensor], model: Callable[..., Tensor]) -> Iterator[Tensor]:
    """The losses, each kept without its graph."""
    for loss in losses(model):
        kept.append(loss.detach())
        yield loss


if __name__ == "__main__":
    main()
