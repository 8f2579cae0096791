"""Views by property: whatever the factoring, permutation and cut, an element is where indexing the whole puts it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.geometry import Box
from shardwise.plan.placement import Placement, Replicated, Sharded, Strided, regions
from shardwise.plan.views import (
    Axis,
    AxisView,
    factor_shape,
    hub_boxes,
    hub_views,
    refine_box,
    refine_range,
)


def identity_view(shape: tuple[int, ...]) -> AxisView:
    """The view under which hub and native tensor are the same."""
    return AxisView(tuple((n,) for n in shape), shape, tuple(Axis(d, 0, 0, n) for d, n in enumerate(shape)))


@dataclass(frozen=True)
class Case:
    """A native tensor's shape, a view of it and how it is spread."""

    shape: tuple[int, ...]
    view: AxisView
    mesh: tuple[int, ...]
    placements: tuple[Placement, ...]

    @property
    def whole(self) -> torch.Tensor:
        return torch.arange(1, math.prod(self.shape) + 1).reshape(self.shape)

    @property
    def hub(self) -> torch.Tensor:
        """The hub grid by plain indexing; 0 where this view puts nothing."""
        out = torch.zeros(self.view.hub_grid, dtype=torch.int64)
        grid = self.whole.reshape([n for factors in self.view.native_grid for n in factors])
        for dim, index in self.view.fixed:
            grid = grid.narrow(dim, index, 1)
        for axis in self.view.axes:
            grid = grid.narrow(axis.native, axis.start, axis.length)
        order = [axis.native for axis in self.view.axes]
        rest = [d for d in range(grid.dim()) if d not in order]
        part = grid.permute(order + rest).reshape([axis.length for axis in self.view.axes])
        out[tuple(slice(a.hub_start, a.hub_start + a.length) for a in self.view.axes)] = part
        return out


factors = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], AxisView]:
    native_grid = tuple(draw(st.lists(factors, min_size=1, max_size=3)))
    sizes = [n for parts in native_grid for n in parts]
    order = draw(st.permutations(range(len(sizes))))
    kept = order[: draw(st.integers(1, len(sizes)))]
    fixed = tuple((d, draw(st.integers(0, sizes[d] - 1))) for d in sorted(set(order) - set(kept)))
    axes, grid = [], []
    for dim in kept:
        start = draw(st.integers(0, sizes[dim] - 1))
        length = draw(st.integers(1, sizes[dim] - start))
        before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        axes.append(Axis(dim, start, before, length))
        grid.append(before + length + after)
    return tuple(math.prod(parts) for parts in native_grid), AxisView(native_grid, tuple(grid), tuple(axes), fixed)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape, view = draw(views())
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    dims = st.integers(0, len(shape) - 1)
    placement = st.one_of(st.just(Replicated()), st.builds(Sharded, dims), st.builds(Strided, dims, st.integers(1, 3)))
    return Case(shape, view, mesh, tuple(draw(placement) for _ in mesh))


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_the_ranks_together_hold_every_hub_element_as_often_as_the_mesh_replicates(case: Case) -> None:
    found, count = torch.zeros_like(case.hub), torch.zeros_like(case.hub)
    for coordinate in itertools.product(*map(range, case.mesh)):
        for region in regions(case.shape, case.mesh, case.placements, coordinate):
            local = case.whole[_slices(region.box)]
            for box, data in hub_views(case.view, region.box, local):
                assert data.shape == box.sizes
                found[_slices(box)] = data
                count[_slices(box)] += 1
    replicas = math.prod(n for n, p in zip(case.mesh, case.placements, strict=True) if isinstance(p, Replicated))
    assert torch.equal(found, case.hub)
    assert torch.equal(count, (case.hub > 0) * replicas)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_boxes_are_those_of_the_views_and_views_share_memory(case: Case) -> None:
    for coordinate in itertools.product(*map(range, case.mesh)):
        for region in regions(case.shape, case.mesh, case.placements, coordinate):
            local = case.whole[_slices(region.box)].clone()
            pairs = hub_views(case.view, region.box, local)
            assert tuple(box for box, _ in pairs) == hub_boxes(case.view, region.box)
            for _, data in pairs:
                data.zero_()
            touched = int((local == 0).sum())
            assert touched == sum(box.numel for box, _ in pairs)


@given(views(), st.data())
def test_strided_memory_is_followed(made: tuple[tuple[int, ...], AxisView], data: st.DataObject) -> None:
    shape, view = made
    whole = torch.arange(math.prod(shape)).reshape(shape)
    order = data.draw(st.permutations(range(len(shape))))
    inverse = sorted(range(len(shape)), key=order.__getitem__)
    strided = whole.permute(order).contiguous().permute(inverse)
    plain = hub_views(view, Box.whole(shape), whole)
    other = hub_views(view, Box.whole(shape), strided)
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(plain, other, strict=True))


@given(factors, st.data())
def test_a_refined_range_is_the_range(parts: tuple[int, ...], data: st.DataObject) -> None:
    n = math.prod(parts)
    start = data.draw(st.integers(0, n))
    length = data.draw(st.integers(0, n - start))
    grid = torch.arange(n).reshape(parts)
    runs = [grid[_slices(box)].reshape(-1) for box in refine_range(start, length, parts)]
    assert torch.cat([torch.empty(0, dtype=torch.int64), *runs]).tolist() == list(range(start, start + length))


@given(st.lists(factors, min_size=0, max_size=3), st.data())
def test_a_refined_box_is_the_box(grid: list[tuple[int, ...]], data: st.DataObject) -> None:
    shape = tuple(math.prod(parts) for parts in grid)
    offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    sizes = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
    whole = torch.zeros(shape, dtype=torch.int64)
    whole[_slices(Box(offsets, sizes))] = 1
    fine = torch.zeros([n for parts in grid for n in parts], dtype=torch.int64)
    for box in refine_box(Box(offsets, sizes), tuple(grid)):
        fine[_slices(box)] += 1
    assert torch.equal(fine.reshape(shape), whole)


@given(st.lists(factors, min_size=1, max_size=4))
def test_factor_shape_groups_the_factors(grid: list[tuple[int, ...]]) -> None:
    shape = tuple(math.prod(parts) for parts in grid)
    flat = tuple(n for parts in grid for n in parts)
    found = factor_shape(shape, flat)
    assert tuple(math.prod(parts) for parts in found) == shape
    assert tuple(n for parts in found for n in parts) == flat


@pytest.mark.parametrize(("shape", "grid"), [((6, 4), (4, 6)), ((6,), (2, 2)), ((2, 3), (2,)), ((2,), (2, 3))])
def test_factor_shape_refuses_what_is_no_refinement(shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not refine"):
        factor_shape(shape, grid)


@given(st.lists(st.integers(0, 4), max_size=4).map(tuple))
def test_the_identity_view_changes_nothing(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).reshape(shape)
    pairs = hub_views(identity_view(shape), Box.whole(shape), whole)
    if whole.numel() == 0:
        assert sum(box.numel for box, _ in pairs) == 0
    else:
        [(box, data)] = pairs
        assert box == Box.whole(shape)
        assert torch.equal(data, whole)
