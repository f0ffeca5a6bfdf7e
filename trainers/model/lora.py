"""Low-rank adaptation (LoRA, Hu et al. 2021): a frozen matrix plus a trained product of two thin ones.

Legend: D inputs, E outputs, R rank.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """A linear layer that stays as it is, and its adapter: x W^T + alpha / R * x A^T B^T (section 4.1)."""

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.scale = alpha / rank
        generator = torch.Generator().manual_seed(seed)
        # As nn.Linear would be initialised; B is zero, so that the adapted model starts as the pretrained one.
        bound = 1 / math.sqrt(frozen.in_features)
        down_RD = torch.empty(rank, frozen.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_down = nn.Parameter(down_RD)
        self.lora_up = nn.Parameter(torch.zeros(frozen.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + F.linear(F.linear(x, self.lora_down), self.lora_up) * self.scale

    def merged(self) -> Tensor:
        """The one matrix [E, D] that does the same."""
        return self.frozen.weight + self.scale * self.lora_up @ self.lora_down


def add_lora(module: nn.Module, targets: Sequence[str], rank: int, alpha: float, seed: int) -> int:
    """Put an adapter on every linear layer below `module` whose name is in `targets`; returns how many.

    Only adapters are trained afterwards.
    """
    module.requires_grad_(False)
    found = list(_linears(module, targets))
    for number, (parent, name, linear) in enumerate(found):
        setattr(parent, name, LoRALinear(linear, rank, alpha, (seed * 65_537 + number) % 2**63))
    return len(found)


def _linears(module: nn.Module, targets: Sequence[str]) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for parent in module.modules():
        for name, child in parent.named_children():
            if name in targets and isinstance(child, nn.Linear):
                yield parent, name, child


@torch.no_grad()
def merge_lora(module: nn.Module) -> None:
    """Replace every adapted layer by a plain one that does the same."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                child.frozen.weight.copy_(child.merged())
                setattr(parent, name, child.frozen)
