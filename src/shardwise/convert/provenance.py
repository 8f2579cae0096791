"""Where every element of a tensor came from, without the elements: the algebra behind tracing a conversion rule. Pure.

A `Provenance` describes a tensor on a grid (a refinement of its shape with the same row-major order). Each of its
`SourcePiece`s fills one box of the grid with elements of one source tensor, at a linear address that is affine in the
grid index. Reshapes refine or merge the grid, permutations reorder it, slices restrict the pieces, and joins put pieces
side by side. So a copy costs nothing and loses nothing, and an operation that this algebra cannot express raises
`Untraceable`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shardwise.plan.views import Axis, AxisView, refine_range

#: More pieces than this in one tensor mean that a view is the wrong tool.
MAX_PIECES = 4096


class Untraceable(Exception):  # noqa: N818  control flow inside the package, never seen by a caller
    """The result is not a rearrangement that boxes can describe."""


@dataclass(frozen=True, slots=True)
class Span:
    """A piece along one grid dimension: ``length`` indices from ``start``, ``stride`` source elements apart."""

    start: int
    length: int
    stride: int


@dataclass(frozen=True, slots=True)
class SourcePiece:
    """A box of the grid, filled from one source tensor."""

    source: int  #: Number of the source tensor.
    base: int  #: Linear (row-major) index in the source of the piece's first element.
    spans: tuple[Span, ...]  #: One for each grid dimension.


@dataclass(frozen=True, slots=True)
class Provenance:
    """A tensor's shape, its grid and what fills it."""

    dims: tuple[tuple[int, ...], ...]  #: For each dimension of the tensor its factors; their concatenation is the grid.
    pieces: tuple[SourcePiece, ...]  #: Disjoint; together they fill the grid.

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(math.prod(factors) for factors in self.dims)

    @property
    def grid(self) -> tuple[int, ...]:
        """The grid: all factors in a row."""
        return tuple(n for factors in self.dims for n in factors)


def cumulative(sizes: Sequence[int]) -> list[int]:
    """Row-major strides of ``sizes``."""
    return [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]


def whole(source: int, shape: tuple[int, ...]) -> Provenance:
    """The source tensor itself."""
    spans = tuple(Span(0, n, stride) for n, stride in zip(shape, cumulative(shape), strict=True))
    return Provenance(tuple((n,) for n in shape), (SourcePiece(source, 0, spans),))


def permute(tensor: Provenance, order: Sequence[int]) -> Provenance:
    """The tensor with its dimensions in another order."""
    at = _positions(tensor.dims)
    grid_order = [position for dim in order for position in at[dim]]
    pieces = tuple(SourcePiece(p.source, p.base, tuple(p.spans[i] for i in grid_order)) for p in tensor.pieces)
    return Provenance(tuple(tensor.dims[dim] for dim in order), pieces)


def insert(tensor: Provenance, dim: int) -> Provenance:
    """The tensor with a new dimension of size 1 before ``dim``."""
    at = sum(len(factors) for factors in tensor.dims[:dim])
    pieces = tuple(SourcePiece(p.source, p.base, (*p.spans[:at], Span(0, 1, 0), *p.spans[at:])) for p in tensor.pieces)
    return Provenance((*tensor.dims[:dim], (1,), *tensor.dims[dim:]), pieces)


def remove(tensor: Provenance, dim: int) -> Provenance:
    """The tensor without dimension ``dim``, whose size is 1."""
    dropped = set(_positions(tensor.dims)[dim])
    pieces = tuple(
        SourcePiece(p.source, p.base, tuple(s for i, s in enumerate(p.spans) if i not in dropped))
        for p in tensor.pieces
    )
    return Provenance((*tensor.dims[:dim], *tensor.dims[dim + 1 :]), pieces)


def reshape(tensor: Provenance, shape: tuple[int, ...]) -> Provenance:
    """The tensor's elements, in row-major order, as another shape; `Untraceable` where dimensions cut across others."""
    if tensor.shape == shape:
        return tensor
    if 0 in shape:
        raise Untraceable("an empty tensor")
    if math.prod(shape) == 1:
        return Provenance(
            tuple((1,) for _ in shape),
            tuple(SourcePiece(p.source, p.base, (Span(0, 1, 0),) * len(shape)) for p in tensor.pieces),
        )
    merged = simplify(Provenance((tensor.grid,), tensor.pieces))
    sizes = tuple(n for n in shape if n != 1)
    flat = _refine(merged, 0, _cuts(sizes))
    factors = list(flat.grid)
    out: list[tuple[int, ...]] = []
    for n in shape:
        taken: list[int] = []
        while n != 1 and (not taken or math.prod(taken) != n):
            taken.append(factors.pop(0))
        out.append(tuple(taken))
    result = Provenance(tuple(out), flat.pieces)
    if factors:
        raise Untraceable("dimensions that cut across each other")
    for dim, n in enumerate(shape):
        if n == 1:
            result = insert(Provenance((*result.dims[:dim], *result.dims[dim + 1 :]), result.pieces), dim)
    return result


def narrow(tensor: Provenance, dim: int, start: int, stop: int, step: int = 1) -> Provenance:
    """Indices ``start, start + step, ...`` below ``stop`` of dimension ``dim``."""
    if start == 0 and stop == tensor.shape[dim] and step == 1:
        return tensor
    if stop <= start:
        raise Untraceable("an empty slice")
    factors = tensor.dims[dim]
    inner = math.prod(factors[1:])
    at = _positions(tensor.dims)[dim].start
    if inner != 1 and step == 1 and start % inner == 0 and (stop - start) % inner == 0:
        pieces = _restrict(tensor.pieces, at, start // inner, stop // inner, 1)
        kept: tuple[int, ...] = ((stop - start) // inner, *factors[1:])
    else:
        if len(factors) > 1:
            tensor = _flatten(tensor, dim)
        pieces = _restrict(tensor.pieces, at, start, stop, step)
        kept = (-(-(stop - start) // step),)
    return simplify(Provenance((*tensor.dims[:dim], kept, *tensor.dims[dim + 1 :]), pieces))


def join(tensors: Sequence[Provenance], dim: int) -> Provenance:
    """The tensors one after the other along ``dim``."""
    tensors = [simplify(t) for t in tensors]
    for other in range(len(tensors[0].dims)):
        tensors = tensors if other == dim else on_one_grid(tensors, other)
    inner = {cut for t in tensors for cut in _cuts(t.dims[dim]) if cut != t.shape[dim]}
    if _is_chain({*inner, 1}) and all(t.shape[dim] % max(inner, default=1) == 0 for t in tensors):
        tensors = [_refine(t, dim, {*inner, t.shape[dim]}) for t in tensors]
        tensors = [_with_outer(t, dim, max(inner, default=1)) for t in tensors]
    else:
        tensors = [_flatten(t, dim) for t in tensors]
    at = _positions(tensors[0].dims)[dim].start
    pieces: list[SourcePiece] = []
    offset = 0
    for t in tensors:
        for piece in t.pieces:
            span = piece.spans[at]
            moved = Span(span.start + offset, span.length, span.stride)
            pieces.append(SourcePiece(piece.source, piece.base, _replace(piece.spans, at, moved)))
        offset += t.dims[dim][0]
    factors = (offset, *tensors[0].dims[dim][1:])
    if len(pieces) > MAX_PIECES:
        raise Untraceable(f"{len(pieces)} pieces")
    return Provenance((*tensors[0].dims[:dim], factors, *tensors[0].dims[dim + 1 :]), tuple(pieces))


def on_one_grid(tensors: Sequence[Provenance], dim: int) -> list[Provenance]:
    """The tensors with dimension ``dim`` cut alike; `Untraceable` where they cut it across each other."""
    cuts = {cut for tensor in tensors for cut in _cuts(tensor.dims[dim])}
    return [_refine(tensor, dim, cuts) for tensor in tensors]


def refine_grid(tensor: Provenance, dim: int, cuts: Iterable[int]) -> Provenance:
    """The tensor on a finer grid: dimension ``dim`` cut at those of ``cuts`` (products of inner sizes) that fit."""
    chosen = set(_cuts(tensor.dims[dim]))
    for cut in sorted(cuts):
        if _is_chain({*chosen, cut, 1}) and tensor.shape[dim] % cut == 0:
            chosen.add(cut)
    return _refine(tensor, dim, chosen)


def _positions(dims: tuple[tuple[int, ...], ...]) -> list[range]:
    ends = list(itertools.accumulate(len(factors) for factors in dims))
    return [range(end - len(factors), end) for end, factors in zip(ends, dims, strict=True)]


def _replace(spans: tuple[Span, ...], at: int, *new: Span) -> tuple[Span, ...]:
    return (*spans[:at], *new, *spans[at + 1 :])


def _cuts(factors: Sequence[int]) -> set[int]:
    """Products of the trailing factors, the whole included: where a grid of these factors cuts a dimension."""
    return {math.prod(factors[i:]) for i in range(len(factors))} - {1}


def _is_chain(cuts: Iterable[int]) -> bool:
    ordered = sorted(cuts)
    return all(big % small == 0 for small, big in itertools.pairwise(ordered))


def _with_outer(tensor: Provenance, dim: int, inner: int) -> Provenance:
    """Make sure that ``dim`` has a factor outside of ``inner``, if only of size 1."""
    if tensor.shape[dim] != inner or inner == 1:
        return tensor
    dims = (*tensor.dims[:dim], (1, *tensor.dims[dim]), *tensor.dims[dim + 1 :])
    return Provenance(dims, insert(tensor, dim).pieces)


def _refine(tensor: Provenance, dim: int, cuts: Iterable[int]) -> Provenance:
    """Cut ``dim`` at all of ``cuts``, which must form a chain of divisors with its factors."""
    factors = tensor.dims[dim]
    every = {*cuts, *_cuts(factors)}
    if every == _cuts(factors):
        return tensor
    if not _is_chain({*every, 1}) or tensor.shape[dim] % max(every) != 0:
        raise Untraceable("dimensions that cut across each other")
    at = _positions(tensor.dims)[dim].start
    pieces = tensor.pieces
    new: list[int] = []
    for factor, inner in zip(factors, cumulative(factors), strict=True):
        bounds = [inner, *sorted(c for c in every if inner < c < inner * factor), inner * factor]
        split = tuple(big // small for small, big in itertools.pairwise(bounds))[::-1]
        pieces = _split(pieces, at + len(new), split) if len(split) > 1 else pieces
        new += split
    return Provenance((*tensor.dims[:dim], tuple(new), *tensor.dims[dim + 1 :]), pieces)


def _split(pieces: tuple[SourcePiece, ...], at: int, factors: tuple[int, ...]) -> tuple[SourcePiece, ...]:
    """Replace grid dimension ``at`` by its factors."""
    strides = cumulative(factors)
    out: list[SourcePiece] = []
    for piece in pieces:
        span = piece.spans[at]
        for box in refine_range(span.start, span.length, factors):
            first = sum(o * s for o, s in zip(box.offsets, strides, strict=True))
            spans = [Span(o, n, span.stride * s) for o, n, s in zip(box.offsets, box.sizes, strides, strict=True)]
            base = piece.base + (first - span.start) * span.stride
            out.append(SourcePiece(piece.source, base, _replace(piece.spans, at, *spans)))
    return tuple(out)


def _restrict(pieces: tuple[SourcePiece, ...], at: int, start: int, stop: int, step: int) -> tuple[SourcePiece, ...]:
    out: list[SourcePiece] = []
    for piece in pieces:
        span = piece.spans[at]
        low = -(-(max(span.start, start) - start) // step)
        high = -(-(min(span.start + span.length, stop) - start) // step)
        if low < high:
            base = piece.base + (start + low * step - span.start) * span.stride
            new = Span(low, high - low, span.stride * step)
            out.append(SourcePiece(piece.source, base, _replace(piece.spans, at, new)))
    return tuple(out)


def _flatten(tensor: Provenance, dim: int) -> Provenance:
    """Give ``dim`` a single factor, at the price of one piece for each index of its outer factors."""
    factors = tensor.dims[dim]
    positions = _positions(tensor.dims)[dim]
    at, strides = positions.start, cumulative(factors)
    out: list[SourcePiece] = []
    for piece in tensor.pieces:
        spans = [piece.spans[i] for i in positions]
        for index in itertools.product(*(range(s.length) for s in spans[:-1])):
            base = piece.base + sum(i * s.stride for i, s in zip(index, spans, strict=False))
            start = sum((i + s.start) * stride for i, s, stride in zip(index, spans, strides, strict=False))
            new = Span(start + spans[-1].start, spans[-1].length, spans[-1].stride)
            out.append(SourcePiece(piece.source, base, (*piece.spans[:at], new, *piece.spans[positions.stop :])))
            if len(out) > MAX_PIECES:
                raise Untraceable("too many pieces")
    dims = (*tensor.dims[:dim], (math.prod(factors),), *tensor.dims[dim + 1 :])
    return Provenance(dims, tuple(out))


def simplify(tensor: Provenance) -> Provenance:
    """The tensor on the coarsest grid that still describes it.

    Within each dimension, factors of 1 are dropped and neighbours that every piece walks as one are merged.
    """
    dims: list[tuple[int, ...]] = []
    pieces, at = tensor.pieces, 0
    for factors in tensor.dims:
        new = list(factors)
        position = 0
        while position < len(new):
            here = at + position
            if new[position] == 1 and len(new) > 1:
                pieces = tuple(SourcePiece(p.source, p.base, _replace(p.spans, here)) for p in pieces)
                del new[position]
                position = max(position - 1, 0)
            elif position + 1 < len(new) and _mergeable(pieces, here, new[position + 1]):
                inner = new.pop(position + 1)
                pieces = tuple(_merged(p, here, inner) for p in pieces)
                new[position] *= inner
                position = max(position - 1, 0)
            else:
                position += 1
        dims.append(tuple(new))
        at += len(new)
    return Provenance(tuple(dims), pieces)


def _mergeable(pieces: tuple[SourcePiece, ...], at: int, inner: int) -> bool:
    for piece in pieces:
        outer, span = piece.spans[at], piece.spans[at + 1]
        if outer.length == 1:
            continue
        if span.length != inner or (inner != 1 and outer.stride != span.stride * inner):
            return False
    return True


def _merged(piece: SourcePiece, at: int, inner: int) -> SourcePiece:
    outer, span = piece.spans[at], piece.spans[at + 1]
    stride = span.stride if inner != 1 and (outer.length == 1 or span.length > 1) else outer.stride
    new = Span(outer.start * inner + span.start, outer.length * span.length, stride)
    return SourcePiece(piece.source, piece.base, (*piece.spans[:at], new, *piece.spans[at + 2 :]))


# --- as views of native tensors --------------------------------------------------------------------------------------


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


def _extents(piece: SourcePiece, shape: tuple[int, ...]) -> tuple[dict[int, int], dict[int, int]]:
    """By stride the extent of the native grid dimension and the piece's first index in it."""
    extent = {low: high // low for low, high in itertools.pairwise(_native_cuts(piece, shape))}
    return extent, {stride: piece.base // stride % size for stride, size in extent.items()}


def _unwrap(piece: SourcePiece, shape: tuple[int, ...]) -> list[SourcePiece]:
    """Cut a piece wherever it runs over the edge of a native grid dimension."""
    extent, first = _extents(piece, shape)
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
    extent, first = _extents(piece, shape)
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
