"""What a run must have trained whatever happened to it: rows by the order's arithmetic, losses by plain torch.

One process, no Ray, no stream, no ZeRO: token shards are read row by row, and the model is trained as a first example
of torch would train it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from cluster.configuration.config import load_config
from cluster.storage.uris import Store, open_store
from data.order.order import Order
from data.shards.manifest import Manifest, read_manifest
from data.shards.shards import read_fragment
from data.tokens.tokenizer import read_tokenizer
from tests.small_run import SmallRun, steps_by_number
from trainers.model.backbone import build
from trainers.objectives.kinds import objective_of
from trainers.objectives.objective import on_device
from trainers.optim.optimizer import build_optimizer
from trainers.optim.schedule import rate_factor
from trainers.pretraining.config import PretrainConfig, model_of

if TYPE_CHECKING:
    from data.rows.stream import StepRows

LOSS_TOLERANCE = 1e-5
"""Relative: in float32 workers and ZeRO's stages sum in other orders; two workers differed by 2e-7 in 1,500 steps."""


def assert_as_unbroken(store: Store, run: SmallRun, **changes) -> None:
    """Hold the run's history against that of a run without faults; `changes` as it was started with."""
    found = steps_by_number(store)
    assert sorted(found) == list(range(1, max(found) + 1)), "a step is missing"
    steps = [found[step] for step in sorted(found)]
    digests, losses = expected(run, len(steps), **changes)
    assert [step["digest"] for step in steps] == digests
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=LOSS_TOLERANCE)


def expected(run: SmallRun, num_steps: int, **changes) -> tuple[list[str], list[float]]:
    """The digest of each step's rows, and its loss."""
    config, manifest = trained_on(run, changes)
    rows = list(expected_rows(config, manifest, range(num_steps)))
    return digests_of(rows), expected_losses(config, manifest, rows)


def expected_digests(run: SmallRun, steps: Iterable[int], **changes) -> list[str]:
    """The digest of the rows of each of these steps, numbered as records are: by finished steps."""
    return digests_of(expected_rows(*trained_on(run, changes), (step - 1 for step in steps)))


def digests_of(rows: Iterable["StepRows"]) -> list[str]:
    return [f"{each.digest:016x}" for each in rows]


def trained_on(run: SmallRun, changes: Mapping[str, Any]) -> tuple[PretrainConfig, Manifest]:
    config = load_config(PretrainConfig, run.command(**changes)[2:], description="").config
    return config, read_manifest(open_store(config.corpus.prepared))


def expected_rows(config: PretrainConfig, manifest: Manifest, steps: Iterable[int]) -> Iterator["StepRows"]:
    """All rows of each step."""
    from data.rows.stream import StepRows  # it imports Ray, which reads its settings then

    store, seq_len = open_store(config.corpus.prepared), config.batch.seq_len
    order = Order(manifest, config.order, seq_len=seq_len, rows_per_step=config.batch.rows_per_step)
    read = cache(lambda fragment: read_fragment(store, manifest, fragment))
    for step in steps:
        rows = order.step_rows(step)
        begins = zip(rows.fragment.tolist(), rows.start.tolist(), strict=True)
        tokens = np.stack([read(fragment)[start : start + seq_len + 1] for fragment, start in begins])
        labels, weights = np.full(len(rows), -1, np.int8), np.ones(len(rows), np.float32)
        yield StepRows(step, tokens, labels, weights, rows)


def expected_losses(config: PretrainConfig, manifest: Manifest, steps: Sequence["StepRows"]) -> list[float]:
    """The loss of each step, from the first on."""
    model = build(model_of(config, manifest), config.run.seed)
    optimizer = build_optimizer(model.named_parameters(), config.optimizer)
    objective = objective_of(
        config.objective,
        read_tokenizer(open_store(config.corpus.prepared), manifest.tokenizer),
        boundary_id=manifest.boundary_id,
        document_mask=config.model.document_mask,
    )
    counts = objective.global_targets(config.batch.rows_per_step, config.batch.seq_len)
    torch.set_num_threads(1)  # so small a model is slower with more
    losses = []
    for step, rows in enumerate(steps):
        loss = objective.loss(model, on_device(objective.inputs(rows), torch.device("cpu")), counts).total
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.engine.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate_factor(config.schedule, step, config.run.steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
