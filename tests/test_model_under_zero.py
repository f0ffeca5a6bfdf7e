"""The decoder under real DeepSpeed on gloo, two workers, against plain torch on the whole batch."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trainers.causal import causal_lm
from trainers.engine import Engine, EngineConfig
from trainers.model import build
from trainers.optimizer import OptimizerConfig
from trainers.shape import ModelConfig

WORKERS, ROWS, SEQ_LEN, STEPS = 2, 4, 40, 3
BOUNDARY = 5
OPTIMIZER = OptimizerConfig(kind="adamw", learning_rate=0.01)


@dataclass(frozen=True)
class Case:
    stage: int
    tied: bool = False
    recompute: bool = False
    compile: bool = False
    masked: bool = False

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=307,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            intermediate_size=48,
            tie_embeddings=self.tied,
            document_mask=self.masked,
        )

    def __str__(self) -> str:
        marks = [name for name in ("tied", "recompute", "compile", "masked") if getattr(self, name)]
        return "-".join([f"stage{self.stage}", *marks])


CASES = [
    *(Case(stage) for stage in range(4)),
    *(Case(stage, tied=True, masked=True) for stage in (1, 3)),
    *(Case(stage, recompute=True) for stage in (1, 3)),
    Case(3, tied=True, recompute=True),
    *(Case(stage, tied=True, compile=True) for stage in (1, 3)),
]


def rows_of(step: int) -> torch.Tensor:
    return torch.randint(307, (ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(step))


def losses_of(case: Case, rank: int) -> list[float]:
    """The global mean loss before each step."""
    config = EngineConfig(
        zero_stage=case.stage,  # type: ignore[arg-type]
        precision="fp32",
        gradient_clip=0.0,
        micro_batch_rows=ROWS // WORKERS,
        compile=case.compile,
    )
    model = build(case.model, seed=0, activation_checkpointing=case.recompute)
    engine = Engine(model, config, OPTIMIZER, lambda step: 1.0, micro_batches=1)
    losses = []
    for step in range(STEPS):
        rows = rows_of(step)[rank::WORKERS]
        loss = causal_lm(engine, rows, torch.ones(len(rows)), BOUNDARY, case.masked).total / (ROWS * SEQ_LEN)
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # as Ray Train sets it
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=WORKERS)
    found = {}
    for case in CASES:
        torch._dynamo.reset()
        found[str(case)] = losses_of(case, rank)
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("zero")
    mp.spawn(work, (str(folder),), nprocs=WORKERS)
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.cluster
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_stage_gives_the_losses_of_plain_torch(losses, case):
    model = build(case.model, seed=0)
    decayed = [p for p in model.layers.parameters() if p.dim() == 2]
    groups = [
        {"params": decayed, "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in model.parameters() if all(p is not q for q in decayed)], "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=OPTIMIZER.learning_rate, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps
    )
    for step, found in enumerate(losses[str(case)]):
        loss = causal_lm(model, rows_of(step), torch.ones(ROWS), BOUNDARY, case.masked).total / (
            ROWS * SEQ_LEN
        )
        assert found == pytest.approx(loss.item(), rel=2e-5), f"step {step}"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
