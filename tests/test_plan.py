from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.configuration.config import load_config
from cluster.hardware.machine import EnergyConfig, Peak
from cluster.sessions.session import PROJECT
from cluster.storage.uris import open_store
from data.order.order import Order
from tests.token_corpus import put_token_corpus
from trainers.checkpoints.keeping import CheckpointConfig
from trainers.engine.config import EngineConfig
from trainers.model.backbone import Backbone
from trainers.model.shape import ModelConfig
from trainers.optim.optimizer import OptimizerConfig
from trainers.planning.checks import job_of, plan_of
from trainers.planning.plan import (
    COMPILER_BYTES,
    Job,
    activation_bytes,
    filled_share,
    make_plan,
    memory_per_worker,
    rows_per_worker,
    state_elements,
)
from trainers.pretraining.config import PretrainConfig

MODEL = ModelConfig(vocab_size=1_000, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128)
PARAMETERS = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64 + 2 * 1_000 * 64  # 210,240
# Of a chunk of 128 tokens logits, their logarithms in float32 and their gradient; gradients of the head in float32.
LOSS = 128 * 1_000 * (2 + 4 + 2) + 64 * 1_000 * 4
JOB = Job(
    model=MODEL,
    engine=EngineConfig(zero_stage=1, precision="bf16", micro_batch_rows=4),
    optimizer=OptimizerConfig(kind="adamw"),
    checkpoint=CheckpointConfig(every_steps=100, keep_last=2, file_bytes=2 << 20),
    seq_len=128,
    rows_per_step=16,
    steps=1_000,
    num_workers=2,
    train_tokens=1_024_000,
    peak=Peak(1e12, "a data sheet"),
    watts=400,
    energy=EnergyConfig(overhead=1.0, grams_per_kwh=500),
)


def test_rows_that_do_not_come_out_even_make_more_passes_of_fewer_rows_as_in_the_run():
    engine = EngineConfig(micro_batch_rows=8)
    assert (engine.rows_per_pass(16), engine.rows_per_pass(13), engine.rows_per_pass(12)) == (8, 1, 6)
    job = replace(JOB, engine=engine, rows_per_step=26)  # 13 rows of each worker
    assert make_plan(job).micro_batches == 13


def test_the_plan_equals_the_computation_by_hand():
    plan = make_plan(JOB)
    assert plan.tokens == 1_000 * 16 * 128 == 2_048_000
    assert plan.epochs == pytest.approx(2.0)
    assert plan.micro_batches == 2  # 8 rows of a worker in fours
    weights = PARAMETERS - 5 * 64 - 1_000 * 64  # norms and embedding multiply no matrix
    flops_per_token = 6 * weights + 12 * 2 * 64 * 128
    assert plan.flops == pytest.approx(plan.tokens * flops_per_token)
    assert plan.seconds == pytest.approx(plan.flops / (2 * 1e12 * 0.40))
    assert plan.energy.kwh == pytest.approx(400 * plan.seconds / 3.6e6)
    assert plan.energy.co2_grams == pytest.approx(plan.energy.kwh * 500)
    assert plan.checkpoint_bytes == 4 * 3 * PARAMETERS  # weights and two moments in float32
    assert plan.kept_checkpoints == 3


def test_memory_equals_the_computation_by_hand():
    memory = make_plan(JOB).memory
    assert memory.parameters == 2 * PARAMETERS
    assert memory.gradients == 2 * PARAMETERS + 4 * PARAMETERS  # of a micro-batch, and their sum in float32
    assert memory.buckets == 2 * 50e6 * 4  # of sums in float32; one travels while another is filled
    assert memory.optimizer == 12 * PARAMETERS / 2
    assert memory.checkpoint_buffers == 4 << 20  # 1.26 MB in files of 2 MiB, which hold 1 MiB
    tokens = 4 * 128
    assert memory.activations == tokens * 2 * (2 * (6 * 64 + 2 * 64 + 4 * 128) + 2 * 64) + LOSS


@pytest.mark.parametrize(
    ("stage", "bytes_per_parameter"),
    # ZeRO, figure 1: (2 + 2 + 12) x parameters, divided step by step over 64 workers; but gradients of several
    # micro-batches are summed in float32, whole at stage 1, and those of later stages are not kept beside the sum.
    [(0, 16), (1, 2 + 6 + 12 / 64), (2, 2 + 16 / 64), (3, 18 / 64)],
)
def test_each_zero_stage_partitions_what_it_says(stage, bytes_per_parameter):
    engine = EngineConfig(zero_stage=stage, micro_batch_rows=1)
    job = replace(JOB, num_workers=64, rows_per_step=128, engine=engine)
    memory = memory_per_worker(job)
    assert memory.states == pytest.approx(bytes_per_parameter * PARAMETERS)


@given(
    st.integers(1, 3), st.integers(1, 64)
)  # stage 0 sums in bfloat16: less memory than stage 1 on one worker
def test_a_higher_stage_or_more_workers_never_need_more_memory_for_state(stage, workers):
    def state(stage, workers):
        # Always two micro-batches, so that what is compared differs in the stage and the workers alone.
        engine = EngineConfig(zero_stage=stage, micro_batch_rows=1)
        return memory_per_worker(
            replace(JOB, num_workers=workers, rows_per_step=2 * workers, engine=engine)
        ).states

    assert state(min(3, stage + 1), workers) <= state(stage, workers)
    assert state(stage, workers + 1) <= state(stage, workers)


def test_a_checkpoint_holds_each_moment_of_the_optimiser():
    model = Backbone(MODEL)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if name.startswith("layers") and p.dim() == 2
    )
    rest = PARAMETERS - matrices
    muon = state_elements(MODEL, OptimizerConfig(kind="muon"))
    assert muon == PARAMETERS + matrices + 2 * rest
    assert state_elements(MODEL, OptimizerConfig(kind="sgd", momentum=0.0)) == PARAMETERS


def test_activation_checkpointing_keeps_one_layer_in_full():
    engine = replace(JOB.engine, activation_checkpointing=True)
    layer = 6 * 64 + 2 * 64 + 4 * 128
    assert activation_bytes(replace(JOB, engine=engine), 2) == 4 * 128 * 2 * (2 * 64 + layer + 2 * 64) + LOSS


def test_a_measured_rate_replaces_the_assumption():
    plan = make_plan(replace(JOB, tokens_per_second=20_480))
    assert plan.seconds == pytest.approx(100)
    assert plan.utilization == pytest.approx(plan.flops / 100 / 2e12)
    assert "measured" in plan.text


def test_the_text_names_every_assumption_and_every_part_of_the_memory():
    text = make_plan(JOB).text
    for part in (
        "2.05 M = 2.00 epochs",
        "210 k parameters",
        "400 W",
        "500 g CO2",
        "40%",
        "a data sheet",
        "activations",
    ):
        assert part in text
    assert "epochs" not in make_plan(replace(JOB, train_tokens=None)).text
    assert all(len(line) <= 120 for line in text.splitlines())


@given(st.integers(1, 64), st.integers(1, 8), st.data())
def test_workers_and_fillers_compute_on_the_rows_that_the_stream_hands_them(lanes, rows_per_lane, data):
    workers = data.draw(st.integers(1, lanes))
    job = replace(JOB, num_workers=workers, lanes=lanes, rows_per_step=lanes * rows_per_lane)
    # As data/rows/stream.py deals lanes out: worker r takes r, r + n, r + 2 n, …, as many on each worker as on the
    # first.
    turns = len(range(0, lanes, workers))
    assert rows_per_worker(job) == turns * rows_per_lane
    fillers = turns * workers - lanes
    assert filled_share(job) == pytest.approx(fillers / (turns * workers))
    assert ("filled up" in make_plan(job).text) == bool(fillers)


def test_the_plan_says_what_an_epoch_leaves_out_and_what_is_filled_up():
    left = {
        "web": {"rows": 3, "tokens": 1_034, "fragments": 1},
        "books": {"rows": 0, "tokens": 7, "fragments": 0},
    }
    text = make_plan(replace(JOB, lanes=16, num_workers=3, left_out=left)).text
    assert "3 rows and 1,034 tokens of web" in text and "0 rows and 7 tokens of books" in text
    assert "6 rows of a step each" in text
    assert "11.1% of the rows" in text and "order.lanes=16" in text
    assert "left out" not in make_plan(JOB).text and "filled up" not in make_plan(JOB).text


def test_the_plan_of_a_prepared_corpus_says_what_its_order_leaves_out(tmp_path):
    manifest = put_token_corpus(open_store(str(tmp_path)), {("train", "web"): 9}, fragment_tokens=120)
    sizes = ["--batch.seq_len", "16", "--batch.rows_per_step", "8", "--order.lanes", "8"]
    uris = ["--corpus.uri", "raw", "--corpus.prepared", "prepared"]
    config = load_config(PretrainConfig, [*uris, *sizes], description="").config
    left = Order(manifest, config.order, seq_len=16, rows_per_step=8).remainder()["web"]
    assert left["rows"] > 0 and left["tokens"] > 16 * left["rows"]
    assert f"{left['rows']:,} rows and {left['tokens']:,} tokens of web" in plan_of(config, manifest).text


TINY = ("model.hidden_size", "128", "model.num_heads", "4", "model.intermediate_size", "352")
WIDE = ("model.hidden_size", "768", "model.num_heads", "12", "model.intermediate_size", "2048")
WIDE += ("optimizer.kind", "adamw", "batch.rows_per_step", "4", "engine.micro_batch_rows", "2")
EAGER = ("engine.compile", "false")
RAY_DATA_BYTES = 40 << 20
# Most resident memory in MiB of one of two workers of sample.yaml with these keys, 2026-11-30: of processes that train
# four steps without Ray, data and checkpoints, compiled from the cache; and of runs.
PROCESSES = (((), 1_041), (EAGER, 1_159), ((*TINY, *EAGER), 750), (WIDE, 1_666), ((*WIDE, *EAGER), 1_696))
RUNS = (((), 1_307), ((), 1_203), ((*TINY, *EAGER), 778), ((*WIDE, *EAGER), 2_128))


@pytest.mark.parametrize(
    ("keys", "held", "is_run"), [*((*each, False) for each in PROCESSES), *((*each, True) for each in RUNS)]
)
def test_the_planned_memory_of_a_worker_on_cpus_is_what_one_held(keys, held, is_run):
    given = [f"--{word}" if index % 2 == 0 else word for index, word in enumerate(keys)]
    preset = str(PROJECT / "trainers" / "configs" / "sample.yaml")
    run = load_config(PretrainConfig, ["--config", preset, *given], description="").config
    model = replace(run.model, vocab_size=run.corpus.tokenizer.vocab_size)
    memory = memory_per_worker(job_of(run, model, "cpu", "AMD EPYC", Peak(1e11, "", is_measured=True), None))
    planned = memory.total
    if not is_run:
        planned -= memory.checkpoint_buffers + RAY_DATA_BYTES + run.engine.compile * COMPILER_BYTES
    print(f"{planned / 2**20:,.0f} MiB planned, {held:,} held: {planned / 2**20 / held - 1:+.0%}")
    assert planned / 2**20 == pytest.approx(held, rel=0.1)
