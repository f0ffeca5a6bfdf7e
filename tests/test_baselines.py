"""What counting alone reaches equals a computation by hand, on the masks that judge the model."""

import json
import math

import numpy as np
import pytest

from cluster.configuration.config import load_config
from cluster.storage.uris import open_store
from tests.test_framing import PROSE, tokenizer
from tests.token_corpus import put_text_corpus
from trainers.pretraining.baselines import BASELINES, measure, write_baselines
from trainers.pretraining.config import PretrainConfig


def test_loss_and_accuracies_by_hand():
    counts, usual = np.array([0, 6, 2, 0]), np.array([False, True, True, True])
    inputs = {
        "targets": np.array([[1, 2, 1], [3, 1, 0]]),
        "weights": np.array([[1.0, 1, 0], [1, 1, 0]]),
        "labels": np.array([1, 0]),
        "label_weights": np.array([1.0, 1]),
    }
    more = inputs | {"label_weights": np.array([1.0, 0])}
    found = measure([inputs, more], counts, usual, "next_sentence")
    # Shares with one added: 7/11, 3/11, 1/11.
    expected = -(2 * math.log(7 / 11) + math.log(3 / 11) + math.log(1 / 11)) / 4
    assert found == pytest.approx(
        {"masked_loss": expected, "masked_accuracy": 0.5, "next_sentence_accuracy": 2 / 3}
    )


@pytest.mark.parametrize("kind", ["causal", "masked", "masked_next_sentence", "mixed"])
def test_every_objective_that_hides_tokens_is_compared_with_counting(kind, tmp_path):
    store, run = open_store(f"{tmp_path}/prepared"), open_store(f"{tmp_path}/run")
    texts = {"train": PROSE[:60], "validation": PROSE[60:90], "test": PROSE[90:120]}
    manifest = put_text_corpus(store, texts, tokenizer(), fragment_tokens=1_000)
    shape = {"masked": ["bidirectional", "false"], "masked_next_sentence": ["bidirectional", "true"]}
    attention, pairs = shape.get(kind, ["causal", "false"])
    given = [
        "--corpus.uri", "raw", "--corpus.prepared", store.uri, "--objective.kind", kind, "--batch.seq_len", "32",
        "--model.attention", attention, "--model.pair_head", pairs, "--model.num_token_types", "2",
    ]  # fmt: skip
    write_baselines(run, load_config(PretrainConfig, given, description="").config, manifest)
    if kind == "causal":
        assert not run.exists(BASELINES)
        return
    found = json.loads(run.read(BASELINES))
    for split in ("validation", "test"):
        assert 0 < found[split]["masked_accuracy"] < 0.2
        assert 0 < found[split]["masked_loss"] < math.log(tokenizer().vocab_size) + 0.5
        assert ("next_sentence_accuracy" in found[split]) == (kind == "masked_next_sentence")
        assert 0.5 <= found[split].get("next_sentence_accuracy", 0.5) < 0.75
