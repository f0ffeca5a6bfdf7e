"""How a step is computed, and what DeepSpeed is told of it. Also read where there is no DeepSpeed, on the driver."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.configuration.keys import may_change
from data.order.order import largest_divisor


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is computed: partitioning, precision, memory."""

    zero_stage: Literal[0, 1, 2, 3] = may_change(1)
    """What DeepSpeed partitions over the workers: 0 nothing, 1 optimiser state, 2 gradients too, 3 parameters
    too. The lowest that fits is the fastest."""
    offload: Literal["none", "optimizer", "optimizer+parameters"] = may_change("none")
    """What lies in host memory: needs zero_stage 1 or more, parameters need 3."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations; master weights and moments are float32 in any case."""
    micro_batch_rows: int = may_change(8)
    """Rows of one forward and backward pass of one worker; fewer where they do not divide its rows of a step."""
    activation_checkpointing: bool = may_change(False)
    """Compute each block's activations again in the backward pass instead of keeping them."""
    gradient_clip: float = 1.0
    """Norm to which larger gradients are scaled down before the update. 0: no limit."""
    compile: bool = may_change(False)
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


BUCKET_ELEMENTS = 50_000_000
"""Of gradients that travel together: many enough for a link's full rate, few enough that the first ones leave early in
the backward pass. DeepSpeed's own default is ten times as many, allocated whole however small the model is."""


def overlaps(config: EngineConfig, on_gpu: bool) -> bool:
    """Whether gradients travel, and stage 3 fetches parameters, while others are computed: on streams of a GPU."""
    return on_gpu and config.zero_stage > 0 and config.offload == "none"


def build_deepspeed_config(config: EngineConfig, micro_batches: int, on_gpu: bool) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a number of micro-batches a step; the user's keys lie over ours."""
    stage = config.zero_stage
    built: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_rows,
        # The engine says itself which micro-batch is the last, so DeepSpeed divides nothing by their number.
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": overlaps(config, on_gpu),
            "reduce_bucket_size": BUCKET_ELEMENTS,
        },
        # Ours are elementwise, or know the partition (Muon); DeepSpeed's own CPU Adam compiles for minutes.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if stage < 3:  # refused at stage 3, where `backward` multiplies by the number of workers instead
        built["gradient_allreduce_op"] = "sum"
    built["gradient_clipping"] = 0.0 if runs_bare(config) else config.gradient_clip
    if config.precision == "bf16":
        # One look at each gradient, for the norm, which is infinite where any is not finite; the engine refuses that.
        built["bf16"] = {"enabled": True, "check_grad_overflow": False}
        # Several micro-batches are summed in float32, in buffers that cost 20 to 60 ms a step for 14 M
        # parameters. DeepSpeed 0.19.8 refuses them at stage 0, which sums in bfloat16.
        several = config.zero_stage > 0 and micro_batches > 1
        built["data_types"] = {"grad_accum_dtype": "fp32" if several else "bf16"}
    if config.offload != "none":
        built["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "optimizer+parameters":
        built["zero_optimization"]["offload_param"] = {"device": "cpu"}
    return _merge(built, config.deepspeed)


def runs_bare(config: EngineConfig) -> bool:
    """Whether DeepSpeed runs our optimiser bare. It would clip, but keep the norm to itself: we do it."""
    return config.zero_stage == 0 and config.precision == "fp32"


def _merge(ours: dict[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        both = isinstance(value, Mapping) and isinstance(ours.get(key), Mapping)
        merged[key] = _merge(ours[key], value) if both else value
    return merged
