"""Decoder and encoder under real DeepSpeed on gloo, two workers, against plain torch on the whole batch."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from data.rows.masking import Masking
from trainers.engine.config import EngineConfig
from trainers.engine.engine import Engine
from trainers.exported.bert import SWITCHES
from trainers.model.backbone import build, build_hollow, initial_value
from trainers.model.shape import ModelConfig
from trainers.objectives.causal import causal_lm
from trainers.objectives.masked import PADDING_SEGMENT, MaskedAndPairs
from trainers.objectives.objective import Term
from trainers.optim.optimizer import OptimizerConfig

WORKERS, ROWS, SEQ_LEN, STEPS = 2, 4, 40, 3
BOUNDARY = 5
UNUSED = Masking(None, None, BOUNDARY, mask_id=2)  # type: ignore[arg-type]  # the rows are made here
OPTIMIZER = OptimizerConfig(kind="adamw", learning_rate=0.01)


@dataclass(frozen=True)
class Case:
    stage: int
    tied: bool = False
    recompute: bool = False
    compile: bool = False
    masked: bool = False
    encoder: bool = False
    """As BERT, with a head for pairs."""

    @property
    def model(self) -> ModelConfig:
        size = ModelConfig(
            vocab_size=307,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=0 if self.encoder else 2,
            intermediate_size=48,
            tie_embeddings=self.tied,
            document_mask=self.masked,
        )
        return replace(size, **SWITCHES, num_token_types=2, pair_head=True) if self.encoder else size

    def __str__(self) -> str:
        flags = ("encoder", "tied", "recompute", "compile", "masked")
        marks = [name for name in flags if getattr(self, name)]
        return "-".join([f"stage{self.stage}", *marks])


CASES = [
    *(Case(stage) for stage in range(4)),
    *(Case(stage, tied=True, masked=True) for stage in (1, 3)),
    *(Case(stage, recompute=True) for stage in (1, 3)),
    Case(3, tied=True, recompute=True),
    *(Case(stage, tied=True, compile=True) for stage in (1, 3)),
    Case(3, recompute=True, compile=True),
    *(Case(stage, tied=True, encoder=True) for stage in (0, 3)),
]


def rows_of(step: int) -> torch.Tensor:
    return torch.randint(307, (ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(step))


def loss_of(case: Case, model: Any, step: int, share: slice) -> torch.Tensor:
    """A share of the rows' part of the global mean."""
    rows = rows_of(step)[share]
    if not case.encoder:
        total = causal_lm(model, rows, torch.ones(len(rows)), BOUNDARY, case.masked).total
        return total / (ROWS * SEQ_LEN)
    generator = torch.Generator().manual_seed(step)
    made = {
        "tokens": rows_of(step)[:, 1:],
        "segments": torch.where(torch.arange(SEQ_LEN) < 33, 0, PADDING_SEGMENT).expand(ROWS, -1),
        "types": (torch.arange(SEQ_LEN) > 17).long().expand(ROWS, -1),
        "slots": torch.randint(33, (ROWS, 6), generator=generator),
        "targets": torch.randint(307, (ROWS, 6), generator=generator),
        "weights": torch.ones(ROWS, 6),
        "labels": torch.arange(ROWS) % 2,
        "label_weights": torch.ones(ROWS),
    }
    aim = MaskedAndPairs(UNUSED, sep_id=1, document_mask=False, pairs=Term("next_sentence"), seed=0)
    return aim.loss(model, {name: each[share] for name, each in made.items()}, [ROWS * 6, ROWS]).total


def losses_of(case: Case, rank: int) -> list[float]:
    """The global mean loss before each step."""
    config = EngineConfig(
        zero_stage=case.stage,  # type: ignore[arg-type]
        precision="fp32",
        gradient_clip=0.0,
        micro_batch_rows=ROWS // WORKERS,
        compile=case.compile,
    )
    model = build_hollow(case.model)
    model.activation_checkpointing = case.recompute

    def value_of(name: str, shape: torch.Size) -> torch.Tensor:
        held = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
        assert case.stage < 3 or held < 1_000, f"{held} bytes of a model that nobody should have whole"
        return initial_value(case.model, 0, name, shape)

    engine = Engine(model, config, OPTIMIZER, lambda step: 1.0, micro_batches=1, values=value_of)
    losses = []
    for step in range(STEPS):
        loss = loss_of(case, engine, step, slice(rank, None, WORKERS))
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
        loss = loss_of(case, model, step, slice(None))
        assert found == pytest.approx(loss.item(), rel=2e-5), f"step {step}"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
