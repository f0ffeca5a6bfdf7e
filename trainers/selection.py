"""Validation chooses: which step is the best so far, and whether a run that no longer improves should stop."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.storage import Store
from trainers.checkpoint import BEST
from trainers.config import ValidationConfig
from trainers.evaluation import Evaluation


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
