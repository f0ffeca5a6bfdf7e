"""Laws of the list of objectives: what differs between kinds is asked of the kind, to the end of a run and after it."""

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console

from cluster.configuration.config import load_config
from cluster.console.errors import ConfigError
from cluster.storage.uris import open_store
from data.order.order import Order
from tests.test_framing import PROSE, tokenizer
from tests.test_loop import SETTINGS, rows_from
from tests.token_corpus import put_text_corpus
from trainers.checkpoints.writer import CheckpointWriter
from trainers.engine.collectives import Workers
from trainers.engine.engine import Engine
from trainers.evaluation.verdict import EXPORT
from trainers.exported.folder import load_exported
from trainers.exported.reading import Reader
from trainers.model.backbone import build
from trainers.objectives.causal import Causal
from trainers.objectives.kinds import OBJECTIVES, ObjectiveConfig, ObjectiveKind, objective_of
from trainers.objectives.objective import Inputs, RowBatch
from trainers.pretrain import close
from trainers.pretraining.baselines import BASELINES
from trainers.pretraining.closing import Conclusion
from trainers.pretraining.config import PretrainConfig, model_of, run_store
from trainers.pretraining.loop import Parts, train
from trainers.pretraining.run_folder import is_finished, write_start
from trainers.pretraining.worker import Data, conclude, evaluate_split
from trainers.recovery.guard import Guard
from trainers.recovery.heartbeat import Heartbeat
from trainers.reporting.metrics import Meter, MetricsWriter


class EverySecondRow(Causal):
    """An objective that hides no token and is not the causal one."""

    def inputs(self, batch: RowBatch) -> Inputs:
        found = super().inputs(batch)
        weights = found["weights"].copy()
        weights[1::2] = 0
        return found | {"weights": weights}

    def global_targets(self, rows_per_step: int, seq_len: int) -> None:
        return None


TOY = ObjectiveKind(
    EverySecondRow, lambda config, tokens: EverySecondRow(tokens.boundary_id, tokens.document_mask)
)


def work(rank: int, folder: str) -> None:
    """Train with the toy to the report on one worker, without Ray, and make the report once more."""
    OBJECTIVES["toy"] = TOY
    os.environ["LOCAL_RANK"] = str(rank)  # as Ray Train sets it
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=1)
    corpus = open_store(f"{folder}/corpus")
    texts = {"train": PROSE[:60], "validation": PROSE[60:90], "test": PROSE[90:120]}
    manifest = put_text_corpus(corpus, texts, tokenizer(), fragment_tokens=1_000)
    settings = SETTINGS | {
        "corpus.uri": "raw", "corpus.prepared": corpus.uri, "run.storage": f"{folder}/runs", "run.steps": 4,
        "objective.kind": "toy", "validation.max_rows": 8, "run.floor_bytes": 10_000,
    }  # fmt: skip
    config = load_config(
        PretrainConfig,
        [part for key, value in settings.items() for part in (f"--{key}", str(value))],
        description="",
    ).config
    run, workers = run_store(config), Workers()
    order = Order(manifest, config.order, seq_len=16, rows_per_step=4)
    write_start(run, config, manifest, "plan")
    engine = Engine(
        build(model_of(config, manifest), 0), config.engine, config.optimizer, lambda _: 1.0, micro_batches=1
    )
    objective = objective_of(
        config.objective, tokenizer().json.encode(), boundary_id=manifest.boundary_id, document_mask=False
    )
    data = Data(corpus, manifest, order)
    with ExitStack() as stack:
        heartbeat = stack.enter_context(Heartbeat(config.heartbeat, run, rank=0, attempt=1))
        parts = Parts(
            config=config,
            objective=objective,
            identity={},
            asked=None,
            began=0.0,
            workers=workers,
            order=order,
            engine=engine,
            micro_batch_rows=4,
            stream=rows_from(0, order, corpus, manifest),
            newest=None,
            validate=lambda: evaluate_split(
                config, data, "validation", 8, workers, engine, objective, heartbeat
            ),
            meter=Meter(flops_per_token=1.0, peak_flops_per_second=0.0),
            metrics=stack.enter_context(MetricsWriter(run, 1)),
            writer=stack.enter_context(
                CheckpointWriter(run, config.checkpoint, rank=0, world_size=1, attempt=1)
            ),
            guard=Guard(config.guard),
            heartbeat=heartbeat,
            run=run,
            stop_requested=lambda: False,
        )
        conclude(parts, data, train(parts).step)
    with Path(folder, "out.txt").open("w") as out:
        for _ in range(2):  # the same command again
            close(config, Console(file=out), Conclusion(run))
    dist.destroy_process_group()


@pytest.mark.slow
def test_an_objective_that_hides_no_token_is_trained_to_its_report(tmp_path: Path, monkeypatch) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=1)
    run = open_store(f"{tmp_path}/runs/pretrain")
    assert is_finished(run) and run.exists("report.html") and run.exists("floor.json")
    assert not run.exists(BASELINES), "nothing was hidden that counting could find"
    exported = load_exported(run.child(EXPORT))
    assert exported.objective == "toy"
    monkeypatch.setitem(OBJECTIVES, "toy", TOY)
    with pytest.raises(ValueError, match=r"objective\.kind=toy"):
        Reader(exported)
    assert Reader(replace(exported, objective=None))


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_kind_tells_before_it_is_made_whether_it_hides_tokens(kind: str) -> None:
    made = objective_of(
        ObjectiveConfig(kind=kind), tokenizer().json.encode(), boundary_id=0, document_mask=False
    )
    assert type(made) is OBJECTIVES[kind].objective
    assert made.hides_tokens == ObjectiveConfig(kind=kind).hides_tokens == (kind != "causal")


def test_an_objective_that_could_not_answer_in_the_end_is_refused_when_it_is_made(monkeypatch) -> None:
    class HidesButCannotSayHow(Causal):
        hides_tokens = True

    made = HidesButCannotSayHow(0, False)
    monkeypatch.setitem(OBJECTIVES, "half", ObjectiveKind(HidesButCannotSayHow, lambda *_: made))
    with pytest.raises(TypeError, match="HidesButCannotSayHow, which is no Masks"):
        objective_of(ObjectiveConfig(kind="half"), b"", boundary_id=0, document_mask=False)


@pytest.mark.parametrize("shape", [[], ["--model.attention", "bidirectional"]])
def test_an_unknown_kind_is_one_line_with_the_nearest(shape: list[str]) -> None:
    given = ["--corpus.uri", "raw", "--corpus.prepared", "prepared", *shape]
    with pytest.raises(ConfigError) as refused:
        load_config(PretrainConfig, [*given, "--objective.kind", "maskd"], description="")
    [line] = refused.value.problems
    assert line.startswith('objective.kind="maskd"') and "nearest: masked" in line
