"""DeepSpeed ZeRO behind a few verbs. The only module that imports deepspeed, and inside a worker alone.

A loss handed to `backward` is a sum over this worker's targets, divided by the target tokens of the global
step; gradients are therefore summed over micro-batches and workers, and never divided by their number.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.order import largest_divisor
from trainers.muon import Muon
from trainers.optimizer import OptimizerConfig, build_optimizer, moments, role_of
from trainers.partition import create_moments, masters, read_state, refresh_parameters, write_state
from trainers.state import VALUE, StateSlice, StateSource


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is computed: partitioning, precision, memory."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed partitions over the workers: 0 nothing, 1 optimiser state, 2 gradients too, 3 parameters
    too. The lowest that fits is the fastest."""
    offload: Literal["none", "optimizer", "optimizer+parameters"] = "none"
    """What lies in host memory: needs zero_stage 1 or more, parameters need 3."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations; master weights and moments are float32 in any case."""
    micro_batch_rows: int = 8
    """Rows of one forward and backward pass of one worker; fewer where they do not divide its rows of a step."""
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them."""
    gradient_clip: float = 1.0
    """Norm to which larger gradients are scaled down before the update. 0: no limit."""
    compile: bool = False
    """Compile the model's forward and backward pass with torch.compile."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's own configuration keys, passed through."""

    def rows_per_pass(self, rows: int) -> int:
        """Rows of each micro-batch of a worker that has so many in a step: at most those configured, all alike."""
        return largest_divisor(rows, self.micro_batch_rows)

    def problems(self, at: str) -> Iterator[str]:
        """Yield a line for each value, or pair of values, that no run can have."""
        if self.micro_batch_rows < 1:
            yield f"{at}.micro_batch_rows={self.micro_batch_rows} must be at least 1"
        if self.gradient_clip < 0:
            yield f"{at}.gradient_clip={self.gradient_clip} must be 0 or more; 0 sets no limit"
        if self.offload != "none" and self.zero_stage < 1:
            yield f"{at}.offload={self.offload} needs {at}.zero_stage of 1 or more, not {self.zero_stage}"
        if self.offload == "optimizer+parameters" and self.zero_stage < 3:
            yield f"{at}.offload={self.offload} needs {at}.zero_stage=3, not {self.zero_stage}"
        for key, value in _leaves(self.deepspeed):
            if owner := _OURS.get(key) or _OURS.get(key.split(".")[0]):
                yield f"{at}.deepspeed.{key}={value!r} is decided by {owner.format(at=at)}; set that instead"


_OURS = {
    "zero_optimization.stage": "{at}.zero_stage",
    "zero_optimization.offload_optimizer.device": "{at}.offload",
    "zero_optimization.offload_param.device": "{at}.offload",
    "bf16.enabled": "{at}.precision",
    "fp16": "{at}.precision",
    "amp": "{at}.precision",
    "torch_autocast": "{at}.precision",
    "train_micro_batch_size_per_gpu": "{at}.micro_batch_rows",
    "train_batch_size": "batch.rows_per_step",
    "gradient_accumulation_steps": "batch.rows_per_step and {at}.micro_batch_rows",
    "managed_gradient_accumulation": "batch.rows_per_step and {at}.micro_batch_rows",
    "gradient_allreduce_op": "{at}, which sums gradients,",
    "gradient_clipping": "{at}.gradient_clip",
    "activation_checkpointing": "{at}.activation_checkpointing",
    "compile": "{at}.compile",
    "optimizer": "optimizer.kind",
    "scheduler": "schedule.kind",
}
"""DeepSpeed's keys, whole or by their first part, and the keys of ours that decide them."""


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def build_deepspeed_config(config: EngineConfig, micro_batches: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a number of micro-batches a step; the user's keys lie over ours."""
    stage = config.zero_stage
    built: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_rows,
        # The engine says itself which micro-batch is the last, so DeepSpeed divides nothing by their number.
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        # Ours are elementwise, or know the partition (Muon); DeepSpeed's own CPU Adam compiles for minutes.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if stage < 3:  # refused at stage 3, where `backward` multiplies by the number of workers instead
        built["gradient_allreduce_op"] = "sum"
    built["gradient_clipping"] = 0.0 if _unwrapped(config) else config.gradient_clip
    if config.precision == "bf16":
        built["bf16"] = {"enabled": True}
        # Several micro-batches are summed in float32, in buffers that cost 20 to 60 ms a step for 14 M
        # parameters. DeepSpeed 0.19.8 refuses them at stage 0, which sums in bfloat16.
        several = config.zero_stage > 0 and micro_batches > 1
        built["data_types"] = {"grad_accum_dtype": "fp32" if several else "bf16"}
    if config.offload != "none":
        built["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "optimizer+parameters":
        built["zero_optimization"]["offload_param"] = {"device": "cpu"}
    return _merge(built, config.deepspeed)


def _unwrapped(config: EngineConfig) -> bool:
    """Whether DeepSpeed runs our optimiser bare. It would clip, but keep the norm to itself: we do it."""
    return config.zero_stage == 0 and config.precision == "fp32"


def _merge(ours: dict[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        both = isinstance(value, Mapping) and isinstance(ours.get(key), Mapping)
        merged[key] = _merge(ours[key], value) if both else value
    return merged


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
    a model that holds none yet (`trainers.model.build_hollow`): stage 3 then never has a whole model in one place.
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
                part.forward = torch.compile(part.forward)  # type: ignore[method-assign]
        self._optimizer = build_optimizer(model.named_parameters(), optimizer, rate_scales)
        self._apply, self._optimizer.step = self._optimizer.step, self._apply_if_accepted  # type: ignore
        self._engine = _initialize(
            model, self._optimizer, config, build_deepspeed_config(config, micro_batches), values
        )
        self._masters = masters(self._engine.optimizer, model, dist.get_rank())
        create_moments(self._masters, self._optimizer, lambda p: moments(optimizer, role_of(p.name, p.shape)))
        if isinstance(self._optimizer, Muon):
            self._optimizer.attach(self._masters, fused_rows or {})

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
        # DeepSpeed does not even try the update where it finds the gradient not finite.
        self._accept, self._grad_norm, self._accepted = accept, math.inf, None
        self._engine.step()
        self._micro = 0
        self.num_steps += 1
        return StepOutcome(self._grad_norm, self._learning_rate * factor, skipped=not self._accepted)

    def _apply_if_accepted(self, closure: None = None) -> None:
        """Stand in for the optimiser's step(), which is where every ZeRO stage ends up, gradients summed."""
        if self._accepted is None:  # ZeRO calls once for each parameter group
            if _unwrapped(self.config):
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
