"""What `make bench` runs needs nothing at hand: benchmarks/run.py passes no arguments on."""

import subprocess
import sys

import pytest

from cluster.session import PROJECT


@pytest.mark.slow
def test_tokenizing_is_measured_without_a_corpus_at_hand():
    small = ["--vocab-size", "300", "--megabytes", "1", "--repeats", "1"]
    command = [sys.executable, str(PROJECT / "benchmarks" / "bench_tokenize.py"), *small]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "median ratio" in result.stdout, result.stderr
