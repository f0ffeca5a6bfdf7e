"""What `make bench` runs needs nothing at hand: benchmarks/run.py passes no arguments on."""

import contextlib
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks.bench_model import SAMPLE, Variant, no_attention, torchs_attention
from cluster.sessions.session import PROJECT
from trainers.model.attention import attend
from trainers.model.backbone import build


@pytest.mark.slow
def test_tokenizing_is_measured_without_a_corpus_at_hand():
    small = ["--vocab-size", "300", "--megabytes", "1", "--repeats", "1"]
    command = [sys.executable, str(PROJECT / "benchmarks" / "bench_tokenize.py"), *small]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.count("median ratio") == 2, result.stderr


@pytest.mark.parametrize("attention", [attend, torchs_attention, no_attention])
def test_a_variant_of_the_model_that_attends_as_the_others_is_refused(attention, monkeypatch):
    small = replace(SAMPLE, vocab_size=300, hidden_size=12, num_layers=2, intermediate_size=24)
    variant = Variant("of the test", small, attention)
    variant.model = build(small, seed=0)
    variant.check_attention()
    monkeypatch.setattr("benchmarks.bench_model.swapped", contextlib.nullcontext)
    with pytest.raises(RuntimeError, match="0 of 2 layers use its attention"):
        variant.check_attention()
