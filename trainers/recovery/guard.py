"""Which steps are refused: non-finite or exploding loss or gradient, judged by the run's own recent past.

The judgement is a pure function of globally reduced numbers and of a history that is part of the checkpoint,
so all workers refuse the same step without asking each other, and a resumed run refuses what an unbroken one
would have.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.console.errors import UserError
from cluster.storage.uris import Store
from data.shards.manifest import Manifest
from data.shards.shards import read_fragment_documents

if TYPE_CHECKING:  # configuration is read where no model is
    from trainers.engine.engine import Engine, StepOutcome

NAMED_DOCUMENTS = 50  # in one message; a step of 256 rows has some hundreds
READ_THREADS = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Which steps are refused, for what they would do to the weights, and when a run gives up."""

    window_steps: int = 128
    """Accepted steps whose median is what loss and gradient norm are compared with."""
    warmup_steps: int = 64
    """Accepted steps before anything finite is refused: early norms fall by orders of magnitude."""
    max_norm_ratio: float = 20.0
    """Largest gradient norm (before clipping), as a multiple of the median; 0: any finite one."""
    max_loss_rise: float = 2.0
    """Largest loss above the median, in nats per token; 0: any finite one."""
    max_skipped_in_a_row: int = 5
    """Refused steps one after another, after which the run stops."""
    max_skipped: int = 100
    """Refused steps in the whole run, after which it stops."""

    def problems(self, at: str) -> Iterator[str]:
        for key in ("window_steps", "warmup_steps", "max_skipped_in_a_row", "max_skipped"):
            if getattr(self, key) < 1:
                yield f"{at}.{key}={getattr(self, key)} must be at least 1"
        if self.warmup_steps > self.window_steps:
            yield (
                f"{at}.warmup_steps={self.warmup_steps} is more than {at}.window_steps={self.window_steps}, "
                f"so that nothing would ever be refused; at most: {self.window_steps}"
            )
        if 0 != self.max_norm_ratio <= 1:
            yield f"{at}.max_norm_ratio={self.max_norm_ratio} would refuse ordinary steps; more than 1, or 0"
        if self.max_loss_rise < 0:
            yield f"{at}.max_loss_rise={self.max_loss_rise} is negative; 0 for none"


@dataclass(frozen=True)
class Refusal:
    """A step that must not change the weights."""

    step: int
    reason: str
    documents: tuple[str, ...]
    """Ids of the documents in it, as far as this worker was given a way to name them."""
    of_what: str = "documents"
    """What they are called."""

    def __str__(self) -> str:
        shown = ", ".join(self.documents[:NAMED_DOCUMENTS]) or "not resolved on this worker"
        others = len(self.documents) - NAMED_DOCUMENTS
        more = f" and {others:,} more" if others > 0 else ""
        return f"step {self.step} refused: {self.reason}; {self.of_what}: {shown}{more}"


class TrainingDiverged(UserError, RuntimeError):
    """Too many steps were refused; going on would train on nothing, or hide a fault."""


class Guard:
    """One per worker, each fed the same numbers.

    Args:
        name_documents: ids of the documents of a step; asked on a refusal only, on the workers that were
        given one.
        of_what: what they are called where refusals are told.
    """

    def __init__(
        self,
        config: GuardConfig,
        name_documents: Callable[[int], Sequence[str]] = lambda step: (),
        of_what: str = "documents",
    ) -> None:
        self._config = config
        self._name_documents, self._of_what = name_documents, of_what
        self._losses: deque[float] = deque(maxlen=config.window_steps)
        self._norms: deque[float] = deque(maxlen=config.window_steps)
        self._skipped = 0
        self._skipped_in_a_row = 0

    def check(self, step: int, loss: float, grad_norm: float) -> Refusal | None:
        """Judge a step before it is applied; None if it may be. Both numbers must be equal on all workers.

        Args:
            loss: nats per target token of the global batch.
            grad_norm: of the whole gradient, before clipping.

        Raises:
            TrainingDiverged: one refusal too many.
        """
        reason = self._judge(loss, grad_norm)
        if reason is None:
            self._losses.append(loss)
            self._norms.append(grad_norm)
            self._skipped_in_a_row = 0
            return None
        self._skipped += 1
        self._skipped_in_a_row += 1
        refusal = Refusal(step, reason, tuple(self._name_documents(step)), self._of_what)
        logger.warning("%s", refusal)
        self._stop_if_too_many(refusal)
        return refusal

    def state(self) -> dict[str, Any]:
        """For the checkpoint: JSON."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "skipped": self._skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()` of a checkpoint."""
        self._losses = deque(state["losses"], maxlen=self._config.window_steps)
        self._norms = deque(state["norms"], maxlen=self._config.window_steps)
        self._skipped = state["skipped"]
        self._skipped_in_a_row = state["skipped_in_a_row"]

    def _judge(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm}"
        if len(self._losses) < self._config.warmup_steps:
            return None
        usual_norm, usual_loss = median(self._norms), median(self._losses)
        if 0 < self._config.max_norm_ratio * usual_norm < grad_norm:
            return (
                f"gradient norm {grad_norm:.4g} is more than "
                f"guard.max_norm_ratio={self._config.max_norm_ratio:g} times "
                f"the median {usual_norm:.4g} of the last {len(self._norms)} steps"
            )
        if 0 < self._config.max_loss_rise < loss - usual_loss:
            return (
                f"loss {loss:.4f} is more than guard.max_loss_rise={self._config.max_loss_rise:g} above "
                f"the median {usual_loss:.4f} of the last {len(self._losses)} steps"
            )
        return None

    def _stop_if_too_many(self, refusal: Refusal) -> None:
        for key, count in (
            ("max_skipped_in_a_row", self._skipped_in_a_row),
            ("max_skipped", self._skipped),
        ):
            limit = getattr(self._config, key)
            if count > limit:
                raise TrainingDiverged(
                    f"{count} steps refused, guard.{key}={limit} allows {limit}. The last: {refusal}. "
                    f"Look at these {self._of_what}, lower the learning rate, or raise the limit"
                )


def guarded_step(
    engine: "Engine", guard: Guard, step: int, loss: float
) -> "tuple[StepOutcome, Refusal | None]":
    """Update the weights unless the guard refuses the step, on all workers alike.

    Raises:
        TrainingDiverged: one refusal too many.
    """
    judged: list[Refusal | None] = []

    def accept(grad_norm: float) -> bool:
        judged.append(guard.check(step, loss, grad_norm))
        return judged[0] is None

    outcome = engine.step(accept)
    if not judged:  # ZeRO does not ask where the gradient is not finite
        accept(outcome.grad_norm)
    return outcome, judged[0]


def name_documents(
    store: Store, manifest: Manifest, fragments: np.ndarray, starts: np.ndarray, row_tokens: int
) -> list[str]:
    """Ids of the documents that have a token in these rows, in order of appearance, each once.

    Reads every fragment concerned, about 2 MB each: meant for the rare refused step.

    Args:
        store: The prepared corpus.
        fragments: [rows] int, indices into `manifest.fragments`.
        starts: [rows] int, token offset of each row within its fragment.
        row_tokens: tokens of a row, the last target included.
    """
    unique, order = np.unique(fragments, return_inverse=True)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        tables = list(pool.map(lambda f: read_fragment_documents(store, manifest, int(f)), unique))
    found: dict[str, None] = {}
    for start, table in zip(starts, order, strict=True):
        ids, begins = tables[table]
        first = int(np.searchsorted(begins, start, side="right")) - 1
        last = int(np.searchsorted(begins, start + row_tokens, side="left"))
        found.update(dict.fromkeys(ids[first:last]))
    return list(found)
