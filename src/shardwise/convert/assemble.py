"""From provenance to `AxisView`: the last step of deriving a conversion. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from shardwise.convert.provenance import Provenance, SourcePiece, Span, Untraceable, cumulative, refine_grid, simplify
from shardwise.plan.views import Axis, AxisView

#: Where a piece wraps around in its native tensor it is cut at the wrap, but not more often than this.
_MAX_WRAPS = 256


def axis_views(tensor: Provenance, native_shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, AxisView | None], ...]:
    """Express every piece of a traced tensor as a view of its native tensor; `Untraceable` where one is none on a grid.

    Pairs of a source number and a view, all views on one hub grid; a single ``None`` view where the hub tensor is the
    whole of one native tensor in its own shape.
    """
    tensor = simplify(tensor)
    if _is_whole(tensor, native_shapes):
        return ((tensor.pieces[0].source, None),)
    for dim, position in enumerate(tensor.dims):
        at = sum(len(factors) for factors in tensor.dims[:dim])
        cuts = _wanted_cuts(tensor, at, len(position), native_shapes)
        tensor = refine_grid(tensor, dim, cuts)
    out: list[tuple[int, AxisView | None]] = []
    for piece in tensor.pieces:
        native = native_shapes[piece.source]
        out += ((part.source, _view(part, tensor.grid, native)) for part in _unwrap(piece, native))
    return tuple(out)


def _is_whole(tensor: Provenance, native_shapes: Sequence[tuple[int, ...]]) -> bool:
    if len(tensor.pieces) != 1:
        return False
    piece = tensor.pieces[0]
    shape = native_shapes[piece.source]
    if tensor.shape != shape or any(len(factors) != 1 for factors in tensor.dims):
        return False
    return all(
        span.length == n and (n == 1 or span.stride == stride)
        for span, n, stride in zip(piece.spans, shape, cumulative(shape), strict=True)
    )


def _native_cuts(piece: SourcePiece, shape: tuple[int, ...]) -> list[int]:
    """Products of the inner sizes of the native grid that the piece needs, ascending, the whole included."""
    cuts = {math.prod(shape[i:]) for i in range(len(shape))} | {1}
    cuts |= {span.stride for span in piece.spans if span.length > 1}
    ordered = sorted(cuts)
    if ordered[0] < 1 or any(big % small for small, big in itertools.pairwise(ordered)):
        raise Untraceable("strides that do not nest")
    return ordered


def _wanted_cuts(tensor: Provenance, at: int, count: int, native_shapes: Sequence[tuple[int, ...]]) -> set[int]:
    """Where a hub dimension has to be cut so that no grid dimension runs over an edge of a native dimension."""
    wanted: set[int] = set()
    inner = math.prod(tensor.grid[at : at + count])
    for position in range(at, at + count):
        inner //= tensor.grid[position]
        for piece in tensor.pieces:
            span = piece.spans[position]
            if span.length > 1:
                cuts = _native_cuts(piece, native_shapes[piece.source])
                wanted |= {c // span.stride * inner for c in cuts if span.stride < c < span.stride * span.length}
    return wanted


def _extents(piece: SourcePiece, shape: tuple[int, ...]) -> tuple[list[int], dict[int, int], dict[int, int]]:
    """Native cuts; and by stride the extent of the native grid dimension and the piece's first index in it."""
    cuts = _native_cuts(piece, shape)
    extent = {low: high // low for low, high in itertools.pairwise(cuts)}
    first = {stride: piece.base // stride % size for stride, size in extent.items()}
    return cuts, extent, first


def _unwrap(piece: SourcePiece, shape: tuple[int, ...]) -> list[SourcePiece]:
    """Cut a piece wherever it runs over the edge of a native grid dimension."""
    _, extent, first = _extents(piece, shape)
    wrapping = [
        at
        for at, span in enumerate(piece.spans)
        if span.length > 1 and first.get(span.stride, 0) + span.length > extent.get(span.stride, 0)
    ]
    if not wrapping:
        return [piece]
    at = wrapping[0]
    span = piece.spans[at]
    if span.stride not in extent:
        raise Untraceable("a stride as large as the tensor")
    out: list[SourcePiece] = []
    start, done = first[span.stride], 0
    while done < span.length:
        length = min(extent[span.stride] - start, span.length - done)
        new = Span(span.start + done, length, span.stride)
        spans = (*piece.spans[:at], new, *piece.spans[at + 1 :])
        out += _unwrap(SourcePiece(piece.source, piece.base + done * span.stride, spans), shape)
        done, start = done + length, 0
        if len(out) > _MAX_WRAPS:
            raise Untraceable("a piece that wraps around too often")
    return out


def _view(piece: SourcePiece, grid: tuple[int, ...], shape: tuple[int, ...]) -> AxisView:
    if not shape:
        raise Untraceable("a scalar that becomes part of a tensor")
    _, extent, first = _extents(piece, shape)
    strides = [span.stride for span in piece.spans if span.length > 1]
    if len(set(strides)) != len(strides):
        raise Untraceable("an element that is used twice")
    native_grid, position_of = _native_grid(shape, extent, sum(span.length == 1 for span in piece.spans))
    ones = iter(range(sum(map(len, native_grid)) - sum(span.length == 1 for span in piece.spans), 1 << 30))
    axes = tuple(
        Axis(next(ones), 0, span.start, 1)
        if span.length == 1
        else Axis(position_of[span.stride], first[span.stride], span.start, span.length)
        for span in piece.spans
    )
    used = {axis.native for axis in axes}
    index_of = {position: first[stride] for stride, position in position_of.items()}
    fixed = tuple((p, index_of.get(p, 0)) for p in range(sum(map(len, native_grid))) if p not in used)
    return AxisView(native_grid, grid, axes, fixed)


def _native_grid(
    shape: tuple[int, ...], extent: dict[int, int], ones: int
) -> tuple[tuple[tuple[int, ...], ...], dict[int, int]]:
    """The native grid, and the position in it of each stride.

    ``ones`` dimensions of size 1 are at its end, for hub dimensions that nothing walks along.
    """
    grid: list[tuple[int, ...]] = []
    position_of: dict[int, int] = {}
    position = 0
    for n, inner in zip(shape, cumulative(shape), strict=True):
        strides = sorted((s for s in extent if inner <= s < inner * n), reverse=True)
        for stride in strides:
            position_of[stride] = position
            position += 1
        grid.append(tuple(extent[s] for s in strides) or (1,))
        position += not strides
    grid[-1] = (*grid[-1], *(1,) * ones)
    return tuple(grid), position_of
