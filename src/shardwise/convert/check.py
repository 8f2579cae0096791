"""Nothing lost, nothing twice: the check that a conversion can be undone."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence

from shardwise.convert.rules import Conversion, NativeSpec
from shardwise.errors import ConversionError
from shardwise.geometry import Box
from shardwise.plan.views import AxisView, refine_box

Factors = tuple[tuple[int, ...], ...]


def check_round_trip(conversion: Conversion, natives: Sequence[NativeSpec]) -> None:
    """Check that every element of every native tensor is in exactly one place of the files.

    Tensors that the model keeps out of its files are excepted, and so are computed groups, whose rules answer for
    themselves. Tied tensors are expected once in ``natives``.

    Raises:
        ConversionError: Names the tensors that the files would lack, or hold twice.
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
    plain = tuple((n,) for n in shape)
    boxes = [(plain if view is None else view.native_grid, _box(shape, view)) for view in views]
    if _overlap(shape, boxes):
        return 1
    return sum(box.numel for _, box in boxes) - math.prod(shape)


def _box(shape: tuple[int, ...], view: AxisView | None) -> Box:
    """The region that a view covers, in its native grid."""
    if view is None:
        return Box.whole(shape)
    count = sum(map(len, view.native_grid))
    offsets, sizes = [0] * count, [1] * count
    for dim, index in view.fixed:
        offsets[dim] = index
    for axis in view.axes:
        offsets[axis.native], sizes[axis.native] = axis.start, axis.length
    return Box(tuple(offsets), tuple(sizes))


def _overlap(shape: tuple[int, ...], boxes: Sequence[tuple[Factors, Box]]) -> bool:
    common = _common_grid(shape, [grid for grid, _ in boxes])
    if common is None:
        return True
    refined = [box for grid, whole in boxes for box in _in_grid(whole, grid, common)]
    refined.sort(key=lambda box: box.offsets)
    active: list[Box] = []
    for box in refined:
        active = [other for other in active if not other.ends or other.ends[0] > box.offsets[0]]
        if any(other.intersect(box) is not None for other in active):
            return True
        active.append(box)
    return False


def _common_grid(shape: tuple[int, ...], grids: Sequence[Factors]) -> Factors | None:
    """The coarsest grid that refines all of ``grids``, or ``None`` where they cut across each other."""
    out: list[tuple[int, ...]] = []
    for dim, n in enumerate(shape):
        cuts = {math.prod(grid[dim][i:]) for grid in set(grids) for i in range(len(grid[dim]))} | {1, n}
        ordered = sorted(cuts)
        if any(big % small for small, big in itertools.pairwise(ordered)):
            return None
        out.append(tuple(big // small for small, big in itertools.pairwise(ordered))[::-1] or (1,))
    return tuple(out)


def _in_grid(box: Box, grid: Factors, common: Factors) -> tuple[Box, ...]:
    """A box of ``grid`` in ``common``, which refines it but for factors of 1."""
    factors: list[tuple[int, ...]] = []
    offsets: list[int] = []
    sizes: list[int] = []
    at = 0
    for dim, parts in enumerate(grid):
        rest = list(common[dim])
        kept = [i for i, n in enumerate(parts) if n != 1]
        for i in kept:
            taken: list[int] = []
            while math.prod(taken) != parts[i]:
                taken.append(rest.pop(0))
            factors.append(tuple(taken))
            offsets.append(box.offsets[at + i])
            sizes.append(box.sizes[at + i])
        if not kept:
            factors.append((1,))
            offsets.append(0)
            sizes.append(1)
        at += len(parts)
    return refine_box(Box(tuple(offsets), tuple(sizes)), tuple(factors))
