"""The plan's bytes of model state against what DeepSpeed holds, on two workers."""

import gc
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster.hardware.machine import EnergyConfig, Peak
from trainers.checkpoints.keeping import CheckpointConfig
from trainers.engine.config import EngineConfig
from trainers.engine.engine import Engine
from trainers.model.backbone import build
from trainers.model.shape import ModelConfig
from trainers.objectives.causal import causal_lm
from trainers.optim.optimizer import OptimizerConfig
from trainers.planning.plan import Job, memory_per_worker

WORKERS, MICRO_BATCHES, SEQ_LEN = 2, 2, 16
# Matrices are most of it, as in a model that needs a plan: what DeepSpeed pads is then far below a percent.
MODEL = ModelConfig(vocab_size=256, hidden_size=256, num_layers=8, num_heads=4, intermediate_size=704)
OPTIMIZER = OptimizerConfig(kind="adamw")
BUCKET = 200_000  # elements; stage 3 holds a bucket also between two steps
# Elements: DeepSpeed's default of stage3_param_persistence_threshold. Parameters up to this size stay whole on every
# worker, beside their partition. In a large model they are the norms alone, and the plan leaves them out.
PERSISTENT = 100_000


def engine_config(stage: int) -> EngineConfig:
    smaller = {"zero_optimization": {"reduce_bucket_size": BUCKET}}
    return EngineConfig(zero_stage=stage, precision="bf16", micro_batch_rows=1, deepspeed=smaller)  # type: ignore[arg-type]


def whole_bytes() -> int:
    """Of the parameters that stage 3 does not partition alone, in bfloat16."""
    sizes = [parameter.numel() for parameter in build(MODEL, 0).parameters()]
    return 2 * sum(size for size in sizes if size <= PERSISTENT)


def held_bytes() -> int:
    """Bytes of all tensors that are alive, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # as Ray Train sets it
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=WORKERS)
    for stage in range(4):
        before = held_bytes()
        engine = Engine(build(MODEL, 0), engine_config(stage), OPTIMIZER, lambda step: 1.0, MICRO_BATCHES)
        for _ in range(2):
            for _ in range(MICRO_BATCHES):
                tokens = torch.randint(0, MODEL.vocab_size, (1, SEQ_LEN + 1))
                loss = causal_lm(engine, tokens, torch.ones(1), 0, False).total
                engine.backward(loss / (WORKERS * MICRO_BATCHES * SEQ_LEN))
                del loss, tokens
            most = held_bytes() - before
            engine.step()
        Path(folder, f"{stage}-{rank}").write_text(str(most))
        del engine
        gc.collect()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    mp.spawn(measure, (str(folder),), nprocs=WORKERS)
    return lambda stage: int(Path(folder, f"{stage}-0").read_text())


@pytest.mark.cluster
@pytest.mark.parametrize("stage", range(4))
def test_planned_states_are_what_deepspeed_holds(measured, stage) -> None:
    job = Job(
        model=MODEL,
        engine=engine_config(stage),
        optimizer=OPTIMIZER,
        checkpoint=CheckpointConfig(),
        seq_len=SEQ_LEN,
        rows_per_step=WORKERS * MICRO_BATCHES,
        steps=1,
        num_workers=WORKERS,
        peak=Peak(1.0, ""),
        watts=1.0,
        energy=EnergyConfig(),
    )
    memory = memory_per_worker(job)
    held = measured(stage) - (memory.buckets + whole_bytes() if stage == 3 else 0)
    print(f"stage {stage}: {memory.states:,.0f} planned, {held:,.0f} held")
    assert memory.states == pytest.approx(held, rel=0.01)
