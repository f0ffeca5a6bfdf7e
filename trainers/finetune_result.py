"""What a fine-tuning command came to."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FinetuneResult:
    """What all seeds came to."""

    metric: str
    seeds: list[dict[str, Any]]
    """`result.json` of each seed."""

    def values(self, split: str) -> list[float]:
        """The metric of each seed on validation, or on test where that was read."""
        return [
            (seed[split]["metrics"] if split == "test" else seed[split])[self.metric]
            for seed in self.seeds
            if split in seed
        ]
