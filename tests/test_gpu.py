"""What needs a GPU: NCCL, memory of a device, kernels; skipped where there is none. One GPU is enough."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from task_files import put_backbone, put_lines, put_task, sentences

from cluster.sessions.session import PROJECT
from cluster.storage.uris import open_store
from tests.small_run import (
    STEPS,
    SmallRun,
    put_corpus,
    steps_by_number,
    training_workers,
    wait_for_step,
)
from tests.unbroken import expected_digests
from trainers.engine.config import EngineConfig
from trainers.engine.engine import Engine
from trainers.model.backbone import build
from trainers.model.shape import ModelConfig
from trainers.objectives.causal import causal_lm
from trainers.optim.optimizer import OptimizerConfig
from trainers.reporting.metrics import events_of, read_attempts

pytestmark = pytest.mark.usefixtures("gpu")
MODEL = ModelConfig(
    vocab_size=307, hidden_size=64, num_layers=3, num_heads=2, intermediate_size=96, max_positions=64
)
OPTIMIZER = OptimizerConfig(kind="adamw", learning_rate=0.01)
ROWS, SEQ_LEN, UPDATES = 4, 64, 4
SERIAL = {"zero_optimization": {"overlap_comm": False}}
WAYS = {
    **{f"stage{stage}": {"zero_stage": stage} for stage in range(4)},
    "compiled": {"zero_stage": 1, "compile": True},
    "stage3-compiled": {"zero_stage": 3, "compile": True},
    "stage1-offload": {"zero_stage": 1, "offload": "optimizer"},
    "stage3-offload": {"zero_stage": 3, "offload": "optimizer+parameters"},
    **{f"stage{stage}-serial": {"zero_stage": stage, "deepspeed": SERIAL} for stage in (1, 2, 3)},
}


def rows_of(step: int) -> torch.Tensor:
    return torch.randint(307, (ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(step))


def train(rank: int, folder: str) -> None:
    """The losses of each way, by NCCL with this worker alone, as a file."""
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("nccl", f"file://{folder}/init", rank=0, world_size=1)
    found: dict[str, list[float]] = {}
    for way, settings in WAYS.items():
        config = EngineConfig(precision="fp32", gradient_clip=0.0, micro_batch_rows=2, **settings)  # type: ignore[arg-type]
        engine = Engine(build(MODEL, 0), config, OPTIMIZER, lambda step: 1.0, micro_batches=2)
        assert engine.device.type == "cuda"
        found[way] = []
        for step in range(UPDATES):
            total = 0.0
            for micro in rows_of(step).to(engine.device).split(2):
                loss = causal_lm(engine, micro, torch.ones(2, device=engine.device), boundary_id=0).total
                engine.backward(loss / (ROWS * SEQ_LEN))
                total += loss.item() / (ROWS * SEQ_LEN)
            engine.step()
            found[way].append(total)
        engine.close()
    Path(folder, "losses.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory, gpu: None) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("gpu")
    mp.spawn(train, (str(folder),), nprocs=1)
    return json.loads((folder / "losses.json").read_text())


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_train_gives_on_the_gpu_the_losses_of_plain_torch_on_the_cpu(losses, way):
    model = build(MODEL, 0)
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    groups = [
        {"params": matrices, "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in model.parameters() if all(p is not q for q in matrices)], "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=OPTIMIZER.learning_rate, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps
    )
    for step, found in enumerate(losses[way]):
        loss = causal_lm(model, rows_of(step), torch.ones(ROWS), boundary_id=0).total / (ROWS * SEQ_LEN)
        assert found == pytest.approx(loss.item(), rel=1e-4), f"step {step}"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_run_on_a_gpu_loses_no_row_when_its_worker_dies_and_its_model_speaks(tmp_path):
    run = SmallRun(str(tmp_path), tmp_path / "log.txt")
    put_corpus(open_store(f"{tmp_path}/raw"))
    store = open_store(f"{tmp_path}/runs").child("pretrain")
    gpu = {"cluster__num_workers": 1, "cluster__gpus_per_worker": 1, "engine__precision": "bf16"}
    driver = run.start(**gpu, engine__zero_stage=3)
    wait_for_step(store, 25, driver)
    for worker in training_workers(driver.pid):
        worker.send_signal(signal.SIGKILL)
    wait_for_step(store, 60, driver)
    driver.send_signal(signal.SIGTERM)  # saves and ends
    assert run.finish(driver) == 0, run.output()[-4000:]
    # The rest otherwise: what was saved at one stage goes on at another.
    assert run.finish(run.start(**gpu, engine__zero_stage=1, engine__compile=True)) == 0, run.output()[-4000:]

    steps = steps_by_number(store)
    digests = [steps[step]["digest"] for step in range(1, STEPS + 1)]
    assert digests == expected_digests(run, range(1, STEPS + 1), **gpu)
    starts = events_of(read_attempts(store), "start")
    assert len(starts) == 3
    assert all("NVIDIA" in start["device"] for start in starts)
    assert store.exists("test.json")
    assert float(steps[STEPS]["loss"]) < 0.9 * float(steps[1]["loss"])
    said = entry(
        "generate", "--model", f"{tmp_path}/runs/pretrain/export", "--prompt", "The ", "--max-new-tokens", "8"
    )
    assert said.startswith("The ")


def test_a_task_is_learned_asked_and_predicted_on_the_gpu(tmp_path):
    uri = put_lines(tmp_path / "records.jsonl", sentences(400))
    prompt = {"template": "{text}\nThis is", "answers": {"good": "fine", "bad": "bad"}}
    put_task(tmp_path / "task.yaml", name="t", kind="classification", data={"uri": uri}, prompt=prompt)
    put_backbone(tmp_path / "model")
    task = ["--run.task", f"{tmp_path}/task.yaml", "--run.name", "t", "--run.storage", f"{tmp_path}/runs"]
    schedule = ["--batch.min_steps", "120", "--batch.rows_per_step", "16", "--batch.epochs", "1"]
    schedule += ["--optimizer.learning_rate", "0.01", "--cluster.gpus_per_worker", "1"]
    entry("finetune", *task, "--backbone.uri", f"{tmp_path}/model", *schedule)
    seed = tmp_path / "runs" / "t" / "seed-0"
    assert json.loads((seed / "test.json").read_text())["metrics"]["accuracy"] > 0.8
    entry(
        "predict", "--model", f"{seed}/export", "--input", f"{tmp_path}/records.jsonl",
        "--output", f"{tmp_path}/answers", "--gpus-per-worker", "1",
    )  # fmt: skip
    answers = [
        line for path in (tmp_path / "answers").glob("*.jsonl") for line in path.read_text().splitlines()
    ]
    assert len(answers) == 400
    told = entry(
        "evaluate", "--model", f"{tmp_path}/model", "--task", f"{tmp_path}/task.yaml",
        "--prepared", f"{tmp_path}/prepared", "--max-rows", "20",
    )  # fmt: skip
    assert "accuracy" in told


def entry(name: str, *arguments: str) -> str:
    """What a command of the project prints."""
    command = [sys.executable, str(PROJECT / "trainers" / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout
