"""Hub tensors as views of native ones, in index arithmetic. Pure.

A model's own parameters and the tensors of its Hugging Face files often differ by shape only: experts fused into one
parameter and stored one by one, a gate and an up projection in one matrix, a transposed weight. Where the hub tensor is
a strided view of the native one, an `AxisView` says which element lies where, and a rank can find the file bytes of
what it holds without communication or a copy.

The trick that keeps this simple is the *grid*: a shape with more, smaller dimensions and the same row-major order. The
bytes of a tensor of shape ``(h * d, n)`` and those of grid ``(h, d, n)`` are the same, so fusing and splitting
dimensions need no rule of their own, and every remaining rule is a permutation plus ranges.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch

from shardwise.geometry import Box


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of the hub grid, along the dimension ``native`` of the native grid, for ``length`` indices.

    ``start`` is the first native index; it lands at ``hub_start`` in the hub dimension, not 0 where several native
    tensors are joined.
    """

    native: int
    start: int
    hub_start: int
    length: int


@dataclass(frozen=True, slots=True)
class AxisView:
    """A region of a hub tensor as a strided view of a native tensor.

    Attributes:
        native_grid: For each native dimension, its factors: ``((2, 3), (4,))`` reads a ``(6, 4)`` tensor as
            ``(2, 3, 4)``.
        hub_grid: The hub tensor's shape, refined; one entry for each item of ``axes``.
        axes: For each hub grid dimension, the native grid dimension behind it.
        fixed: ``(native grid dimension, index)`` of the dimensions that the hub tensor does not have.
    """

    native_grid: tuple[tuple[int, ...], ...]
    hub_grid: tuple[int, ...]
    axes: tuple[Axis, ...]
    fixed: tuple[tuple[int, int], ...] = ()


def refine_range(start: int, length: int, factors: tuple[int, ...]) -> tuple[Box, ...]:
    """Cut a range of one dimension into boxes of its factors, each a consecutive run of the range, in order."""
    if length == 0:
        return ()
    if len(factors) == 1:
        return (Box((start,), (length,)),)
    inner = math.prod(factors[1:])
    out: list[Box] = []
    end = start + length
    while start < end:
        row, within = divmod(start, inner)
        if within == 0 and end - start >= inner:
            rows = (end - start) // inner
            out.append(Box((row, *(0 for _ in factors[1:])), (rows, *factors[1:])))
            start += rows * inner
            continue
        size = min(inner - within, end - start)
        out += [Box((row, *sub.offsets), (1, *sub.sizes)) for sub in refine_range(within, size, factors[1:])]
        start += size
    return tuple(out)


@functools.lru_cache(maxsize=4096)  # the views of one fused tensor share few grids, and a layer is like the one before
def refine_box(box: Box, grid: tuple[tuple[int, ...], ...]) -> tuple[Box, ...]:
    """Express a box of a tensor in a grid of it (factors for each dimension), as few boxes as that takes."""
    per_dim = map(refine_range, box.offsets, box.sizes, grid)
    return tuple(
        Box(tuple(o for part in each for o in part.offsets), tuple(s for part in each for s in part.sizes))
        for each in itertools.product(*per_dim)
    )


def factor_shape(shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Group the dimensions of ``grid`` by the dimension of ``shape`` that they refine.

    Raises `ValueError`: ``grid`` is not a refinement of ``shape``.
    """
    out: list[tuple[int, ...]] = []
    rest = list(grid)
    for position, n in enumerate(shape):
        factors: list[int] = []
        while rest and (not factors or math.prod(factors) != n):
            factors.append(rest.pop(0))
        if position == len(shape) - 1:
            factors += rest
            rest = []
        if math.prod(factors) != n or not factors:
            raise ValueError(f"grid {grid} does not refine shape {shape}")
        out.append(tuple(factors))
    if math.prod(rest) != 1:
        raise ValueError(f"grid {grid} does not refine shape {shape}")
    return tuple(out)


def _through(view: AxisView, box: Box) -> Box | None:
    """The hub grid box behind a native grid box, or ``None`` where the view does not touch it."""
    for dim, index in view.fixed:
        if not 0 <= index - box.offsets[dim] < box.sizes[dim]:
            return None
    offsets, sizes = [], []
    for axis in view.axes:
        start = box.offsets[axis.native]
        low = max(start, axis.start)
        high = min(start + box.sizes[axis.native], axis.start + axis.length)
        if low >= high:
            return None
        offsets.append(low - axis.start + axis.hub_start)
        sizes.append(high - low)
    return Box(tuple(offsets), tuple(sizes))


def hub_boxes(view: AxisView, box: Box) -> tuple[Box, ...]:
    """The hub grid boxes that a box of the native tensor covers."""
    found = (_through(view, refined) for refined in refine_box(box, view.native_grid))
    return tuple(hub for hub in found if hub is not None)


def hub_views(view: AxisView, box: Box, data: torch.Tensor) -> tuple[tuple[Box, torch.Tensor], ...]:
    """As `hub_boxes`, each with a view of its shape of ``data``, a tensor of shape ``box.sizes`` and any strides."""
    return tuple((hub, _slice(view, hub, box, data)) for hub in hub_boxes(view, box))


def _slice(view: AxisView, hub: Box, box: Box, data: torch.Tensor) -> torch.Tensor:
    """The part of ``data`` behind a hub box that lies in it: one strided view, since tensors have many of them."""
    offset = data.storage_offset()
    grid_strides: list[int] = []
    for factors, start, stride in zip(view.native_grid, box.offsets, data.stride(), strict=True):
        offset -= start * stride
        inner = math.prod(factors)
        for factor in factors:
            inner //= factor
            grid_strides.append(stride * inner)
    for dim, index in view.fixed:
        offset += index * grid_strides[dim]
    for axis, low in zip(view.axes, hub.offsets, strict=True):
        offset += (low - axis.hub_start + axis.start) * grid_strides[axis.native]
    return data.as_strided(hub.sizes, [grid_strides[axis.native] for axis in view.axes], offset)
