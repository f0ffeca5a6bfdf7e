"""Law L7 for evaluations: each number equals a computation by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster.storage.uris import open_store
from data.order.epochs import Rows
from data.rows.evaluation_rows import EvaluationBatch, evaluation_batches
from tests.task_files import SHAPE, put_backbone, small_tokenizer
from tests.token_corpus import put_text_corpus, put_token_corpus
from trainers.engine.collectives import Workers
from trainers.engine.config import EngineConfig
from trainers.engine.engine import Engine
from trainers.evaluate import main
from trainers.evaluation.loss import Evaluation, evaluate, evaluation_of, sums_over
from trainers.evaluation.verdict import TestSplitError
from trainers.exported.folder import load_exported
from trainers.finetuning.worker import form_group_of_one
from trainers.objectives.causal import CAUSAL, Causal
from trainers.objectives.objective import Term
from trainers.optim.optimizer import OptimizerConfig

NO_ROWS = Rows(*np.full((5, 2), -1))
NO_LABELS = np.full(2, -1, np.int8)


def causal(nats: float, targets: float, num_bytes: float) -> Evaluation:
    return evaluation_of((CAUSAL,), np.array([[nats, targets, np.nan]]), num_bytes, seconds=0.5)


class Uniform(torch.nn.Module):
    """Gives every one of 10 tokens the same probability."""

    def forward(self, tokens_BT, segments_BT=None, targets_BP=None, weights_BP=None):
        losses_BT = math.log(10) * weights_BP
        return losses_BT.sum(), losses_BT.sum(dim=1)


def test_loss_bits_and_perplexity_are_those_of_a_hand_computation():
    found = causal(nats=8 * math.log(10), targets=8, num_bytes=24)
    assert found.loss == pytest.approx(math.log(10))
    assert found.perplexity == pytest.approx(10)
    assert found.bits_per_byte == pytest.approx(8 * math.log2(10) / 24)


def test_padding_counts_for_nothing():
    weights = np.array([[1, 1, 1, 1], [1, 0, 0, 0]], np.float32)
    batch = EvaluationBatch(np.zeros((2, 5), np.uint16), NO_LABELS, weights, 15.0, NO_ROWS)
    objective = Causal(boundary_id=0, document_mask=False)
    [[nats, targets, _]], num_bytes = sums_over(Uniform(), torch.device("cpu"), [batch, batch], objective)
    assert (targets, num_bytes) == (10, 30)
    assert nats == pytest.approx(10 * math.log(10))


def test_a_loss_beyond_all_numbers_has_infinite_perplexity():
    assert causal(nats=1e6, targets=1, num_bytes=1).perplexity == math.inf


def test_the_loss_of_masked_tokens_is_never_given_per_byte():
    terms = (Term("masked"), Term("next_sentence", share=0.5))
    found = evaluation_of(terms, np.array([[30.0, 10, 4], [8, 16, 12]]), num_bytes=24, seconds=1)
    assert found.loss == pytest.approx(3 + 0.5 * 0.5)
    assert found.as_json() == {
        "loss": found.loss,
        "tokens": 10,
        "masked_loss": 3.0,
        "masked_accuracy": 0.4,
        "next_sentence_loss": 0.5,
        "next_sentence_accuracy": 0.75,
        "seconds": 1,
    }


def test_a_term_without_targets_is_left_out():
    terms = (Term("masked"), Term("next_sentence"))
    found = evaluation_of(terms, np.array([[30.0, 10, 4], [0, 0, 0]]), num_bytes=24, seconds=1)
    assert found.loss == 3 and not any("next_sentence" in key for key in found.as_json())


def test_of_several_terms_the_causal_one_alone_has_bits_per_byte():
    terms = (Term("causal", 0.75), Term("masked", 0.25))
    found = evaluation_of(terms, np.array([[20.0, 10, np.nan], [12, 4, 1]]), num_bytes=5, seconds=1)
    assert found.loss == pytest.approx(0.75 * 2 + 0.25 * 3)
    assert found.bits_per_byte == pytest.approx(4 / math.log(2)) and found.perplexity == pytest.approx(
        math.exp(2)
    )
    assert found.measures == {"causal_loss": 2.0, "masked_loss": 3.0, "masked_accuracy": 0.25}


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_an_export_evaluated_in_the_engines_precision_has_the_loss_that_the_run_measured(
    tmp_path, capsys, precision, stage
):
    tokenizer, corpus = small_tokenizer(), open_store(str(tmp_path / "corpus"))
    texts = {"validation": [f"{name} is a film of some kind, and its end is fine. " * 9 for name in "abcd"]}
    manifest = put_text_corpus(corpus, texts, tokenizer, fragment_tokens=2_000)
    put_backbone(tmp_path / "model", replace(SHAPE, vocab_size=tokenizer.vocab_size))
    form_group_of_one()
    model, optimizer = load_exported(open_store(str(tmp_path / "model"))).model, OptimizerConfig()
    config = EngineConfig(precision=precision, zero_stage=stage)
    engine = Engine(model, config, optimizer, lambda step: 1.0, micro_batches=1)
    shared = {"seq_len": 64, "rows_per_batch": 8, "rank": 0, "world_size": 1, "max_rows": 0}
    batches = evaluation_batches(manifest, corpus, "validation", **shared)
    objective = Causal(boundary_id=manifest.boundary_id, document_mask=SHAPE.document_mask)
    measured = evaluate(engine, batches, Workers(), objective).loss
    engine.close()
    found = {}
    for each in ("bf16", "fp32"):
        main(
            [
                "--model",
                str(tmp_path / "model"),
                "--corpus",
                corpus.uri,
                "--seq-len",
                "64",
                "--precision",
                each,
            ]
        )
        found[each] = json.loads(capsys.readouterr().out)["loss"]
    assert found[precision] == pytest.approx(measured, rel=1e-6)
    assert found["bf16"] != pytest.approx(found["fp32"], rel=1e-6)


@pytest.mark.parametrize(("split", "why"), [("test", "judges a run once"), ("valid", "is none of")])
def test_no_split_but_train_and_validation_can_be_asked_for(split, why, tmp_path, capsys):
    put_token_corpus(open_store(str(tmp_path / "corpus")), {("test", "web"): 1}, fragment_tokens=1_000)
    with pytest.raises((TestSplitError, ValueError), match=why):
        main(["--model", str(tmp_path), "--corpus", str(tmp_path / "corpus"), "--split", split])
    assert not capsys.readouterr().out
