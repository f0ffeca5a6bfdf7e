"""Real DeepSpeed on gloo, against a loop of plain torch. Processes are started once per number of workers."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from tests.ray_nodes import free_ports
from trainers.checkpoints.state import StateSlice
from trainers.engine.config import EngineConfig, build_deepspeed_config
from trainers.engine.engine import Engine
from trainers.optim.optimizer import OptimizerConfig

VOCABULARY, WIDTH, ROWS, SEQ_LEN = 61, 24, 8, 9
SAVED, LAST = 3, 6
"""States are saved after SAVED steps; runs end after LAST."""


class Net(nn.Module):
    """Small, with sizes that no number of workers divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH + 1, bias=False)
        self.down = nn.Linear(2 * WIDTH + 1, WIDTH, bias=False)
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2

    def forward(self, rows: Tensor) -> Tensor:
        """Return the loss sum."""
        x = self.embed(rows[:, :-1])
        x = x + self.down(F.silu(self.up(x)))
        logits = self.lm_head(self.norm(x)).float().flatten(0, 1)
        return F.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum")


@dataclass(frozen=True)
class Case:
    """One run. `start` is the case whose saved state it continues from; `poison` a step whose loss is not
    finite."""

    workers: int
    stage: int
    micro_batches: int = 1
    kind: str = "muon"
    precision: str = "fp32"
    offload: str = "none"
    start: str = ""
    poison: int = -1
    refuse: int = -1
    compile: bool = False

    @property
    def name(self) -> str:
        marks = [
            self.kind,
            self.precision,
            self.offload.replace("+", "-"),
            self.start and f"after-{self.start}",
        ]
        marks += (
            ["poison"] * (self.poison >= 0) + ["refuse"] * (self.refuse >= 0) + ["compile"] * self.compile
        )
        return f"{self.workers}x{self.micro_batches}-stage{self.stage}-" + "-".join(filter(None, marks))


def optimizer_config(kind: str) -> OptimizerConfig:
    return OptimizerConfig(kind=kind, learning_rate=0.01, embedding_learning_rate=0.02)  # type: ignore[arg-type]


def rate_factor(step: int) -> float:
    return (step + 1) / LAST


def rows_of(step: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(step))


STAGES = (0, 1, 2, 3)
ALONE = [Case(1, s, micro_batches=4) for s in STAGES] + [
    *(Case(1, 1, kind=kind, micro_batches=2) for kind in ("adamw", "sgd", "rmsprop")),
    *(Case(1, s, precision="bf16") for s in STAGES),
]
PAIR = [
    *(Case(2, s, micro_batches=2 if s % 2 else 1) for s in STAGES),
    *(Case(2, s, kind="adamw") for s in STAGES),
    *(Case(2, 1, kind=kind) for kind in ("sgd", "rmsprop")),
    *(Case(2, s, precision="bf16", micro_batches=2) for s in STAGES),
    *(Case(2, s, offload="optimizer", micro_batches=2) for s in (1, 2, 3)),
    Case(2, 3, offload="optimizer+parameters"),
    *(Case(2, s, poison=2, precision=precision) for s in STAGES for precision in ("fp32", "bf16")),
    *(Case(2, s, poison=2, precision="bf16", micro_batches=2) for s in STAGES),
    *(Case(2, s, poison=2, precision="bf16", offload="optimizer") for s in (1, 2, 3)),
    *(Case(2, s, refuse=2) for s in STAGES),
    *(Case(2, s, start=Case(1, 3 - s, micro_batches=4).name) for s in STAGES),
    *(Case(2, s, start=Case(1, 3 - s, precision="bf16").name, precision="bf16") for s in STAGES),
]
AGAIN = [
    *(Case(1, s, start=Case(2, (s + 2) % 4, micro_batches=1 if s % 2 == 0 else 2).name) for s in STAGES),
    Case(1, 1, start=Case(2, 3, offload="optimizer+parameters").name, offload="optimizer"),
    *(Case(1, 1, start=Case(2, 1, kind=kind).name, kind=kind) for kind in ("adamw", "sgd", "rmsprop")),
    *(
        Case(1, s, start=Case(2, 3 - s, precision="bf16", micro_batches=2).name, precision="bf16")
        for s in STAGES
    ),
    Case(1, 1, compile=True),
]


class Saved:
    """A `StateSource` over the slices that all workers of a case wrote."""

    def __init__(self, folder: Path, name: str) -> None:
        self.step = SAVED
        self.tensors: dict[str, dict[str, Tensor]] = {}
        for part in saved_slices(folder, name):
            whole = self.tensors.setdefault(part.name, {}).setdefault(part.kind, torch.empty(part.shape))
            whole.view(-1)[part.start : part.start + len(part.data)] = part.data

    def kinds(self, name: str) -> tuple[str, ...]:
        return tuple(self.tensors[name])

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][kind].view(-1)[start:stop].clone()


def saved_slices(folder: Path, name: str) -> Iterator[StateSlice]:
    for path in sorted(folder.glob(f"{name}.slices-*")):
        for values in torch.load(path):
            yield StateSlice(*values)


def run_case(case: Case, folder: Path, rank: int) -> None:
    config = EngineConfig(
        zero_stage=case.stage,  # type: ignore[arg-type]
        offload=case.offload,  # type: ignore[arg-type]
        precision=case.precision,  # type: ignore[arg-type]
        micro_batch_rows=ROWS // case.workers // case.micro_batches,
        compile=case.compile,
    )
    engine = Engine(Net(), config, optimizer_config(case.kind), rate_factor, case.micro_batches)
    record: dict = {"losses": {}, "norms": {}, "skipped": {}, "weights": {}}
    if case.start:
        engine.load_state(Saved(folder, case.start))
    for step in range(engine.num_steps, LAST):
        if step == SAVED:
            slices = [(s.name, s.kind, s.shape, s.start, s.data.clone()) for s in engine.local_state()]
            torch.save(slices, folder / f"{case.name}.slices-{rank}")
            with engine.evaluating() as model:
                record["evaluated"] = sum_over_workers(model(rows_of(step)[rank :: case.workers]))
        total = torch.zeros(())
        for rows in rows_of(step)[rank :: case.workers].chunk(case.micro_batches):
            loss = engine(rows) / (ROWS * SEQ_LEN)
            total += loss.detach()
            engine.backward(loss * torch.nan if step == case.poison and rank == case.workers - 1 else loss)
        if step in (case.poison, case.refuse):
            record["weights"]["before"] = dict(engine.full_parameters())
        outcome = engine.step(lambda norm, refuse=step == case.refuse: not refuse)
        if step in (case.poison, case.refuse):
            record["weights"]["after"] = dict(engine.full_parameters())
        record["losses"][step] = sum_over_workers(total)
        record["norms"][step], record["skipped"][step] = outcome.grad_norm, outcome.skipped
    record["weights"]["end"] = dict(engine.full_parameters())
    torch.save(record, folder / f"{case.name}.record-{rank}")


def sum_over_workers(loss: Tensor) -> float:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item()


def worker(rank: int, cases: list[Case], folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # as Ray Train sets it
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=cases[0].workers)
    for case in cases:
        run_case(case, folder, rank)
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every case; each leaves a record of each worker."""
    folder = tmp_path_factory.mktemp("engine")
    for cases in (ALONE, PAIR, AGAIN):
        mp.spawn(worker, (cases, folder, *free_ports(1)), nprocs=cases[0].workers)
    return folder


def record_of(folder: Path, case: Case, rank: int = 0) -> dict:
    return torch.load(folder / f"{case.name}.record-{rank}")


def reference(kind: str) -> tuple[list[float], list[float]]:
    """Return losses and gradient norms of a plain loop over whole batches, with torch's own optimisers."""
    net, config = Net(), optimizer_config(kind)
    matrices = [net.up.weight, net.down.weight]
    plain = dict(lr=0.0, weight_decay=0.0)
    groups = [
        {"params": [net.embed.weight], "peak": 0.02, **plain},
        {"params": [net.norm.weight, net.lm_head.weight], "peak": 0.01, **plain},
    ]
    hidden = {"params": matrices, "peak": 0.01, "lr": 0.0, "weight_decay": 0.1}
    adamw = dict(betas=config.betas, eps=config.eps)
    if kind == "muon":
        optimizers = [
            torch.optim.AdamW(groups, **adamw),
            torch.optim.Muon([hidden | {"peak": config.muon_learning_rate}], momentum=config.momentum),
        ]
    elif kind == "adamw":
        optimizers = [torch.optim.AdamW([*groups, hidden], **adamw)]
    elif kind == "sgd":
        optimizers = [torch.optim.SGD([*groups, hidden], momentum=config.momentum, nesterov=True)]
    else:
        optimizers = [
            torch.optim.RMSprop([*groups, hidden], alpha=0.99, eps=config.eps, momentum=config.momentum)
        ]
    losses, norms = [], []
    for step in range(LAST):
        loss = net(rows_of(step)) / (ROWS * SEQ_LEN)
        loss.backward()
        losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), 1.0).item())
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_factor(step)
            optimizer.step()
            optimizer.zero_grad()
    return losses, norms


UNBROKEN = [case for case in (*ALONE, *PAIR, *AGAIN) if case.poison < 0 and case.refuse < 0]


def tolerance(case: Case) -> float:
    """Relative, of a loss."""
    if case.precision == "bf16":
        return 2**-8  # of the weights' 8 bits
    # Sums differ in their order alone. Muon rounds to bf16 before it iterates, where a last bit of float32
    # can turn over one of bf16.
    return 1e-5 if case.kind == "muon" else 2e-6


@pytest.mark.parametrize("stage", STAGES)
def test_own_keys_of_deepspeed_are_passed_through(stage: int) -> None:
    own = {"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    built = build_deepspeed_config(EngineConfig(zero_stage=stage, deepspeed=own), 1, on_gpu=False)  # type: ignore[arg-type]
    assert built["zero_optimization"]["reduce_bucket_size"] == 7
    assert built["zero_optimization"]["stage"] == stage
    assert built["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("own", "ours"),
    [
        ({"zero_optimization": {"stage": 2}}, "engine.zero_stage"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "engine.offload"),
        ({"bf16": {"enabled": True}}, "engine.precision"),
        ({"gradient_clipping": 1.0}, "engine.gradient_clip"),
        ({"optimizer": {"type": "Adam"}}, "optimizer.kind"),
        ({"gradient_accumulation_steps": 4}, "batch.rows_per_step"),
    ],
)
def test_a_key_of_deepspeed_that_we_decide_is_refused_with_both_names(own: dict, ours: str) -> None:
    (problem,) = EngineConfig(deepspeed=own).problems("engine")
    (key, value) = next(iter(own.items()))
    assert problem.startswith(f"engine.deepspeed.{key}") and ours in problem


def test_every_impossible_value_is_named() -> None:
    config = EngineConfig(
        zero_stage=0, offload="optimizer+parameters", micro_batch_rows=0, gradient_clip=-1.0
    )
    named = {problem.split("=")[0] for problem in config.problems("engine")}
    assert named == {"engine.micro_batch_rows", "engine.gradient_clip", "engine.offload"}


@pytest.mark.cluster
@pytest.mark.parametrize("case", UNBROKEN, ids=lambda case: case.name)
def test_losses_and_norms_are_those_of_a_plain_loop_at_any_stage_split_and_start(
    folder: Path, case: Case
) -> None:
    losses, norms = reference(case.kind)
    steps = range(SAVED if case.start else 0, LAST)
    record = record_of(folder, case)
    assert list(record["losses"]) == list(steps)
    assert record["losses"] == pytest.approx({s: losses[s] for s in steps}, rel=tolerance(case))
    assert record["norms"] == pytest.approx({s: norms[s] for s in steps}, rel=8 * tolerance(case))
    assert not any(record["skipped"].values())


@pytest.mark.cluster
def test_muon_goes_the_same_way_at_any_stage_split_and_start(folder: Path) -> None:
    cases = [case for case in UNBROKEN if (case.kind, case.precision) == ("muon", "fp32")]
    first = record_of(folder, cases[0])["losses"]
    for case in cases:
        losses = record_of(folder, case)["losses"]
        assert losses == pytest.approx({step: first[step] for step in losses}, rel=1e-5), case.name


@pytest.mark.cluster
@pytest.mark.parametrize("case", [c for c in UNBROKEN if not c.start], ids=lambda case: case.name)
def test_slices_of_all_workers_cover_each_tensor_exactly_once(folder: Path, case: Case) -> None:
    covered: dict[tuple[str, str], Tensor] = {}
    for part in saved_slices(folder, case.name):
        count = covered.setdefault((part.name, part.kind), torch.zeros(part.shape, dtype=torch.int).view(-1))
        count[part.start : part.start + len(part.data)] += 1
        assert part.data.dtype == torch.float32
    assert {name for name, _ in covered} == {name for name, _ in Net().named_parameters()}
    assert all((count == 1).all() for count in covered.values())
    expected = {"adamw": {"value", "exp_avg", "exp_avg_sq"}, "sgd": {"value", "momentum_buffer"}}
    assert {kind for name, kind in covered if name == "embed.weight"} == expected.get(
        case.kind, expected["adamw"] if case.kind == "muon" else {"value", "square_avg", "momentum_buffer"}
    )


@pytest.mark.cluster
@pytest.mark.parametrize("case", UNBROKEN, ids=lambda case: case.name)
def test_evaluation_gives_the_loss_that_training_gives_next(folder: Path, case: Case) -> None:
    record = record_of(folder, case)
    training = record["losses"][SAVED]
    assert record["evaluated"] / (ROWS * SEQ_LEN) == pytest.approx(training, rel=tolerance(case))


@pytest.mark.cluster
@pytest.mark.parametrize("case", [c for c in PAIR if c.poison >= 0 or c.refuse >= 0], ids=lambda c: c.name)
def test_a_refused_step_changes_nothing_and_training_goes_on(folder: Path, case: Case) -> None:
    records = [record_of(folder, case, rank) for rank in range(case.workers)]
    bad = max(case.poison, case.refuse)
    for record in records:
        assert record["skipped"] == {step: step == bad for step in range(LAST)}
        assert record["norms"] == records[0]["norms"]
        assert (record["norms"][bad] == torch.inf) == (case.poison >= 0)
    weights = records[0]["weights"]
    assert weights["before"].keys() == dict(Net().named_parameters()).keys()
    for name, before in weights["before"].items():
        assert torch.equal(before, weights["after"][name])
        assert torch.isfinite(weights["end"][name]).all()
        assert not torch.equal(before, weights["end"][name])
    assert records[1]["weights"]["end"] == {}
