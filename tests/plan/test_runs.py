"""Boxes as runs of bytes, by property."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from shardwise.geometry import Box, flat_offset, runs, split_rows, stride_of


@st.composite
def boxes(draw: st.DrawFn) -> tuple[Box, tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    offsets = tuple(draw(st.integers(0, n - 1)) for n in shape)
    sizes = tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
    return Box(offsets, sizes), shape


def elements(box: Box, shape: tuple[int, ...]) -> list[int]:
    import torch

    whole = torch.arange(math.prod(shape)).reshape(shape)
    part = whole[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))]
    return [int(v) for v in part.reshape(-1).tolist()]


@given(boxes())
def test_runs_enumerate_the_elements_in_file_order(case: tuple[Box, tuple[int, ...]]) -> None:
    box, shape = case
    found = [e for first, count, _ in runs(box, shape) for e in range(first, first + count)]
    assert found == elements(box, shape)


@given(boxes())
def test_runs_are_as_long_as_can_be(case: tuple[Box, tuple[int, ...]]) -> None:
    box, shape = case
    found = list(runs(box, shape))
    how = stride_of(box, shape)
    assert len(found) == how.count
    assert {count for _, count, _ in found} == {how.run}
    want = elements(box, shape)
    # No two consecutive runs touch, unless a run is as long as the dimensions that are whole allow: then the box would
    # have had a dimension that is cut without need.
    if how.count > 1:
        gaps = [b[0] - (a[0] + a[1]) for a, b in itertools.pairwise(found)]
        assert max(gaps) > 0
    assert len(want) == how.run * how.count


@given(boxes())
def test_the_index_of_a_run_finds_it_in_the_data(case: tuple[Box, tuple[int, ...]]) -> None:
    import torch

    box, shape = case
    whole = torch.arange(math.prod(shape)).reshape(shape)
    data = whole[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))]
    for first, count, index in runs(box, shape):
        assert data[index].reshape(-1).tolist() == list(range(first, first + count))


def test_an_empty_box_has_no_run() -> None:
    assert list(runs(Box((1, 0), (0, 3)), (2, 3))) == []
    assert list(runs(Box((), ()), ())) == [(0, 1, ())]


@given(boxes(), st.integers(1, 5))
def test_rows_split_evenly_and_without_overlap(case: tuple[Box, tuple[int, ...]], parts: int) -> None:
    box, shape = case
    pieces = [split_rows(box, parts, index) for index in range(parts)]
    found = [e for piece in pieces if piece is not None for e in elements(piece, shape)]
    assert sorted(found) == elements(box, shape)
    assert all(piece is None or piece.numel for piece in pieces)
    rows = max([n for n in box.sizes if n > 1][:1], default=1)
    sizes = [0 if piece is None else piece.numel for piece in pieces]
    assert max(sizes) - min(sizes) <= box.numel // rows


def test_flat_offset_is_row_major() -> None:
    assert flat_offset((1, 2, 3), (4, 5, 6)) == 1 * 30 + 2 * 6 + 3
    assert flat_offset((), ()) == 0
