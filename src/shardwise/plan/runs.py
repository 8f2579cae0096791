"""Boxes as runs of bytes. Pure.

A box of a row-major tensor is one contiguous run, or several of equal length at regular distances. ``runs`` and the
functions beside it are where boxes become file offsets, for the writer and the reader alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from shardwise.types import Box


@dataclass(frozen=True, slots=True)
class Stride:
    """How a box lies in its tensor.

    Attributes:
        outer: Number of leading dimensions over which the runs are enumerated.
        run: Elements in each run.
        count: Number of runs.
    """

    outer: int
    run: int
    count: int


@lru_cache(maxsize=65536)
def stride_of(box: Box, shape: tuple[int, ...]) -> Stride:
    """Into how many runs of which length a box falls in a row-major tensor of ``shape``."""
    outer = len(shape)
    while outer > 0 and box.sizes[outer - 1] == shape[outer - 1]:
        outer -= 1
    # Dimension outer - 1 is the last one that is cut; from there on the box is contiguous.
    outer = max(outer - 1, 0)
    while outer > 0 and box.sizes[outer - 1] == 1:
        outer -= 1
    return Stride(outer, math.prod(box.sizes[outer:]), math.prod(box.sizes[:outer]))


def flat_offset(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Row-major position of an element."""
    position = 0
    for i, n in zip(index, shape, strict=True):
        position = position * n + i
    return position


@lru_cache(maxsize=65536)  # tensors of one kind have equal boxes
def only_run(box: Box, shape: tuple[int, ...]) -> int | None:
    """First element of a box that is one run of a row-major tensor of ``shape``; ``None`` for several runs or none."""
    if box.numel == 0 or stride_of(box, shape).count != 1:
        return None
    return flat_offset(box.offsets, shape)


def runs(box: Box, shape: tuple[int, ...]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Enumerate the runs of a box in file order.

    Yields:
        ``(first element in the tensor, number of elements, index of the run along the outer dimensions)``. The last
        is relative to the box.
    """
    if box.numel == 0:
        return
    how = stride_of(box, shape)
    inner = math.prod(shape[how.outer :])
    tail = flat_offset(box.offsets[how.outer :], shape[how.outer :])
    for index in itertools.product(*(range(n) for n in box.sizes[: how.outer])):
        at = tuple(i + o for i, o in zip(index, box.offsets[: how.outer], strict=True))
        yield flat_offset(at, shape[: how.outer]) * inner + tail, how.run, index


def split_rows(box: Box, parts: int, index: int) -> Box | None:
    """Part ``index`` of ``parts`` nearly equal pieces along the first dimension that has more than one row.

    Returns:
        ``None`` where that piece is empty.
    """
    for dim, size in enumerate(box.sizes):
        if size > 1:
            low, high = size * index // parts, size * (index + 1) // parts
            if low == high:
                return None
            return Box(
                (*box.offsets[:dim], box.offsets[dim] + low, *box.offsets[dim + 1 :]),
                (*box.sizes[:dim], high - low, *box.sizes[dim + 1 :]),
            )
    return box if index == 0 else None
