"""Nothing lost, nothing twice: the check that a conversion can be undone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from shardwise.convert.provenance import Provenance, SourcePiece, Span, Untraceable, on_one_grid
from shardwise.convert.rules import Conversion, NativeSpec
from shardwise.errors import ConversionError
from shardwise.geometry import Box
from shardwise.plan.views import AxisView


def check_round_trip(conversion: Conversion, natives: Sequence[NativeSpec]) -> None:
    """Check that every element of every native tensor, tied ones once, is in exactly one place of the files.

    Tensors that the model keeps out of its files are excepted, and so are computed groups, whose rules answer for
    themselves.
    """
    elsewhere = {spec.name for group in conversion.computed for spec in group.natives}
    elsewhere.update(conversion.ignored)
    views: defaultdict[str, list[AxisView | None]] = defaultdict(list)
    for tensor in conversion.hub:
        for part in tensor.parts:
            views[part.native].append(part.view)
    lost: list[str] = []
    twice: list[str] = []
    known: dict[object, int] = {}
    for spec in natives:
        if spec.name in elsewhere:
            continue
        key = (spec.shape, tuple(map(id, views[spec.name])))
        if key not in known:
            known[key] = _balance(spec.shape, views[spec.name])
        if known[key] < 0:
            lost.append(spec.name)
        elif known[key] > 0:
            twice.append(spec.name)
    if lost or twice:
        what = [f"{kind}: {', '.join(names[:5])}" for kind, names in (("lost", lost), ("twice", twice)) if names]
        raise ConversionError(
            f"the model's files would not give the model back ({'; '.join(what)})",
            tensor=(lost or twice)[0],
            hint="The conversion rules of the model type are not invertible; give the model a state_dict_adapter, or "
            "correct the one it has.",
        )


def _balance(shape: tuple[int, ...], views: Sequence[AxisView | None]) -> int:
    """0 where the views cover each element once, negative where some is missing, positive where one is there twice."""
    if len(views) == 1 and views[0] is None:
        return 0
    regions = [_region(shape, view) for view in views]
    covered = sum(math.prod(span.length for span in region.pieces[0].spans) for region in regions)
    return 1 if _overlap(regions) else covered - math.prod(shape)


def _region(shape: tuple[int, ...], view: AxisView | None) -> Provenance:
    """The region that a view covers, in its native grid without factors of 1."""
    grid = tuple((n,) for n in shape) if view is None else view.native_grid
    bounds = {dim: (0, n) for dim, n in enumerate(shape)}
    if view is not None:
        bounds = {dim: (index, 1) for dim, index in view.fixed}
        bounds |= {axis.native: (axis.start, axis.length) for axis in view.axes}
    at = 0
    dims: list[tuple[int, ...]] = []
    spans: list[Span] = []
    for factors in grid:
        kept = [i for i, n in enumerate(factors) if n != 1]
        dims.append(tuple(factors[i] for i in kept))
        spans += (Span(*bounds.get(at + i, (0, 1)), 0) for i in kept)
        at += len(factors)
    return Provenance(tuple(dims), (SourcePiece(0, 0, tuple(spans)),))


def _overlap(regions: Sequence[Provenance]) -> bool:
    try:
        for dim in range(len(regions[0].dims) if regions else 0):
            regions = on_one_grid(regions, dim)
    except Untraceable:  # grids that cut across each other
        return True
    refined = [
        Box(tuple(span.start for span in piece.spans), tuple(span.length for span in piece.spans))
        for region in regions
        for piece in region.pieces
    ]
    refined.sort(key=lambda box: box.offsets)
    active: list[Box] = []
    for box in refined:
        active = [other for other in active if not other.ends or other.ends[0] > box.offsets[0]]
        if any(other.intersect(box) is not None for other in active):
            return True
        active.append(box)
    return False
