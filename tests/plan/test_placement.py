"""Regions by property, against torch's own way of splitting tensors."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tests.support.simulate import local_tensor, meshes, placements, shapes

from shardwise.geometry import Box
from shardwise.plan.placement import (
    Placement,
    Replicated,
    Sharded,
    Strided,
    chunk,
    regions,
    shard_coordinate,
)


def replica_count(mesh_shape: tuple[int, ...], placements: tuple[Placement, ...]) -> int:
    """How many coordinates of the mesh hold the same bytes."""
    return math.prod(n for n, p in zip(mesh_shape, placements, strict=True) if isinstance(p, Replicated))


@st.composite
def spreads(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]]:
    shape, mesh = draw(shapes), draw(meshes)
    return shape, mesh, draw(placements(len(shape), mesh))


def inside(tensor: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    return tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]


@given(spreads())
@example(((8, 3), (2, 2), (Strided(0, 2), Sharded(0))))  # FSDP2 over tensor parallelism
@example(((7,), (4,), (Sharded(0),)))
@example(((2, 5), (4, 2), (Sharded(0), Sharded(0))))
@example(((12, 2), (2,), (Strided(0, 3),)))  # a fused weight, packed
@example(((5, 2), (3,), (Strided(0, 2),)))
def test_regions_are_what_torch_gives_each_rank(
    spread: tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]],
) -> None:
    shape, mesh, kinds = spread
    whole = torch.arange(1, math.prod(shape) + 1).reshape(shape)
    for where in itertools.product(*(range(n) for n in mesh)):
        local = local_tensor(whole, mesh, kinds, where)
        rebuilt = torch.zeros_like(local)
        for region in regions(shape, mesh, kinds, where):
            assert region.box.numel > 0 or math.prod(shape) == 0
            inside(rebuilt, region.local, region.box.sizes).copy_(inside(whole, region.box.offsets, region.box.sizes))
        assert torch.equal(rebuilt, local)


@given(spreads())
def test_together_the_ranks_hold_every_element_equally_often(
    spread: tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]],
) -> None:
    shape, mesh, kinds = spread
    seen = torch.zeros(shape, dtype=torch.int64)
    for where in itertools.product(*(range(n) for n in mesh)):
        for region in regions(shape, mesh, kinds, where):
            inside(seen, region.box.offsets, region.box.sizes).add_(1)
    assert (seen == replica_count(mesh, kinds)).all()


@given(spreads())
def test_equal_shard_coordinates_hold_the_same(
    spread: tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]],
) -> None:
    shape, mesh, kinds = spread
    held: dict[tuple[int, ...], set[tuple[Box, ...]]] = {}
    for where in itertools.product(*(range(n) for n in mesh)):
        boxes = tuple(region.box for region in regions(shape, mesh, kinds, where))
        held.setdefault(shard_coordinate(kinds, where), set()).add(boxes)
    assert all(len(found) == 1 for found in held.values())
    assert len(held) * replica_count(mesh, kinds) == math.prod(mesh)


@given(st.integers(0, 50), st.integers(1, 12))
def test_chunks_are_those_of_torch(length: int, parts: int) -> None:
    pieces = torch.chunk(torch.arange(length), parts)
    want = [p.tolist() for p in pieces if p.numel()]
    got = [list(range(s, s + n)) for s, n in (chunk(length, parts, i) for i in range(parts)) if n]
    assert got == want


def test_a_packed_weight_is_several_regions_and_fsdp_over_tp_is_one() -> None:
    packed = regions((12, 2), (2,), (Strided(0, 3),), (1,))
    assert [(r.box.offsets[0], r.box.sizes[0], r.local[0]) for r in packed] == [(2, 2, 0), (6, 2, 2), (10, 2, 4)]
    assert len(regions((12, 2), (2, 2), (Strided(0, 2), Sharded(0)), (1, 0))) == 1


def test_an_empty_shard_has_no_region() -> None:
    assert regions((2, 5), (4,), (Sharded(0),), (3,)) == ()
    assert regions((), (4,), (Replicated(),), (3,))[0].box.numel == 1
