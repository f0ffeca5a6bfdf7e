"""Law L7 for evaluations: each number equals a computation by hand."""

import math

import numpy as np
import pytest
import torch

from cluster.storage import open_store
from data.evaluation_rows import EvaluationBatch
from tests.token_corpus import put_token_corpus
from trainers.evaluate import main
from trainers.evaluation import evaluation_of, sums_over


class Uniform(torch.nn.Module):
    """Gives every one of 10 tokens the same probability."""

    def forward(self, tokens_BT, segments_BT=None, targets_BT=None, weights_BT=None):
        losses_BT = math.log(10) * weights_BT
        return losses_BT.sum(), losses_BT.sum(dim=1)


def test_loss_bits_and_perplexity_are_those_of_a_hand_computation():
    found = evaluation_of(nats=8 * math.log(10), tokens=8, num_bytes=24, seconds=0.5)
    assert found.loss == pytest.approx(math.log(10))
    assert found.perplexity == pytest.approx(10)
    assert found.bits_per_byte == pytest.approx(8 * math.log2(10) / 24)


def test_padding_counts_for_nothing():
    batch = EvaluationBatch(
        np.zeros((2, 5), np.uint16), np.array([[1, 1, 1, 1], [1, 0, 0, 0]], np.float32), 15.0
    )
    nats, tokens, num_bytes = sums_over(Uniform(), torch.device("cpu"), [batch, batch], 0, False)
    assert (tokens, num_bytes) == (10, 30)
    assert nats == pytest.approx(10 * math.log(10))


def test_a_loss_beyond_all_numbers_has_infinite_perplexity():
    assert evaluation_of(nats=1e6, tokens=1, num_bytes=1, seconds=1).perplexity == math.inf


@pytest.mark.parametrize(("split", "why"), [("test", "judges a run once"), ("valid", "is none of")])
def test_no_split_but_train_and_validation_can_be_asked_for(split, why, tmp_path, capsys):
    put_token_corpus(open_store(str(tmp_path / "corpus")), {("test", "web"): 1}, fragment_tokens=1_000)
    with pytest.raises(SystemExit, match=why):
        main(["--model", str(tmp_path), "--corpus", str(tmp_path / "corpus"), "--split", split])
    assert not capsys.readouterr().out
