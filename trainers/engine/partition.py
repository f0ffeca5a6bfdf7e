"""Where the float32 masters of the parameters lie under each ZeRO stage, as ranges of the flattened
parameters.

One description serves saving, loading and Muon. DeepSpeed's wrappers are told apart by the attributes read
here, so that nothing of DeepSpeed is imported. Written against DeepSpeed 0.19.8:

| stage | wrapper, float32 | wrapper, bfloat16     | a worker's masters                             |
|-------|------------------|-----------------------|------------------------------------------------|
| 0     | none             | FP16_UnfusedOptimizer | every parameter, whole                         |
| 1     | ZeroOptimizer    | BF16_Optimizer (a)    | 1/n of a group's parameters, joined end to end |
| 2     | ZeroOptimizer    | ZeroOptimizer         | the same                                       |
| 3     | Stage3           | Stage3                | 1/n of every parameter                         |

(a) With float32 sums over several micro-batches and without offload; otherwise ZeroOptimizer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainers.checkpoints.state import VALUE, StateSlice, StateSource
from trainers.optim.pieces import Master, Piece


def masters(wrapper: Any, module: nn.Module, rank: int) -> list[Master]:
    """List this worker's masters, in the same order on every worker. `wrapper`: DeepSpeed's optimiser."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return list(_stage_3(wrapper, names, rank))
    if hasattr(wrapper, "bit16_groups"):
        groups = zip(wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups, strict=True)
        return [_stage_1_and_2(group, flat, names) for group, flat in groups]
    if hasattr(wrapper, "bf16_groups"):
        groups = zip(wrapper.bf16_groups, wrapper.fp32_groups_flat_partition, strict=True)
        return [_stage_1_and_2(group, flat, names) for group, flat in groups]
    if hasattr(wrapper, "fp32_groups"):
        pairs = [
            pair
            for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
            for pair in zip(low, high, strict=True)
        ]
    else:
        pairs = [(p, p) for group in wrapper.param_groups for p in group["params"]]
    return [Master(high, (Piece(names[low], tuple(low.shape), 0, low.numel(), 0),)) for low, high in pairs]


def _stage_1_and_2(group: list[Any], flat: Tensor, names: Mapping[Any, str]) -> Master:
    pieces = []
    for parameter in group:
        if (mapping := parameter._hp_mapping) is not None:
            inside, outside = mapping.lp_fragment_address, mapping.hp_fragment_address
            pieces.append(
                Piece(names[parameter], tuple(parameter.shape), inside.start, inside.numel, outside.start)
            )
    return Master(flat, tuple(pieces))


def _stage_3(wrapper: Any, names: Mapping[Any, str], rank: int) -> Iterator[Master]:
    for group, flat in zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True):
        pieces = []
        for parameter in group:
            _, offset, length = wrapper.grad_position[wrapper.get_param_id(parameter)]
            start = rank * length  # the last workers' parts are padded to the same length
            length = min(length, parameter.ds_numel - start)
            if length > 0:
                pieces.append(Piece(names[parameter], tuple(parameter.ds_shape), start, length, offset))
        yield Master(flat, tuple(pieces))


@torch.no_grad()
def refresh_parameters(wrapper: Any) -> None:
    """Bring the parameters that the model computes with to the masters' values. Collective."""
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        # As the end of its step(): the next forward pass gathers what is copied here.
        wrapper._partition_all_parameters()
        for index in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(index)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
    elif hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp32_groups"):
        for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            torch._foreach_copy_(low, high)


Moments = Callable[[Piece], Sequence[str]]
"""The names of what the optimiser remembers for the elements of a parameter."""


def create_moments(masters: Sequence[Master], optimizer: torch.optim.Optimizer, moments: Moments) -> None:
    """Set up the optimiser's state as its first step would, all zero."""
    for master in masters:
        if master.pieces:
            state = optimizer.state[master.tensor]
            state.update({kind: torch.zeros_like(master.tensor) for kind in moments(master.pieces[0])})
            if "exp_avg" in state or "square_avg" in state:
                state["step"] = torch.zeros((), device=master.tensor.device)


def read_state(
    masters: Sequence[Master], optimizer: torch.optim.Optimizer, share: tuple[int, int]
) -> Iterator[StateSlice]:
    """Yield views of the masters and their moments.

    `share` is (k, n): the k-th n-th of each range alone, for masters that n workers hold alike; else (0, 1).
    """
    k, n = share
    for master in masters:
        tensors = {VALUE: master.tensor.detach()} | {
            kind: moment for kind, moment in optimizer.state[master.tensor].items() if kind != "step"
        }
        for piece in master.pieces:
            begin, end = piece.length * k // n, piece.length * (k + 1) // n
            for kind, tensor in tensors.items():
                if end > begin:
                    data = piece.of(tensor)[begin:end]
                    yield StateSlice(piece.name, kind, piece.shape, piece.start + begin, data)


@torch.no_grad()
def write_state(masters: Sequence[Master], optimizer: torch.optim.Optimizer, source: StateSource) -> None:
    """Fill the masters and their moments from a source; moments must have been created."""
    for master in masters:
        tensors = {VALUE: master.tensor} | {
            kind: moment for kind, moment in optimizer.state[master.tensor].items() if kind != "step"
        }
        for piece in master.pieces:
            held = source.kinds(piece.name)
            if missing := sorted(tensors.keys() - set(held)):
                raise ValueError(
                    f"the checkpoint holds {', '.join(held)} of {piece.name}, not {', '.join(missing)}; "
                    "continue with the optimizer.kind that it was saved with"
                )
            for kind, tensor in tensors.items():
                data = source.read(piece.name, kind, piece.start, piece.start + piece.length)
                piece.of(tensor).copy_(data)
