"""DeepSpeed ZeRO behind a few verbs. The only module that imports deepspeed, and inside a worker alone.

A loss handed to `backward` is a sum over this worker's targets, divided by the target tokens of the global
step; gradients are therefore summed over micro-batches and workers, and never divided by their number.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.checkpoints.state import VALUE, StateSlice, StateSource
from trainers.engine.config import EngineConfig, build_deepspeed_config, runs_bare
from trainers.engine.partition import create_moments, masters, read_state, refresh_parameters, write_state
from trainers.model.compiling import compiled
from trainers.optim.muon import Muon
from trainers.optim.optimizer import OptimizerConfig, build_optimizer, moments, role_of


class StepOutcome(NamedTuple):
    """What a step did."""

    grad_norm: float
    """Of the global batch's gradient, before clipping; inf if it was not finite."""
    lr: float
    """`optimizer.learning_rate` times the schedule's factor."""
    skipped: bool
    """No weight and no moment was changed."""


class Engine:
    """A model under training, as one worker sees it. Every method is a collective of all workers.

    torch.distributed must be up. `rate_factor` gives the share of the peak rate after a number of finished
    steps; `fused_rows` the rows of each part of parameters that are several matrices in one; `rate_scales` the share
    of its rate that a parameter has, by name. `values` gives the initial value of each parameter, by name and shape, of
    a model that holds none yet (`trainers.model.backbone.build_hollow`): stage 3 then never has a whole model in
    one place.
    """

    def __init__(
        self,
        model: nn.Module,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        rate_factor: Callable[[int], float],
        micro_batches: int,
        fused_rows: Mapping[str, Sequence[int]] | None = None,
        rate_scales: Mapping[str, float] | None = None,
        values: Callable[[str, torch.Size], Tensor] | None = None,
    ) -> None:
        self.config = config
        self.num_steps = 0
        """Finished steps, skipped ones included."""
        self._learning_rate, self._rate_factor = optimizer.learning_rate, rate_factor
        self._micro_batches, self._micro = micro_batches, 0
        self._accept: Callable[[float], bool] = math.isfinite
        # Of the step under way. At first nothing is accepted: a wrapper may try the optimiser out.
        self._grad_norm: float = math.inf
        self._accepted: bool | None = False
        if config.compile:
            # Not the modules, so that the hooks which DeepSpeed puts on them stay out of the graphs.
            for part in (_units(model) if config.zero_stage == 3 else None) or [model]:
                part.forward = compiled(part.forward)  # type: ignore[method-assign]
        self._optimizer = build_optimizer(model.named_parameters(), optimizer, rate_scales)
        self._apply, self._optimizer.step = self._optimizer.step, self._apply_if_accepted  # type: ignore
        deepspeed_config = build_deepspeed_config(config, micro_batches, torch.cuda.is_available())
        self._engine = _initialize(model, self._optimizer, config, deepspeed_config, values)
        self._masters = masters(self._engine.optimizer, model, dist.get_rank())
        create_moments(self._masters, self._optimizer, lambda p: moments(optimizer, role_of(p.name, p.shape)))
        if isinstance(self._optimizer, Muon):
            self._optimizer.attach(self._masters, fused_rows or {}, self.device)

    @property
    def module(self) -> nn.Module:
        """The model; at stage 3 without its parameters, outside of a forward pass."""
        return self._engine.module

    @property
    def device(self) -> torch.device:
        """Where batches belong."""
        return torch.device(self._engine.device)

    def close(self) -> None:
        """Let go of the model: DeepSpeed's hooks hold it, and every other engine of a process that trains again."""
        self._engine.destroy()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on a micro-batch."""
        # ZeRO asks already here whether this is the step's last one.
        self._engine.set_gradient_accumulation_boundary(self._micro + 1 == self._micro_batches)
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient; after the last one of a step, sum over the workers."""
        # Stage 3 offers no sum, only the mean.
        scale = dist.get_world_size() if self.config.zero_stage == 3 else 1
        self._engine.backward(loss * scale, scale_wrt_gas=False)
        self._micro += 1

    def step(self, accept: Callable[[float], bool] = math.isfinite) -> StepOutcome:
        """Update the weights, unless the gradient is not finite or `accept` refuses its norm.

        `accept` is asked before anything changes. The norm is the same on every worker; it must depend on
        nothing that is not.
        """
        assert self._micro == self._micro_batches, (
            f"{self._micro} of {self._micro_batches} micro-batches were run"
        )
        factor = self._rate_factor(self.num_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self._count(self.num_steps)
        # Some stages do not even try the update where they find the gradient not finite.
        self._accept, self._grad_norm, self._accepted = accept, math.inf, None
        self._engine.step()
        self._micro = 0
        self.num_steps += 1
        return StepOutcome(self._grad_norm, self._learning_rate * factor, skipped=not self._accepted)

    def _apply_if_accepted(self, closure: None = None) -> None:
        """Stand in for the optimiser's step(), which is where every ZeRO stage ends up, gradients summed."""
        if self._accepted is None:  # ZeRO calls once for each parameter group
            if runs_bare(self.config):
                limit = self.config.gradient_clip or math.inf
                norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), limit))
            else:
                norm = float(self._engine.optimizer._global_grad_norm)
            self._grad_norm = norm if math.isfinite(norm) else math.inf
            self._accepted = math.isfinite(norm) and self._accept(norm)
        if self._accepted:
            self._apply()

    def _count(self, num_steps: int) -> None:
        # Bias corrections follow from the step, so that a checkpoint needs no count of its own.
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(num_steps)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Lend the model in evaluation mode, without gradients; between two steps only."""
        assert self._micro == 0, "evaluation in the middle of a step"
        self._engine.eval()
        try:
            with torch.no_grad():
                yield self._engine.module
        finally:
            self._engine.train()

    def local_state(self) -> Iterator[StateSlice]:
        """Yield this worker's part of the float32 values and moments; views, valid until the next step."""
        share = (dist.get_rank(), dist.get_world_size()) if self.config.zero_stage == 0 else (0, 1)
        return read_state(self._masters, self._optimizer, share)

    def load_state(self, source: StateSource) -> None:
        """Continue after `source.step` steps from a state saved at any stage and number of workers.

        Raises ValueError if it was saved with another optimiser.
        """
        write_state(self._masters, self._optimizer, source)
        refresh_parameters(self._engine.optimizer)
        self.num_steps = source.step

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter in float32, one at a time, to the first worker; nothing to the others."""
        shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self.module.named_parameters()}
        held = {part.name: part for part in self.local_state() if part.kind == VALUE}
        for name, shape in shapes.items():
            whole = torch.zeros(math.prod(shape), device=self.device)
            if name in held:
                part = held[name]
                whole[part.start : part.start + len(part.data)] = part.data
            dist.reduce(whole, dst=0)
            if dist.get_rank() == 0:
                yield name, whole.view(shape)


def _units(model: nn.Module) -> list[nn.Module]:
    """The parts, marked by `zero_unit`, that stage 3 gathers each as a whole. None where parameters are frozen: it sums
    a unit's gradients when it has that of its input, which nobody asks for above frozen parts."""
    if not all(parameter.requires_grad for parameter in model.parameters()):
        return []
    return [part for part in model.modules() if getattr(part, "zero_unit", False)]


def _initialize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: EngineConfig,
    deepspeed_config: dict[str, Any],
    values: Callable[[str, torch.Size], Tensor] | None,
) -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops
    import deepspeed.runtime.bf16_optimizer

    # The CPU's shared-memory collectives serve inference alone, and compile for up to 85 s on a new host.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # BF16_Optimizer prints memory use at any log level, after ten garbage collections of 0.27 s each.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None
    # "Untested" are all optimisers but DeepSpeed's own; tests/test_engine.py holds ours against torch.
    deepspeed.utils.logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    # Said at every collective of stage 3; the new names are for DeepSpeed to use.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    _place(model, config, deepspeed_config, values)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config, dist_init_required=False
    )
    return engine


def _place(
    model: nn.Module,
    config: EngineConfig,
    deepspeed_config: dict[str, Any],
    values: Callable[[str, torch.Size], Tensor] | None,
) -> None:
    """Give each parameter its value and type and, at stage 3, each worker its part, one parameter after the other.

    Left to itself, DeepSpeed puts the whole model on every device before it partitions it.
    """
    import deepspeed

    if config.zero_stage == 3:
        for unit in _units(model):
            deepspeed.utils.set_z3_leaf_module(unit, True)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    first: Any = None
    for name, parameter in list(model.named_parameters()):
        if values is not None:
            parameter.data = values(name, parameter.shape)
        parameter.data = parameter.data.to(dtype)
        if config.zero_stage < 3:
            continue
        if first is None:
            first = parameter
            deepspeed.zero.Init(
                module=nn.ParameterList([first]), config_dict_or_path=deepspeed_config, dtype=dtype
            )
        else:
            first.convert_to_zero_parameters(param_list=[parameter])
