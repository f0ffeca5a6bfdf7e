"""What the system is compared with: a loop that knows a forward and backward pass and an optimiser, nothing else."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.optim.optimizer import OptimizerConfig, build_optimizer

RATE = 1e-3


class BareLoop:
    """A bf16 model and its float32 masters, compiled; where torch.distributed is up with several
    processes, in torch's DistributedDataParallel."""

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig, gradient_clip: float) -> None:
        model.forward = torch.compile(model.forward)  # type: ignore[method-assign]
        self._weights = dict(model.named_parameters())
        self._masters = {
            name: nn.Parameter(weight.detach().float()) for name, weight in self._weights.items()
        }
        self._optimizer = build_optimizer(self._masters.items(), optimizer)
        for group in self._optimizer.param_groups:
            group["lr"] = RATE
        self._clip = gradient_clip
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._model = nn.parallel.DistributedDataParallel(model) if several else model

    def step(self, losses: Callable[[nn.Module], Iterable[Tensor]]) -> None:
        """One update by the sum of these losses; each one's graph is freed before the next is asked for."""
        for loss in losses(self._model):
            loss.backward()
        for name, weight in self._weights.items():
            assert weight.grad is not None
            self._masters[name].grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(self._masters.values(), self._clip)
        self._optimizer.step()
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(self._masters[name])
