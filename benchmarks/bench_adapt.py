"""What adapting costs over the bare model: a fine-tuning step, answers through Ray Data, a trial of Ray Tune.

    python benchmarks/bench_adapt.py [--steps 30] [--records 40000] [--trials 3]
    python benchmarks/bench_adapt.py --hashing

A 4-layer decoder of width 128 with initial weights, float32, one thread in everything; speeds are ratios within one
run, of the lower quartiles of steps and of parts. The bare loop is the same model, batches and optimiser with nothing
around. The bare model answers the same records from a list: encode, the model on batches of like lengths, argmax. Ray's
start is told apart from its rate. A trial's overhead is the sweep's wall time less the trials' seconds of training, by
their number: of one worker, which trains in the trial's process, and of two, which are a Ray Train run of their own.

`--hashing` measures what hashing a backbone costs: once in the command, and once in each process that loads it, as a
trial does. The hash is of the very bytes that are loaded, so it is not kept by the file's size and times; 14 GB are a
model of 7 billion parameters in bfloat16.
"""

import argparse
import hashlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the project's folder leads, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from rich.console import Console
from task_files import put_lines, put_task, sentences, small_tokenizer

from cluster.configuration.config import from_dict
from cluster.hardware.machine import CPU_ALLOCATOR
from cluster.sessions.session import ray_session
from cluster.sessions.workers import ClusterConfig
from cluster.storage.uris import Store, open_store
from trainers.exported.folder import export, load_exported
from trainers.exported.model_digest import content_digest, hashed
from trainers.exported.model_files import WEIGHTS
from trainers.finetuning.batches import RecordOrder
from trainers.finetuning.config import FinetuneConfig, absolute
from trainers.finetuning.run import finetune
from trainers.model.backbone import build
from trainers.model.shape import ModelConfig
from trainers.optim.optimizer import build_optimizer
from trainers.prediction.pieces import PART_ROWS
from trainers.prediction.rows import pieces_of, rows_of
from trainers.reporting.metrics import read_metrics
from trainers.tasks.encoding import Encoder, collate, framed
from trainers.tasks.export import load_task_model
from trainers.tasks.heads import TaskModel, loss_sum
from trainers.tasks.splits import PreparedTask, prepare_task
from trainers.tasks.task import load_task
from tune.search.config import SweepRunConfig
from tune.search.space import parse_space
from tune.sweeps.phases import search
from tune.trials.finetuning import FinetuneTrials
from tune.trials.records import read_trials

WARMUP_STEPS = 5
ROWS = 16
ANSWERED_ROWS = 64
SHAPE = ModelConfig(
    vocab_size=512, hidden_size=128, num_layers=4, num_heads=4, intermediate_size=352, max_positions=128
)

SAMPLE_SHAPE = ModelConfig(
    vocab_size=4_096, hidden_size=384, num_layers=6, num_heads=6, intermediate_size=1_024, max_positions=512
)
LARGER_SHAPE = ModelConfig(
    vocab_size=4_096,
    hidden_size=1_024,
    num_layers=24,
    num_heads=16,
    intermediate_size=2_816,
    max_positions=512,
)
"""Of 0.3 billion parameters, in layers like those of larger models."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30, help="of fine-tuning")
    parser.add_argument(
        "--records", type=int, default=40_000, help="to be answered; 12,288 to 65,536: parts of one piece"
    )
    parser.add_argument("--trials", type=int, default=3, help="of the sweep")
    parser.add_argument("--hashing", action="store_true", help="only what hashing a backbone costs")
    options = parser.parse_args(argv)
    if not 3 * PART_ROWS <= options.records <= 16 * PART_ROWS:
        parser.error(f"--records {options.records} is not between {3 * PART_ROWS} and {16 * PART_ROWS}")
    torch.set_num_threads(1)
    if options.hashing:
        hashing_costs()
        return
    with tempfile.TemporaryDirectory() as folder:
        config, prepared = put_parts(Path(folder), options.steps)
        print("| what | bare | system | |\n|---|---|---|---|")
        system = system_step(config, prepared)
        bare = bare_step(config, prepared)
        print(
            f"| fine-tuning step, ms | {bare * 1e3:.1f} | {system * 1e3:.1f} | {bare / system:.2f} of the bare speed |"
        )
        put_lines(
            Path(folder, "texts.jsonl"), [{"text": r["text"]} for r in sentences(options.records, seed=9)]
        )
        bare, system, start = prediction_rates(Path(folder))
        print(
            f"| answers, records/s | {bare:,.0f} | {system:,.0f} | {system / bare:.2f} of the bare rate, after "
            f"{start:.1f} s of start |"
        )
        for workers in (1, 2):
            wall, trained = sweep_seconds(config, prepared, Path(folder), options.trials, workers)
            print(
                f"| sweep of {options.trials} trials of {workers} workers, s | {trained:.1f} in training | "
                f"{wall:.1f} in all | {(wall - trained) / options.trials:.1f} s of overhead a trial |"
            )


def hashing_costs() -> None:
    """Print CPU seconds of loading two backbones without and with their hash, and of the hash alone."""
    print(
        "| backbone | loading, s | and hashing, s | | hash alone, s/GB | of 14 GB, s |\n|---|---|---|---|---|---|"
    )
    for shape in (SAMPLE_SHAPE, LARGER_SHAPE):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer, source = small_tokenizer(), open_store(folder)
            named = build(shape, seed=1).named_parameters()
            export(
                dict(named),
                shape,
                tokenizer.json.encode(),
                tokenizer.boundary_id,
                source,
                dtype=torch.bfloat16,
            )
            gigabytes = source.size(WEIGHTS) / 1e9
            rounds = [loading_seconds(source) for _ in range(6)]
        plain, with_hash, alone = (min(seconds) for seconds in zip(*rounds, strict=True))
        print(
            f"| {gigabytes * 1e3:,.0f} MB | {plain:.3f} | {with_hash:.3f} | {with_hash / plain - 1:+.0%} | "
            f"{alone / gigabytes:.2f} | {14 * alone / gigabytes:.1f} |"
        )


def loading_seconds(source: Store) -> tuple[float, float, float]:
    """CPU seconds of loading a model, of loading and hashing it, and of hashing its weights alone."""
    times = [time.process_time()]
    load_exported(source)
    times.append(time.process_time())
    with_hash = hashed(source)
    load_exported(with_hash)
    with_hash.digest()
    times.append(time.process_time())
    content = source.read(WEIGHTS)
    read = time.process_time()
    hashlib.blake2b(content, digest_size=16)
    return times[1] - times[0], times[2] - times[1], time.process_time() - read


def put_parts(folder: Path, steps: int) -> tuple[FinetuneConfig, PreparedTask]:
    """A backbone, a task and a configuration that trains `steps` steps and validates once."""
    tokenizer, model = small_tokenizer(), build(SHAPE, seed=1)
    backbone = open_store(str(folder / "backbone"))
    export(dict(model.named_parameters()), SHAPE, tokenizer.json.encode(), tokenizer.boundary_id, backbone)
    uri = put_lines(folder / "records.jsonl", sentences(600))
    task = put_task(folder / "task.yaml", name="t", kind="classification", data={"uri": uri})
    content = {
        "run": {
            "task": task,
            "storage": str(folder / "runs"),
            "name": "f",
            "prepared": str(folder / "prepared"),
        },
        "backbone": {"uri": backbone.uri},
        "batch": {"rows_per_step": ROWS, "min_steps": steps, "max_steps": steps},
        "engine": {"precision": "fp32", "zero_stage": 0, "micro_batch_rows": ROWS},
        "validation": {"times": 1, "max_rows": 32},
        "cluster": {"address": "local", "threads_per_worker": 1},
    }
    config = absolute(from_dict(FinetuneConfig, content))
    return config, prepare_task(load_task(task), open_store(config.run.prepared))


def system_step(config: FinetuneConfig, prepared: PreparedTask) -> float:
    """Seconds of a step, by the run's own records."""
    finetune(config, prepared=prepared)
    records = read_metrics(open_store(f"{config.run.storage}/{config.run.name}/seed-0"))
    return calm([r["step_seconds"] for r in records if "step_seconds" in r][WARMUP_STEPS:])


def bare_step(config: FinetuneConfig, prepared: PreparedTask) -> float:
    """Seconds of forward pass, backward pass and update on the same batches."""
    exported = load_exported(open_store(config.backbone.uri))
    tokenizer, pad = framed(exported.tokenizer, exported.boundary_id, causal=True)
    encoded = Encoder(prepared.task, tokenizer, pad, SHAPE.max_positions, True, True).encode(
        prepared.read("train")
    )
    model = TaskModel(exported.model, prepared.task, config.adapt, seed=0).train()
    optimizer = build_optimizer(
        ((n, p) for n, p in model.named_parameters() if p.requires_grad), config.optimizer
    )
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    order = RecordOrder([len(row.ids) for row in encoded], ROWS, 0)
    seconds = []
    for step in range(config.batch.max_steps):
        started = time.perf_counter()
        batch = collate(prepared.task, [encoded[index] for index in order.rows(step)], pad)
        scores = model(batch.tokens_BT, batch.mask_BT, batch.types_BT)
        assert batch.targets is not None  # of records with labels
        loss = loss_sum(prepared.task.kind, scores, batch.targets, batch.mask_BT, None) / ROWS
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.engine.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return calm(seconds[WARMUP_STEPS:])


def prediction_rates(folder: Path) -> tuple[float, float, float]:
    """Records/s of the bare model and through Ray Data, and the seconds from Ray's start to its first answer."""
    from trainers.prediction.job import answer

    model, texts = f"file://{folder}/runs/f/seed-0/export", str(folder / "texts.jsonl")
    (piece,) = pieces_of(texts)  # one model answers it part by part, as each piece of a job
    everything: list[Any] = [record for _, record in rows_of(piece, ("id", "text"))]
    lists = [
        [record["text"] for record in everything[at : at + PART_ROWS]]
        for at in range(0, len(everything) - PART_ROWS + 1, PART_ROWS)
    ]
    os.environ.update(CPU_ALLOCATOR)  # the bare model's process starts with it, as the job's do
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        seconds = process.submit(bare_seconds, model, lists).result()
    output = open_store(str(folder / "answers"))
    options = argparse.Namespace(
        workers=1, cpus_per_worker=1.0, gpus_per_worker=0.0, rows_per_batch=ANSWERED_ROWS, max_new_tokens=64
    )
    began = time.time()
    with ray_session(ClusterConfig(address="local")):
        answer([piece], model, content_digest(open_store(model), of_task=True), output.uri, options)
    times = sorted(
        (folder / "answers" / info.path).stat().st_mtime
        for info in output.list()
        if info.path.endswith(".jsonl")
    )
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    gaps = gaps[: len(lists) - 1]  # the last part has fewer records
    return PART_ROWS / calm(seconds), PART_ROWS / calm(gaps), times[0] - began


@torch.inference_mode()
def bare_seconds(model_uri: str, lists: Sequence[Sequence[str]]) -> list[float]:
    """Seconds in which the bare model labels the texts of each list; the first one warms up."""
    torch.set_num_threads(1)
    model, encoder = load_task_model(open_store(model_uri))
    tokenizer, pad = encoder.tokenizer, encoder.pad_id
    seconds = []
    for texts in [lists[0], *lists]:
        started, labels = time.perf_counter(), list[int]()
        encoded = sorted((encoding.ids for encoding in tokenizer.encode_batch(list(texts))), key=len)
        for at in range(0, len(encoded), ANSWERED_ROWS):
            rows = encoded[at : at + ANSWERED_ROWS]
            lengths = torch.tensor([len(row) for row in rows])
            longest = int(lengths.max())
            tokens_BT = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
            mask_BT = torch.arange(longest) < lengths[:, None]
            labels += model(tokens_BT, mask_BT, torch.zeros_like(tokens_BT)).argmax(-1).tolist()
        seconds.append(time.perf_counter() - started)
        assert len(labels) == len(texts)
    return seconds[1:]


def sweep_seconds(
    config: FinetuneConfig, prepared: PreparedTask, folder: Path, trials: int, workers: int
) -> tuple[float, float]:
    """Seconds of a sweep from Ray's being up to its end, and those of its trials' steps."""
    store = open_store(str(folder / f"sweep-{workers}"))
    # Of a fraction of a CPU each: two fit on any machine, and no other work is there to be kept apart.
    config = replace(
        config, cluster=replace(config.cluster, num_workers=workers, cpus_per_worker=1 / workers)
    )
    space = parse_space({"optimizer.learning_rate": {"loguniform": [1e-4, 1e-3]}}, config)
    settings = SweepRunConfig(trials=trials, best=1, seeds=1, search="random", scheduler="none")
    with ray_session(replace(config.cluster, address="local")):
        started = time.perf_counter()
        search(
            settings, FinetuneTrials(config, prepared), store, space,
            first_seed=0, concurrent=1, measure=prepared.task, console=Console(quiet=True),
        )  # fmt: skip
        wall = time.perf_counter() - started
    trained = 0.0
    for trial in read_trials(store):
        records = read_metrics(store.child(f"trials/{trial.name}/seed-0"))
        trained += sum(r.get("step_seconds", 0.0) for r in records)
    return wall, trained


def calm(seconds: Sequence[float]) -> float:
    """The lower quartile: what other work on the machine has slowed least."""
    return sorted(seconds)[len(seconds) // 4]


if __name__ == "__main__":
    main()
