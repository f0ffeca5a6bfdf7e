"""Muon (Jordan et al. 2024) for partitioned matrices: each matrix is orthogonalised once, by one worker.

DeepSpeed 0.19.8 has a Muon of its own, which is not used: ZeRO there orthogonalises before it takes the
gradient norm and clips by it, so that a clip of 1 scales the whole update down; stages differ in their
results; and without CUDA its default iteration runs in float32.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainers.optim.pieces import Master, Piece

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: steepest at zero; singular values end between about 0.7 and 1.2 (Jordan et al.
2024)."""


def orthogonalize(matrix: Tensor, iterations: int) -> Tensor:
    """Return a bfloat16 matrix near U V^T, where U S V^T is the matrix, by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.size(0) > x.size(1)
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def step_scale(shape: Sequence[int]) -> float:
    """Return the factor of the rate that lets one rate serve tall and wide matrices."""
    return math.sqrt(max(1.0, shape[0] / shape[1]))


Routes = list[list[list[Piece]]]
"""What travels, by sender and receiver; every worker knows all of it."""


@dataclass(frozen=True)
class Exchange:
    """Which worker orthogonalises which matrices, and the ranges that travel to it and back."""

    owned: list[list[str]]
    """Names of the matrices of each worker."""
    there: Routes
    back: Routes


def plan_exchange(pieces: Sequence[Sequence[Piece]]) -> Exchange:
    """Give each matrix to one of those who hold most of it, the least burdened of them.

    `pieces` are what each worker holds. A matrix that its owner holds whole does not travel there.
    """
    held = [{piece.name: piece for piece in of_worker} for of_worker in pieces]
    shapes = {piece.name: piece.shape for of_worker in pieces for piece in of_worker}
    workers = range(len(held))
    owned: list[list[str]] = [[] for _ in workers]
    burden = [0] * len(held)
    # Largest first evens the burdens out; names make the order the same on every worker.
    for name in sorted(shapes, key=lambda name: (-_cost(shapes[name]), name)):
        lengths = [parts[name].length if name in parts else 0 for parts in held]
        owner = min(workers, key=lambda worker: (-lengths[worker], burden[worker]))
        owned[owner].append(name)
        burden[owner] += _cost(shapes[name])

    def part(holder: int, name: str) -> list[Piece]:
        return [held[holder][name]] if name in held[holder] else []

    def has_whole(owner: int, name: str) -> bool:
        return any(piece.length == math.prod(piece.shape) for piece in part(owner, name))

    there: Routes = [[[] for _ in workers] for _ in workers]
    back: Routes = [[[] for _ in workers] for _ in workers]
    for owner, names in enumerate(owned):
        for holder in (worker for worker in workers if worker != owner):
            for name in names:
                back[owner][holder] += part(holder, name)
                if not has_whole(owner, name):
                    there[holder][owner] += part(holder, name)
    return Exchange(owned, there, back)


def _cost(shape: Sequence[int]) -> int:
    short, long = sorted(shape)
    return short * short * (2 * long + short)


def travel(
    routes: Routes, rank: int, read: Callable[[Piece], Tensor], device: torch.device
) -> Iterator[tuple[Piece, Tensor]]:
    """Send what `read` returns (1-D bfloat16) for this worker's outgoing ranges; yield those that arrive.

    Collective, unless nothing travels anywhere.
    """
    if not any(pieces for receivers in routes for pieces in receivers):
        return
    arriving = [piece for receivers in routes for piece in receivers[rank]]
    nothing = torch.empty(0, dtype=torch.bfloat16, device=device)
    sent = torch.cat([nothing, *(read(piece) for pieces in routes[rank] for piece in pieces)])
    received = sent.new_empty(sum(piece.length for piece in arriving))
    dist.all_to_all_single(
        received,
        sent,
        output_split_sizes=[sum(piece.length for piece in receivers[rank]) for receivers in routes],
        input_split_sizes=[sum(piece.length for piece in pieces) for pieces in routes[rank]],
    )
    yield from zip(arriving, received.split([piece.length for piece in arriving]), strict=True)


def update_of(matrix: Tensor, fused_rows: Sequence[int], iterations: int) -> Tensor:
    """Return the direction of a matrix's update, in bfloat16.

    Matrices that are fused for speed, one over the other in so many rows each, are orthogonalised apart, as
    if they stood alone.
    """
    return torch.cat(
        [orthogonalize(part, iterations) for part in matrix.split(list(fused_rows) or len(matrix))]
    )


def scaled_ranges(piece: Piece, fused_rows: Sequence[int]) -> Iterator[tuple[slice, float]]:
    """Yield the ranges of a piece that belong to one matrix each, and that matrix's factor of the rate."""
    columns, begin = piece.shape[1], -piece.start
    for rows in fused_rows or piece.shape[:1]:
        end = begin + rows * columns
        if end > 0 and begin < piece.length:
            yield slice(max(begin, 0), min(end, piece.length)), step_scale((rows, columns))
        begin = end


def update_parts(
    exchange: Exchange,
    rank: int,
    parts: dict[str, tuple[Piece, Tensor]],
    update: Callable[[str, Tensor], Tensor],
    device: torch.device,
) -> dict[str, Tensor]:
    """Return this worker's part of every matrix's update, from its part of every matrix; 1-D bfloat16.

    `update` makes the update of a whole matrix, given its name. Collective.
    """
    wholes: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def collect(piece: Piece, data: Tensor) -> None:
        shapes[piece.name] = piece.shape
        if piece.name not in wholes:
            wholes[piece.name] = torch.empty(math.prod(piece.shape), dtype=torch.bfloat16, device=device)
        wholes[piece.name].narrow(0, piece.start, piece.length).copy_(data)

    for name in exchange.owned[rank]:
        collect(*parts[name])
    for piece, data in travel(exchange.there, rank, lambda piece: parts[piece.name][1], device):
        collect(piece, data)
    for name, whole in wholes.items():
        wholes[name] = update(name, whole.view(shapes[name])).reshape(-1)

    def cut(piece: Piece) -> Tensor:
        return wholes[piece.name].narrow(0, piece.start, piece.length)

    updates = {name: cut(parts[name][0]) for name in wholes}
    return updates | {piece.name: data for piece, data in travel(exchange.back, rank, cut, device)}


class Muon(torch.optim.AdamW):
    """AdamW; and Muon for the groups that have `muon=True`, whose tensors may hold parts of matrices.

    Those groups have `momentum` and `iterations` (of Newton-Schulz) too.
    ZeRO cuts parameters up after the optimiser is made, so `attach` must tell it what lies where before the
    first step. Momentum is in float32 and lies like the master weights; only updates travel, in bfloat16.
    """

    def attach(
        self, masters: Iterable[Master], fused_rows: Mapping[str, Sequence[int]], device: torch.device
    ) -> None:
        """Take in what each master tensor holds, the rows of each part of matrices that are several in one, and the
        device that orthogonalises: with offload the masters lie in host memory, where NCCL sends nothing from.
        """
        self._fused_rows, self._device = fused_rows, device
        self._pieces = {master.tensor: master.pieces for master in masters}
        self._exchanges: dict[Tensor, Exchange] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every group that now has tensors. Collective."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group["muon"] and group["params"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict) -> None:
        parts: dict[str, tuple[Piece, Tensor]] = {}
        for master in group["params"]:
            state = self.state[master]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(master)
            average = state["momentum_buffer"].lerp_(master.grad, 1 - group["momentum"])
            ahead = master.grad.lerp(average, group["momentum"]).bfloat16().to(self._device)
            parts |= {piece.name: (piece, piece.of(ahead)) for piece in self._pieces[master]}
        rank = dist.get_rank() if dist.is_initialized() else 0

        def update(name: str, matrix: Tensor) -> Tensor:
            return update_of(matrix, self._fused_rows.get(name, ()), group["iterations"])

        updates = update_parts(self._exchange(group["params"]), rank, parts, update, self._device)
        for master in group["params"]:
            if group["weight_decay"]:
                master.mul_(1 - group["lr"] * group["weight_decay"])
            for piece in self._pieces[master]:
                for here, scale in scaled_ranges(piece, self._fused_rows.get(piece.name, ())):
                    direction = updates[piece.name][here].to(master.device)
                    piece.of(master)[here].add_(direction, alpha=-group["lr"] * scale)

    def _exchange(self, params: list[Tensor]) -> Exchange:
        # ZeRO 3 steps each of its sub-groups by itself; the same tensors always come together.
        if params[0] not in self._exchanges:
            mine = [piece for tensor in params for piece in self._pieces[tensor]]
            everyone = [mine]
            if dist.is_initialized():
                everyone = [[] for _ in range(dist.get_world_size())]
                dist.all_gather_object(everyone, mine)
            self._exchanges[params[0]] = plan_exchange(everyone)
        return self._exchanges[params[0]]
