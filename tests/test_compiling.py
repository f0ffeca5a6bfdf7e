"""Compilation is measured where it happens, as torch itself accounts for it."""

import time

import pytest
import torch
from torch._dynamo.utils import get_compilation_metrics

from trainers.model.compiling import VARIABLE, compile_clock, compiled, seconds_compiled


def test_the_clock_runs_while_torch_compiles_and_at_no_other_time(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    compile_clock.cache_clear()  # another test may have reset torch's compiler, which forgets who listens
    before, known = seconds_compiled(), len(get_compilation_metrics())
    function = compiled(lambda x, weight: torch.nn.functional.silu(x @ weight).sum())
    weight = torch.randn(16, 16, requires_grad=True)
    started = time.perf_counter()
    function(torch.randn(8, 16), weight).backward()
    took, first = time.perf_counter() - started, seconds_compiled() - before
    function(torch.randn(8, 16), weight).backward()
    assert seconds_compiled() - before == first
    function(torch.randn(9, 16), weight).backward()  # another shape
    theirs = [metrics.duration_us / 1e6 for metrics in get_compilation_metrics()[known:]]
    assert len(theirs) == 3  # forward, backward, and forward for the other shape
    assert first == pytest.approx(sum(theirs[:2]), rel=0.05) and first < took
    assert seconds_compiled() - before == pytest.approx(sum(theirs), rel=0.05)
