"""Muon against torch.optim.Muon, and its exchange for any cut of the matrices over any number of workers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainers.optim.muon import (
    Exchange,
    Muon,
    orthogonalize,
    plan_exchange,
    scaled_ranges,
    step_scale,
    update_of,
)
from trainers.optim.pieces import Master, Piece


@pytest.mark.parametrize("iterations", [4, 5])
@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)])
def test_orthogonalized_matrix_keeps_directions_and_levels_scales(
    shape: tuple[int, int], iterations: int
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonalize(matrix, iterations).float() @ vh.T
    assert ((inside.diagonal() > 0.6) & (inside.diagonal() < 1.3)).all()
    assert (inside - torch.diag(inside.diagonal())).abs().max() < 0.05


@pytest.mark.parametrize("iterations", [4, 5])
def test_update_equals_that_of_torch(iterations: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 24), (24, 60), (60, 24)]
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    group = {"params": ours, "lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "muon": True}
    group["iterations"] = iterations
    optimizer = Muon([group])
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, ns_steps=iterations)
    wholes = [Master(p, (Piece(str(i), tuple(p.shape), 0, p.numel(), 0),)) for i, p in enumerate(ours)]
    optimizer.attach(wholes, {}, torch.device("cpu"))
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        # Products of bf16 in another order: 2**-8 of an update of at most lr * scale an element.
        torch.testing.assert_close(a, b, rtol=0, atol=3 * 2**-8 * 0.02 * step_scale(a.shape))


@pytest.mark.parametrize("cuts", [[], [200], [24 * 24, 24 * 36], [5, 24 * 24 + 7, 24 * 80]])
def test_fused_matrices_are_updated_as_if_they_stood_alone(cuts: list[int]) -> None:
    rows = (24, 12, 48)
    parts = [torch.randn(n, 24, generator=torch.Generator().manual_seed(n)) for n in rows]
    expected = torch.cat([orthogonalize(part, 5) for part in parts])
    assert torch.equal(update_of(torch.cat(parts), rows, 5), expected)
    assert not torch.allclose(update_of(torch.cat(parts), [], 5), expected, atol=0.1)
    factors = torch.cat([torch.full((n * 24,), step_scale((n, 24))) for n in rows])
    for start, stop in zip([0, *cuts], [*cuts, 84 * 24], strict=True):
        found = torch.zeros(stop - start)
        for here, scale in scaled_ranges(Piece("w", (84, 24), start, stop - start, 0), rows):
            found[here] += scale
        assert torch.equal(found, factors[start:stop])


def cut(shapes: list[tuple[int, int]], cuts: list[int]) -> list[list[Piece]]:
    """Join matrices 0, 1, … and cut the whole at `cuts`, one part for each worker."""
    pieces: list[list[Piece]] = []
    for begin, end in zip([0, *cuts], [*cuts, sum(map(math.prod, shapes))], strict=True):
        pieces.append([])
        offset = 0
        for index, shape in enumerate(shapes):
            start, stop = max(begin, offset), min(end, offset + math.prod(shape))
            if start < stop:
                pieces[-1].append(Piece(str(index), shape, start - offset, stop - start, start - begin))
            offset += math.prod(shape)
    return pieces


@st.composite
def cuts_of_matrices(draw: st.DrawFn) -> list[list[Piece]]:
    side = st.integers(1, 6)
    shapes = draw(st.lists(st.tuples(side, side), min_size=1, max_size=6))
    places = st.integers(0, sum(map(math.prod, shapes)))
    return cut(shapes, sorted(draw(st.lists(places, max_size=4))))


@given(cuts_of_matrices())
def test_each_owner_receives_its_matrices_whole_and_each_holder_its_part_back(
    pieces: list[list[Piece]],
) -> None:
    exchange = plan_exchange(pieces)
    names = sorted({piece.name for held in pieces for piece in held})
    assert sorted(name for owned in exchange.owned for name in owned) == names
    for worker, held in enumerate(pieces):
        got = held + [piece for receivers in exchange.there for piece in receivers[worker]]
        for name in exchange.owned[worker]:
            parts = [piece for piece in got if piece.name == name]
            elements = [i for piece in parts for i in range(piece.start, piece.start + piece.length)]
            assert sorted(elements) == list(range(math.prod(parts[0].shape)))
        back = {piece.name: piece for receivers in exchange.back for piece in receivers[worker]}
        own = {name: piece for piece in held if (name := piece.name) in exchange.owned[worker]}
        assert own | back == {piece.name: piece for piece in held}
        assert exchange.there[worker][worker] == exchange.back[worker][worker] == []


@given(st.integers(1, 5), st.integers(1, 12))
def test_matrices_that_all_hold_are_dealt_evenly_and_do_not_travel_there(workers: int, matrices: int) -> None:
    everyone = [[Piece(str(i), (4, 4), 0, 16, 16 * i) for i in range(matrices)]] * workers
    exchange: Exchange = plan_exchange(everyone)
    counts = [len(owned) for owned in exchange.owned]
    assert max(counts) - min(counts) <= 1
    assert not any(pieces for receivers in exchange.there for pieces in receivers)
