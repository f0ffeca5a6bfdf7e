"""Every kind of file that the project reads back: folders made by its own writers, and what reads each file of them."""

import argparse
import io
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from task_files import BERT, put_backbone
from test_prepare import one_by_one, text_of

from cluster.configuration.config import from_dict
from cluster.storage.uris import Store, open_store
from data.preparing.assemble import existing_manifest
from data.preparing.corpus import prepare
from data.reading.raw_shards import CorpusConfig
from data.reading.splits import SplitConfig
from data.shards.manifest import read_manifest
from data.tokens.tokenizer import TokenizerConfig, load_tokenizer, read_tokenizer
from tests.small_finetune import config as finetune_config
from tests.small_finetune import put_place, run_of
from trainers.checkpoints.keeping import (
    CheckpointConfig,
    checkpoint_at,
    claim_attempt,
    latest_attempt,
    latest_checkpoint,
    latest_world_size,
)
from trainers.checkpoints.reader import CheckpointReader
from trainers.checkpoints.state import StateSlice
from trainers.checkpoints.writer import CheckpointWriter
from trainers.evaluation.selection import Selection, record_best
from trainers.evaluation.verdict import claim_test_split, record_verdict
from trainers.exported.folder import load_exported
from trainers.exported.model_digest import content_digest
from trainers.finetuning.backbone import backbone_digest, load_backbone, make_encoder, read_facts
from trainers.finetuning.config import absolute
from trainers.finetuning.end import chosen_model, conclude, keep_chosen, read_chosen
from trainers.finetuning.job import FinetuneOrder, write_start
from trainers.finetuning.loop import Choice, Progress
from trainers.finetuning.report import write_task_report
from trainers.finetuning.run import check_unchanged as check_finetune
from trainers.finetuning.run import finetune
from trainers.prediction import job as prediction_job
from trainers.prediction.pieces import Counts, Predictor, finished_pieces
from trainers.prediction.rows import pieces_of
from trainers.pretraining import run_folder
from trainers.pretraining.closing import write_floor, write_samples
from trainers.pretraining.config import PretrainConfig
from trainers.recovery.heartbeat import Heartbeat
from trainers.recovery.lease import lease
from trainers.recovery.stopping import FAILURE, raise_final
from trainers.reporting.goodput import goodput_of
from trainers.reporting.metrics import MetricsWriter, merge_metrics, read_attempts, read_metrics
from trainers.reporting.page import write_report
from trainers.reporting.progress import Status, Tail
from trainers.reporting.results import CONCLUDED, read_run, results_table
from trainers.stored.metric_records import METERED
from trainers.tasks.export import load_task_model
from trainers.tasks.heads import TaskModel
from trainers.tasks.splits import prepare_task
from trainers.tasks.task import load_task
from tune.curves.label_curve import LabelEfficiencyConfig, value_of
from tune.curves.pretraining_text import pretraining_text
from tune.search.config import SweepConfig
from tune.search.space import Dimension, SearchSpace
from tune.sweeps.finalists import finalists_before, record_searched
from tune.sweeps.folder import pin
from tune.sweeps.judgement import claim_judgement, refuse_after_judgement
from tune.sweeps.page import write_sweep_report
from tune.trials.records import TrialRecord, read_trials, record_outcome, record_start, trial_name

NEVER = 1e6
CHECKPOINT = "step-00000020-w1-a2"


@dataclass(frozen=True)
class Kind:
    """A kind of stored file, and all that reads it."""

    name: str
    folder: str
    """Which of `FOLDERS` holds it."""
    path: str
    """Of the file that is damaged; a pattern takes the first that fits."""
    read: Callable[[Path], Any]
    weight: float = 1.0
    """Of the cases, where reading takes long."""


# --- a prepared corpus ---


def corpus_config(folder: Path, **changes: Any) -> CorpusConfig:
    settings: dict[str, Any] = {
        "uri": str(folder / "raw"),
        "prepared": str(folder / "prepared"),
        "fragment_tokens": 256,
        "splits": SplitConfig(validation=0.2, test=0.2),
        "tokenizer": TokenizerConfig(vocab_size=300),
    }
    return CorpusConfig(**settings | changes)


def put_corpus(folder: Path) -> None:
    """Two pieces of work (the tests set PIECE_BYTES to 1) of 30 documents, one of them broken."""
    raw = open_store(str(folder / "raw"))
    for name, start in (("a", 0), ("b", 20)):
        lines = [json.dumps({"id": f"{name}{n}", "text": text_of(n)}) for n in range(start, start + 30)]
        raw.put(f"{name}.jsonl", "\n".join(lines).encode())
    prepare(corpus_config(folder), fan_out=one_by_one)


def whole_manifest(folder: Path) -> str:
    """Preparing what is prepared: reads the record of the inputs, the manifest, and the listing."""
    found = existing_manifest(corpus_config(folder))
    if found is None:
        found = prepare(corpus_config(folder), fan_out=one_by_one)
    return found.digest


def prepared_anew(folder: Path) -> str:
    """Preparing from finished pieces: reads the record of each."""
    for path in (folder / "prepared" / "pieces").glob("inputs-*"):
        path.unlink()
    return prepare(corpus_config(folder), fan_out=one_by_one).digest


def tokenized_anew(folder: Path) -> str:
    """Preparing with other fragments: reads the hashes and the duplicates of pieces, too."""
    for path in (folder / "prepared" / "pieces").glob("inputs-*"):
        path.unlink()
    for path in (folder / "prepared" / "pieces").glob("duplicates-*.json"):
        path.unlink()
    for path in (folder / "prepared" / "pieces").glob("tokens-*"):
        path.unlink()
    return prepare(corpus_config(folder), fan_out=one_by_one).digest


def manifest_of(folder: Path) -> str:
    store = open_store(str(folder / "prepared"))
    return read_manifest(store).digest


def tokenizer_of(folder: Path) -> str:
    store = open_store(str(folder / "prepared"))
    manifest = read_manifest(store)
    read_tokenizer(store, manifest.tokenizer)
    return load_tokenizer(store, manifest.tokenizer, TokenizerConfig.boundary).fingerprint


# --- a pretraining run ---


def pretrain_config(folder: Path) -> PretrainConfig:
    model = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64, "max_positions": 64}
    return from_dict(
        PretrainConfig,
        {
            "run": {"storage": str(folder / "runs"), "name": "r", "steps": 20, "floor_bytes": 4_096},
            "corpus": {
                "uri": str(folder / "raw"),
                "prepared": str(folder / "prepared"),
                "fragment_tokens": 256,
                "splits": {"validation": 0.2, "test": 0.2},
                "tokenizer": {"vocab_size": 300},
            },
            "batch": {"seq_len": 16, "rows_per_step": 4},
            "model": model,
        },
    )


def pretrain_run(folder: Path) -> Store:
    return open_store(str(folder / "runs")).child("r")


def put_run(folder: Path) -> None:
    """A finished run of 20 steps in two attempts on a prepared corpus, without its weights."""
    put_corpus(folder)
    config, run = pretrain_config(folder), pretrain_run(folder)
    manifest = read_manifest(open_store(config.corpus.prepared))
    run_folder.write_start(run, config, manifest, "tokens       20 steps")
    for first, last in ((0, 12), (10, 20)):
        attempt, now = claim_attempt(run, 2), itertools.count(1_700_000_000 + first).__next__
        with MetricsWriter(run, attempt, NEVER, now=now) as writer:
            put_metrics(writer, first, last)
        put_checkpoint(run, 10 * attempt, attempt)
    merge_metrics(run)
    with lease(run):
        pass
    record_best(run, Selection(20, 4.0, 2.0, 20), CHECKPOINT)
    claim_test_split(run, CHECKPOINT)
    found = {
        "loss": 4.0,
        "tokens": 640,
        "seconds": 1.0,
        "bits_per_byte": 1.9,
        "perplexity": 54.0,
        "bytes": 900,
    }
    record_verdict(run, {"step": 20, "checkpoint": CHECKPOINT, **found})
    write_floor(run, config, manifest)
    settings = {"max_new_tokens": 9, "temperature": 0.8, "top_p": 0.95, "seed": 0}
    run.put("samples.json", json.dumps([{"prompt": "a", "continuation": "b", "settings": settings}]).encode())
    counted = {"masked_loss": 5.0, "masked_accuracy": 0.1}
    run.put(
        "baselines.json", json.dumps({"fitted_tokens": 99, "validation": counted, "test": counted}).encode()
    )
    run.put(CONCLUDED, b"[[1700000000.0, 1700000090.5], [1700000100.0, 1700000130.0]]")
    run.put(FAILURE, "too many steps were skipped: é".encode())


def put_metrics(writer: MetricsWriter, first: int, last: int) -> None:
    writer.write(
        {"step": first, "event": "start", "world_size": 2, "watts": 50.0, "began": 1.7e9, "asked": 1.7e9}
    )
    for step in range(first + 1, last + 1):
        measured = {
            "loss": 4.0,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens": 64,
            "memory_bytes": 2**30,
            "mfu": 0.2,
        }
        times = {"step_seconds": 0.5, "data_wait_seconds": 0.02, "checkpoint_stall_seconds": 0.1}
        writer.write(
            {"step": step, **measured, **times, "tokens_per_second": 128.0, "epoch": 0, "digest": "0f"}
        )
    found = {"loss": 4.0, "bits_per_byte": 2.0, "perplexity": 54.6, "seconds": 1.0, "tokens": 64, "bytes": 9}
    writer.write({"step": last, "validation": found | {"masked_accuracy": 0.25}})
    writer.write({"step": last, "event": "skipped", "reason": "loss", "documents": ["plays/<one>"]})
    writer.write({"step": last, "event": "checkpoint", "name": CHECKPOINT, "best": True})


def put_checkpoint(run: Store, step: int, attempt: int) -> None:
    state = StateSlice("embed.weight", "value", (4, 3), 0, torch.arange(12.0))
    with CheckpointWriter(
        run, CheckpointConfig(file_bytes=2 << 20), rank=0, world_size=1, attempt=attempt
    ) as writer:
        writer.save(step, [state], {"manifest": "5f3a", "selection": {"best_step": step}})


def page_of_run(folder: Path) -> Any:
    """The report, the table of results, and the driver's view."""
    run = pretrain_run(folder)
    write_report(run)
    console = Console(file=io.StringIO(), width=120)
    console.print(results_table(read_run(run)))
    return console.file.getvalue()


def followed(folder: Path) -> Any:
    """What the driver shows while a run goes on, and its accounts."""
    run, status = pretrain_run(folder), Status(20)
    told = [status.absorb(record) for record in Tail(run, whole=True, needed=METERED).poll()]
    read_metrics(run)
    return [*told, status.line(), goodput_of(read_attempts(run, METERED))]


def started_again(folder: Path) -> Any:
    """What the same command does first."""
    run, config = pretrain_run(folder), pretrain_config(folder)
    pinned = run_folder.pinned_manifest(run)
    run_folder.check_unchanged(run, config)
    return read_manifest(open_store(config.corpus.prepared), pinned or "latest").digest


def run_and_page(folder: Path) -> Any:
    return started_again(folder), page_of_run(folder)


def config_of_run(folder: Path) -> Any:
    return started_again(folder), pretraining_text(f"{pretrain_run(folder).uri}/export"), page_of_run(folder)


def best_of_run(folder: Path) -> Any:
    run = pretrain_run(folder)
    return checkpoint_at(run, "best").name, page_of_run(folder)


def claimed_test(folder: Path) -> Any:
    run = pretrain_run(folder)
    run.delete("test.json")
    claim_test_split(run, CHECKPOINT)
    return None


def newest_attempt(folder: Path) -> Any:
    run = pretrain_run(folder)
    found = latest_attempt(run), latest_world_size(run)
    assert claim_attempt(run, 3) > found[0]
    return found


def driven(folder: Path) -> Any:
    with lease(pretrain_run(folder), lambda line: None, patience=0.0):
        return None


def final_failure(folder: Path) -> Any:
    try:
        raise_final(pretrain_run(folder))
    except RuntimeError as failed:
        return str(failed)


def samples_again(folder: Path) -> Any:
    return write_samples(pretrain_run(folder), pretrain_config(folder)), page_of_run(folder)


def newest_checkpoint(folder: Path) -> Any:
    run = pretrain_run(folder)
    record = latest_checkpoint(run)
    assert record is not None, "both are refused"
    return CheckpointReader(run, record).load_full("embed.weight", "value").tolist()


# --- a fine-tuning run ---


def finetune_order(folder: Path, name: str) -> FinetuneOrder:
    config = absolute(finetune_config(folder, name))
    prepared = prepare_task(load_task(config.run.task), open_store(config.run.prepared))
    return FinetuneOrder(config, prepared, 0, backbone_digest(config))


def put_finetuning(folder: Path) -> None:
    """A finished run, one that was cut off after training, and what a curve's linear model came to."""
    put_place(folder)
    for name in ("finished", "cut"):
        order, run = finetune_order(folder, name), run_of(folder, name)
        exported = load_backbone(order.config, 0)
        encoder = make_encoder(order.config, order.prepared.task, exported)
        model = TaskModel(exported.model, order.prepared.task, order.config.adapt, 0)
        write_start(run, order)
        with MetricsWriter(run, claim_attempt(run), NEVER) as writer:
            writer.write({"step": 0, "event": "start", "world_size": 1, "checkpoint": None})
            writer.write({"step": 6, "loss": 1.0, "lr": 1e-3, "grad_norm": 1.0, "tokens": 9, "step_seconds": 0.5,
                          "tokens_per_second": 18.0})  # fmt: skip
            writer.write(
                {"step": 6, "validation": {"accuracy": 0.5, "macro_f1": 0.5, "loss": 1.0, "score": 0.5}}
            )
        weights = {key: value.detach() for key, value in model.named_parameters()}
        choice = Choice(6, 0.5, 0, {"accuracy": 0.5, "macro_f1": 0.5, "loss": 1.0})
        chosen = keep_chosen(order, run, Progress(6, choice, weights), 300, 40, encoder)
        if name == "finished":
            conclude(order, run, chosen, Heartbeat(order.config.heartbeat, run, rank=0, attempt=1))
    value_of(curve_config(folder), order.prepared, curve_store(folder), "majority", 10, 0)
    run_of(folder, "finished").put("test.claim.json", b'{"checkpoint": "step-00000006"}')


def curve_store(folder: Path) -> Store:
    return open_store(str(folder / "curve"))


def curve_config(folder: Path) -> LabelEfficiencyConfig:
    return LabelEfficiencyConfig(base=finetune_config(folder, "of-a-curve"))


def finetuned_again(folder: Path) -> Any:
    """The same command on a finished run."""
    order = finetune_order(folder, "finished")
    found = finetune(order.config, prepared=order.prepared, alone=True)
    return found.seeds, found.values("validation"), found.values("test")


def task_page(folder: Path) -> Any:
    return write_task_report(run_of(folder, "finished"), finetune_order(folder, "finished").prepared)


def origin_and_config(folder: Path) -> Any:
    order = finetune_order(folder, "finished")
    return check_finetune(run_of(folder, "finished"), order.config, order.prepared, order.backbone)


def chosen_before(folder: Path) -> Any:
    order, run = finetune_order(folder, "cut"), run_of(folder, "cut")
    chosen = read_chosen(order, run)
    return chosen and asdict(chosen)


def chosen_weights(folder: Path) -> Any:
    order, run = finetune_order(folder, "cut"), run_of(folder, "cut")
    model = chosen_model(order, run, load_backbone(order.config, 0), 6)
    return sum(parameter.sum().item() for parameter in model.parameters())


def prepared_task(folder: Path) -> Any:
    prepared = finetune_order(folder, "finished").prepared
    return prepared.counts, prepared.left_out, prepared.read("train"), prepared.read_test()


def task_model(folder: Path) -> Any:
    model, encoder = load_task_model(run_of(folder, "finished").child("export"))
    return encoder.max_tokens, len(list(model.parameters()))


def curve_value(folder: Path) -> Any:
    prepared = finetune_order(folder, "finished").prepared
    return value_of(curve_config(folder), prepared, curve_store(folder), "majority", 10, 0)


def backbone_facts(folder: Path) -> Any:
    config = finetune_config(folder, "facts", backbone={"uri": str(folder / "llama")})
    return backbone_digest(config) and read_facts(config).shape, load_backbone(config, 0).boundary_id


# --- a sweep ---

SPACE = SearchSpace((Dimension("optimizer.learning_rate", "uniform", (1e-3, 1e-1), {}),))


def sweep_config() -> SweepConfig:
    return from_dict(
        SweepConfig,
        {
            "sweep": {"trials": 4, "storage": "sweeps"},
            "base": {"run": {"task": "t.yaml"}, "backbone": {"uri": "model"}},
            "space": {"optimizer.learning_rate": {"uniform": [1e-3, 1e-1]}},
        },
    )


def sweep_store(folder: Path) -> Store:
    return open_store(str(folder / "sweep"))


def put_sweep(folder: Path) -> None:
    store = sweep_store(folder)
    pin(store, sweep_config(), {"task": "t1", "metric": "accuracy"})
    claim_judgement(store, {"optimizer.learning_rate": 0.01})
    for number in (1, 2, 3):
        point = {"optimizer.learning_rate": number / 100}
        record = TrialRecord(trial_name(point, 0), point, 0, number)
        record_start(store, record)
        if number < 3:
            ended = {
                "status": "finished",
                "score": 0.5 + number / 10,
                "metrics": {"accuracy": 0.6},
                "seconds": 2.0,
            }
            record_outcome(store, TrialRecord(record.name, point, 0, number, **ended))
    record_searched(store, sweep_config().sweep)


def sweep_again(folder: Path) -> Any:
    store = sweep_store(folder)
    refuse_after_judgement(store, sweep_config().sweep)
    pin(store, sweep_config(), {"task": "t1", "metric": "accuracy"})
    claim_judgement(store, {"optimizer.learning_rate": 0.01})
    finalists_before(store, sweep_config().sweep, 0)
    return None


@dataclass(frozen=True)
class Accuracy:
    judged_by: str = "accuracy"
    name: str = "t"

    def oriented(self, score: float) -> float:
        return score


def trials_again(folder: Path) -> Any:
    store = sweep_store(folder)
    trials = read_trials(store)
    write_sweep_report(store, SPACE, [], None, Accuracy())
    return trials


# --- answers ---


def answer_options(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(
        model=f"{run_of(folder, 'finished').uri}/export", input=str(folder / "records.jsonl"),
        output=str(folder / "answers"), max_new_tokens=4, rows_per_batch=64,
    )  # fmt: skip


def put_answers(folder: Path) -> None:
    put_finetuning(folder)
    options = answer_options(folder)
    model = open_store(options.model)
    digest = content_digest(model, of_task=True)
    prediction_job.pin(open_store(options.output), model, digest, options, pieces_of(options.input))
    predictor = Predictor(options.model, options.output, 64, 1, 4)
    for piece in pieces_of(options.input):
        list(predictor.answer(piece))


def answered_again(folder: Path) -> Any:
    options = answer_options(folder)
    output = open_store(options.output)
    model = open_store(options.model)
    prediction_job.pin(output, model, content_digest(model, of_task=True), options, pieces_of(options.input))
    finished = finished_pieces(output)
    return sum(finished.values(), Counts())


PREDICTORS: dict[str, Predictor] = {}


def parts_again(folder: Path) -> Any:
    """The piece is not finished, its parts are there."""
    options = answer_options(folder)
    for path in (folder / "answers" / "finished").iterdir():
        path.unlink()
    key = str(folder)
    if key not in PREDICTORS:
        PREDICTORS[key] = Predictor(options.model, options.output, 64, 1, 4)
    for piece in pieces_of(options.input):
        list(PREDICTORS[key].answer(piece))
    return finished_pieces(open_store(options.output))


# --- exports ---


def put_exports(folder: Path) -> None:
    put_backbone(folder / "llama")
    put_backbone(folder / "bert", BERT)


def exported(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        found = load_exported(open_store(str(folder / name)))
        return found.boundary_id, found.model.config

    return read


FOLDERS: dict[str, Callable[[Path], None]] = {
    "corpus": put_corpus,
    "run": put_run,
    "finetuning": put_finetuning,
    "sweep": put_sweep,
    "answers": put_answers,
    "exports": put_exports,
}

KINDS = (
    Kind("inputs of a preparation", "corpus", "prepared/pieces/inputs-*.json", whole_manifest),
    Kind("survey of a piece", "corpus", "prepared/pieces/survey-*.json", prepared_anew),
    Kind("duplicates of a range", "corpus", "prepared/pieces/duplicates-*.json", prepared_anew),
    Kind("token shards of a piece", "corpus", "prepared/pieces/tokens-*.json", prepared_anew),
    Kind("trained tokenizer", "corpus", "prepared/pieces/tokenizer-*.json", prepared_anew),
    Kind("hashes of a piece", "corpus", "prepared/pieces/hashes-*.parquet", tokenized_anew),
    Kind("duplicates of a range, in full", "corpus", "prepared/pieces/duplicates-*.parquet", tokenized_anew),
    Kind("newest manifest's name", "corpus", "prepared/manifests/latest", manifest_of),
    Kind("manifest", "corpus", "prepared/manifests/*.parquet", manifest_of),
    Kind("tokenizer of a corpus", "corpus", "prepared/tokenizers/*/tokenizer.json", tokenizer_of),
    Kind("configuration of a run", "run", "runs/r/config.yaml", config_of_run, 0.3),
    Kind("manifest of a run", "run", "runs/r/manifest.json", run_and_page, 0.5),
    Kind("environment", "run", "runs/r/environment.json", page_of_run, 0.5),
    Kind("plan", "run", "runs/r/plan.txt", page_of_run, 0.2),
    Kind("best checkpoint's name", "run", "runs/r/best.json", best_of_run, 0.5),
    Kind("verdict", "run", "runs/r/test.json", page_of_run, 0.5),
    Kind("claim on the test split", "run", "runs/r/test.claim.json", claimed_test),
    Kind("floor", "run", "runs/r/floor.json", page_of_run, 0.5),
    Kind("baselines", "run", "runs/r/baselines.json", page_of_run, 0.5),
    Kind("samples", "run", "runs/r/samples.json", samples_again, 0.5),
    Kind("conclusions", "run", "runs/r/concluded.json", page_of_run, 0.3),
    Kind("segment of the metrics", "run", "runs/r/metrics/00000010-2.jsonl", page_of_run, 0.5),
    Kind("segment of the metrics, followed", "run", "runs/r/metrics/00000000-1.jsonl", followed, 2.0),
    Kind("number of an attempt", "run", "runs/r/attempts/00002", newest_attempt),
    Kind("lease", "run", "runs/r/drivers/00000001.json", driven),
    Kind("failure for good", "run", "runs/r/failure.txt", final_failure),
    Kind("result", "finetuning", "runs/finished/seed-0/result.json", finetuned_again, 0.3),
    Kind("result on the page", "finetuning", "runs/finished/seed-0/result.json", task_page, 0.2),
    Kind("answers on the page", "finetuning", "runs/finished/seed-0/answers.jsonl", task_page, 0.2),
    Kind("fine-tuning's configuration", "finetuning", "runs/finished/seed-0/config.yaml", origin_and_config, 0.2),
    Kind("fine-tuning's origin", "finetuning", "runs/finished/seed-0/origin.json", origin_and_config, 0.3),
    Kind("what was chosen", "finetuning", "runs/cut/seed-0/chosen.json", chosen_before, 0.3),
    Kind("prepared task", "finetuning", "prepared/t-*/task.json", prepared_task, 0.3),
    Kind("records of a prepared task", "finetuning", "prepared/t-*/test.jsonl", prepared_task, 0.3),
    Kind("point of a curve", "finetuning", "curve/*.json", curve_value, 0.3),
    Kind("sweep's origin", "sweep", "sweep/origin.json", sweep_again, 0.5),
    Kind("sweep's configuration", "sweep", "sweep/config.yaml", sweep_again, 0.2),
    Kind("judged point", "sweep", "sweep/judged.json", sweep_again, 0.5),
    Kind("end of a search", "sweep", "sweep/searched.json", sweep_again, 0.2),
    Kind("trial's start", "sweep", "sweep/trials/*/trial.json", trials_again, 0.2),
    Kind("trial's outcome", "sweep", "sweep/trials/*/outcome.json", trials_again, 0.2),
    Kind("job of answers", "answers", "answers/predict.json", answered_again),
    Kind("finished piece of answers", "answers", "answers/finished/*", answered_again),
    Kind("part of answers", "answers", "answers/*.jsonl", parts_again, 0.5),
    Kind("commit record", "run", f"runs/r/checkpoints/{CHECKPOINT}/COMMIT.json", newest_checkpoint),
    Kind("part of a checkpoint", "run", f"runs/r/checkpoints/{CHECKPOINT}/*.safetensors", newest_checkpoint),
    Kind("chosen weights", "finetuning", "runs/cut/seed-0/best/*.safetensors", chosen_weights, 0.2),
    Kind("task of a model", "finetuning", "runs/finished/seed-0/export/task.json", task_model),
    Kind("task model's configuration", "finetuning", "runs/finished/seed-0/export/config.json", task_model),
    Kind("task model's tokenizer", "finetuning", "runs/finished/seed-0/export/tokenizer.json", task_model, 0.3),
    Kind("task model's weights", "finetuning", "runs/finished/seed-0/export/*.safetensors", task_model, 0.5),
    Kind("backbone's configuration", "exports", "llama/config.json", backbone_facts, 0.5),
    Kind("export's configuration", "exports", "llama/config.json", exported("llama")),
    Kind("export's weights", "exports", "llama/model.safetensors", exported("llama"), 0.5),
    Kind("export's tokenizer", "exports", "llama/tokenizer.json", exported("llama"), 0.3),
    Kind("encoder's configuration", "exports", "bert/config.json", exported("bert"), 0.5),
)  # fmt: skip
