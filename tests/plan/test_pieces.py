"""Pieces of sharded tensors, found by region."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import torch
from hypothesis import given

from shardwise.geometry import Box, TensorSpec
from shardwise.plan.fragments import Fragment, HeldPart, HeldTensor, Part
from shardwise.plan.reads import MOST_REGIONS, ChunkIndex, SourceChunk, wanted_regions
from shardwise.plan.views import factor_shape, refine_box


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...], least: int = 0) -> Box:
    """A region of a shape."""
    offsets, sizes = [], []
    for n in shape:
        start = draw(st.integers(0, n - least))
        offsets.append(start)
        sizes.append(draw(st.integers(least, n - start)))
    return Box(tuple(offsets), tuple(sizes))


shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)


@st.composite
def cut_into_pieces(draw: st.DrawFn) -> tuple[tuple[int, ...], list[SourceChunk]]:
    """A tensor cut along some of its dimensions, uneven and empty pieces among them, some lost, in any order."""
    shape = draw(shapes)
    edges = [sorted([*draw(st.lists(st.integers(0, n), max_size=4)), 0, n]) for n in shape]
    ranges = [list(itertools.pairwise(each)) for each in edges]
    found = [Box(tuple(a for a, _ in each), tuple(b - a for a, b in each)) for each in itertools.product(*ranges)]
    kept = draw(st.permutations(list(dict.fromkeys(found))))[: draw(st.integers(0, 60))]
    return shape, [SourceChunk(box, number % 3, 8 * number) for number, box in enumerate(kept)]


@given(cut_into_pieces(), st.data())
def test_no_piece_of_a_region_is_overlooked(
    tensor: tuple[tuple[int, ...], list[SourceChunk]], data: st.DataObject
) -> None:
    shape, chunks = tensor
    region = data.draw(boxes(shape, 1))
    found = ChunkIndex(chunks).touching(region)
    assert {chunk for chunk in chunks if chunk.box.intersect(region) is not None} <= set(found) <= set(chunks)
    assert len(set(found)) == len(found)


@given(shapes.filter(len), st.integers(0, 2), st.integers(2, 40), st.data())
def test_what_is_found_does_not_grow_with_the_pieces(
    rest: tuple[int, ...], dim: int, pieces: int, data: st.DataObject
) -> None:
    dim = min(dim, len(rest))
    shape = (*rest[:dim], pieces * 2, *rest[dim:])
    chunks = []
    for number in range(pieces):
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[dim], sizes[dim] = number * 2, 2
        chunks.append(SourceChunk(Box(tuple(offsets), tuple(sizes)), number, 0))
    wanted = data.draw(st.sampled_from(chunks))
    assert list(ChunkIndex(chunks).touching(wanted.box)) == [wanted]


def held(shape: tuple[int, ...], grid: tuple[int, ...], found: list[Box]) -> HeldTensor:
    fragments = tuple(Fragment(box, torch.empty(box.sizes)) for box in found)
    return HeldTensor(TensorSpec("t", shape, "F32"), grid, (HeldPart(Part(shape), (), fragments),))


@given(st.data())
def test_regions_cover_what_is_held_in_a_grid(data: st.DataObject) -> None:
    factors = data.draw(
        st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3)
    )
    shape, grid = tuple(math.prod(each) for each in factors), tuple(n for each in factors for n in each)
    found = data.draw(st.lists(boxes(grid, 1) | boxes(grid), min_size=1, max_size=MOST_REGIONS + 3))
    regions = wanted_regions(held(shape, grid, found))
    assert len(regions) <= MOST_REGIONS
    pieces = {refined for region in regions for refined in refine_box(region, factor_shape(shape, grid))}
    for box in found:
        for index in itertools.product(*(range(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))):
            assert any(Box(index, (1,) * len(grid)).intersect(piece) is not None for piece in pieces)


def test_regions_of_a_few_boxes_are_these() -> None:
    two = [Box((0, 0), (2, 5)), Box((6, 0), (2, 5))]
    assert wanted_regions(held((8, 5), (8, 5), [*two, Box((3, 0), (0, 5))])) == two


def test_a_scalar_is_wanted_whole() -> None:
    assert wanted_regions(held((), (), [Box((), ())])) == [Box((), ())]
    chunk = SourceChunk(Box((), ()), 0, 8)
    assert list(ChunkIndex([chunk]).touching(Box((), ()))) == [chunk]
