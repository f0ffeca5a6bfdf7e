"""Validation chooses: which step is the best so far, and whether a run that no longer improves should stop."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.configuration.keys import may_change
from cluster.storage.uris import Store
from trainers.checkpoints.keeping import BEST
from trainers.evaluation.loss import Evaluation


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """How the validation split chooses the checkpoint, and stops a run that no longer improves."""

    every_steps: int = 500
    """Steps between two validations; the last step is always validated."""
    max_rows: int = 2_048
    """Rows of the fixed set; 0: the whole split."""
    patience: int = may_change(0, "until judged")
    """Validations without a better loss before the run stops early; 0: never."""
    min_improvement: float = 0.0
    """Nats per token by which a loss must be lower to count as better."""

    def problems(self, at: str) -> Iterator[str]:
        if self.every_steps < 1:
            yield f"{at}.every_steps={self.every_steps} must be at least 1"
        if self.max_rows < 0:
            yield f"{at}.max_rows={self.max_rows} must not be negative; 0 takes the whole split"


@dataclass(frozen=True)
class Selection:
    """What validation has found so far; part of each checkpoint."""

    best_step: int = 0
    """Finished steps at the lowest loss; 0 before the first validation."""
    best_loss: float = float("inf")
    """Nats per target token."""
    best_bits_per_byte: float = float("inf")
    """Infinite too where the objective has none."""
    validated_step: int = 0
    """Finished steps at the last validation."""
    without_improvement: int = 0
    """Validations since the best one."""

    def after(self, step: int, found: Evaluation, config: ValidationConfig) -> "Selection":
        """What is known once `found` was measured after `step` steps."""
        if found.loss < self.best_loss - config.min_improvement:
            bits = float("inf") if found.bits_per_byte is None else found.bits_per_byte
            return Selection(step, found.loss, bits, step, 0)
        return replace(self, validated_step=step, without_improvement=self.without_improvement + 1)

    def gives_up(self, config: ValidationConfig) -> bool:
        """Whether the run has gone `validation.patience` validations without improvement."""
        return 0 < config.patience <= self.without_improvement

    def as_json(self) -> dict[str, Any]:
        """For the checkpoint. A loss that was never measured is null: JSON has no infinity."""
        return {key: None if value == float("inf") else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Selection":
        known: dict[str, Any] = {
            key: float("inf") if value is None else value for key, value in stored.items()
        }
        return cls(**known)


def record_best(store: Store, selection: Selection, checkpoint: str) -> None:
    """Write `best.json` into the run once the best step's checkpoint exists."""
    bits = selection.best_bits_per_byte
    best = {
        "step": selection.best_step,
        "checkpoint": checkpoint,
        "loss": selection.best_loss,
        **({} if bits == float("inf") else {"bits_per_byte": bits}),
        "why": "lowest loss on the validation split so far",
    }
    store.put(BEST, json.dumps(best, indent=2, allow_nan=False).encode())
