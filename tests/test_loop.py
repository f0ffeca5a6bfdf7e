"""What the loop refuses to go on from, and what ends it early: the real loop on one worker, without Ray."""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster.configuration.config import load_config
from cluster.storage.uris import open_store
from data.order.order import Order
from data.rows.stream import StepRows
from data.shards.shards import read_fragment
from tests.token_corpus import BOUNDARY, put_token_corpus
from trainers.checkpoints.keeping import CheckpointConfig, best_name, latest_checkpoint
from trainers.checkpoints.state import VALUE, StateSlice
from trainers.checkpoints.writer import CheckpointWriter
from trainers.engine.collectives import Workers
from trainers.engine.engine import Engine
from trainers.evaluation.loss import Evaluation
from trainers.evaluation.selection import Selection
from trainers.model.backbone import build
from trainers.objectives.causal import Causal
from trainers.pretraining.config import PretrainConfig, model_of, run_store
from trainers.pretraining.loop import Parts, restore, train
from trainers.recovery.guard import Guard, TrainingDiverged, name_documents
from trainers.recovery.heartbeat import Heartbeat
from trainers.reporting.metrics import Meter, MetricsWriter, read_metrics, steps_of

SETTINGS = {
    "run.steps": 40,
    "batch.seq_len": 16,
    "batch.rows_per_step": 4,
    "order.lanes": 2,
    "model.hidden_size": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.intermediate_size": 32,
    "model.max_positions": 16,
    "engine.precision": "fp32",
    "engine.micro_batch_rows": 4,
    "checkpoint.every_steps": 100,
    "validation.every_steps": 2,
}


@pytest.mark.parametrize("key", ["manifest", "tokenizer", "order"])
def test_a_checkpoint_made_with_another_tokenizer_or_other_data_is_refused_by_name(key, tmp_path):
    identity = {"manifest": "m1", "tokenizer": "t1", "order": "o1"}
    store = open_store(str(tmp_path))
    with CheckpointWriter(store, CheckpointConfig(), rank=0, world_size=1, attempt=1) as writer:
        weight = StateSlice("norm.weight", VALUE, (4,), 0, torch.ones(4))
        writer.save(3, [weight], {"identity": identity, "guard": {}, "selection": {}})
    parts = SimpleNamespace(newest=latest_checkpoint(store), identity=identity | {key: "another"})
    with pytest.raises(ValueError, match=rf"step-00000003.*{key}: {identity[key]} there, another here"):
        restore(parts)


def test_the_record_of_the_best_step_is_written_again_if_it_was_cut_off_from_its_checkpoint(tmp_path):
    store = open_store(str(tmp_path))
    selection = Selection(best_step=3, best_loss=2.0, best_bits_per_byte=1.0, validated_step=3)
    with CheckpointWriter(store, CheckpointConfig(), rank=0, world_size=1, attempt=1) as writer:
        weight = StateSlice("norm.weight", VALUE, (4,), 0, torch.ones(4))
        writer.save(3, [weight], {"identity": {}, "guard": {}, "selection": selection.as_json()})
    parts = SimpleNamespace(
        newest=latest_checkpoint(store),
        identity={},
        asked=None,
        began=0.0,
        hardware={},
        run=store,
        engine=SimpleNamespace(load_state=lambda reader: None),
        guard=SimpleNamespace(load=lambda state: None),
        workers=SimpleNamespace(leads=True, world_size=1),
        metrics=None,
        heartbeat=SimpleNamespace(beat=lambda *_: None),
    )
    assert best_name(store) is None
    assert restore(parts) == (3, selection)
    assert best_name(store) == parts.newest.name


def rows_from(start: int, order: Order, corpus, manifest):
    """What the stream hands to one worker, read here."""
    for step in range(start, 10**6):
        rows = order.step_rows(step)
        tokens = np.stack(
            [
                read_fragment(corpus, manifest, int(fragment))[begin : begin + order.seq_len + 1]
                for fragment, begin in zip(rows.fragment, rows.start, strict=True)
            ]
        )
        ones = np.ones(len(rows), np.float32)
        yield StepRows(step, tokens, np.full(len(rows), -1, np.int8), ones, rows)


def run_once(config: PretrainConfig, losses: dict[int, float], attempt: int) -> dict[str, Any]:
    """Train from the newest checkpoint; how it ended. `losses`: what validation finds, by step."""
    run, corpus = run_store(config), open_store(config.corpus.prepared)
    manifest = put_token_corpus(corpus, {("train", "web"): 20}, fragment_tokens=120, vocab_size=60)
    order = Order(manifest, config.order, seq_len=16, rows_per_step=4)
    newest = latest_checkpoint(run)
    engine = Engine(
        build(model_of(config, manifest), 0), config.engine, config.optimizer, lambda _: 1.0, micro_batches=1
    )

    def documents(step: int) -> list[str]:
        rows = order.step_rows(step)
        return name_documents(corpus, manifest, rows.fragment, rows.start, 17)

    with ExitStack() as stack:
        heartbeat = stack.enter_context(Heartbeat(config.heartbeat, run, rank=0, attempt=attempt))
        parts = Parts(
            config=config,
            objective=Causal(BOUNDARY, document_mask=False),
            identity={"order": order.digest},
            asked=None,
            began=0.0,
            workers=Workers(),
            order=order,
            engine=engine,
            micro_batch_rows=4,
            stream=rows_from(newest.step if newest else 0, order, corpus, manifest),
            newest=newest,
            validate=lambda: Evaluation(losses[engine.num_steps], tokens=1, seconds=0.0),
            meter=Meter(flops_per_token=1.0, peak_flops_per_second=0.0),
            metrics=stack.enter_context(MetricsWriter(run, attempt)),
            writer=stack.enter_context(
                CheckpointWriter(run, config.checkpoint, rank=0, world_size=1, attempt=attempt)
            ),
            guard=Guard(config.guard, documents),
            heartbeat=heartbeat,
            run=run,
            stop_requested=lambda: False,
        )
        try:
            ending = train(parts)
        except TrainingDiverged as diverged:
            return {"diverged": str(diverged)}
        return {"step": ending.step, "best": ending.selection.best_step, "stopped": ending.stopped}


def work(rank: int, folder: str, cases: dict[str, tuple[dict[str, Any], dict[int, float]]]) -> None:
    """Run each case twice, as if its command were given again."""
    os.environ["LOCAL_RANK"] = str(rank)  # as Ray Train sets it
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=1)
    for name, (changes, losses) in cases.items():
        uris = {"corpus.uri": "raw", "corpus.prepared": f"{folder}/corpus", "run.storage": f"{folder}/runs"}
        settings = SETTINGS | uris | {"run.name": name} | changes
        arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        config = load_config(PretrainConfig, arguments, description="").config
        endings = [run_once(config, losses, attempt) for attempt in (1, 2)]
        Path(folder, f"{name}.json").write_text(json.dumps(endings))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of runs that one process trained."""
    folder = tmp_path_factory.mktemp("loop")
    falling = {step: 5 - step / 100 for step in range(1, 41)}
    worse_from_6 = falling | {step: 5.0 for step in range(6, 41)}
    cases = {
        "patient": ({"validation.patience": 3}, falling),
        "early": ({"validation.patience": 3, "checkpoint.every_steps": 1_000}, worse_from_6),
        "diverging": (
            {"optimizer.kind": "sgd", "optimizer.learning_rate": 1e30, "guard.max_skipped_in_a_row": 3},
            falling,
        ),
    }
    mp.spawn(work, (str(folder), cases), nprocs=1)
    return folder


def endings(folder: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((folder / f"{name}.json").read_text())


def trained_steps(folder: Path, name: str) -> list[int]:
    return [record["step"] for record in steps_of(read_metrics(open_store(f"{folder}/runs/{name}")))]


@pytest.mark.slow
def test_a_run_that_goes_on_improving_is_trained_to_its_last_step(folder):
    assert endings(folder, "patient") == [{"step": 40, "best": 40, "stopped": False}] * 2
    assert trained_steps(folder, "patient") == list(range(1, 41))


@pytest.mark.slow
def test_a_run_ends_after_as_many_validations_without_improvement_as_its_patience(folder):
    # Best at 4; 6, 8 and 10 are no better. The same command trains no step again, for the last one is saved too.
    assert endings(folder, "early") == [{"step": 10, "best": 4, "stopped": False}] * 2
    assert trained_steps(folder, "early") == list(range(1, 11))


@pytest.mark.slow
def test_a_run_whose_steps_are_all_refused_ends_and_names_the_documents(folder):
    first, again = (each["diverged"] for each in endings(folder, "diverging"))
    for message in (first, again):
        assert "guard.max_skipped_in_a_row=3" in message and "web-train-" in message
