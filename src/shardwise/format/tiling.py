"""Do these regions cover a tensor exactly once?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from shardwise.types import Box

#: Most dimensions along which one tensor may be split; real layouts use one to three.
MAX_SPLIT_DIMS = 6


def tiles(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Say whether ``boxes``, each inside ``shape``, cover every element exactly once.

    Linear in the number of boxes, whatever their order. Counting the corners of the boxes with alternating signs is a
    finite difference of "how many boxes cover this element", which determines that count; so the boxes tile the tensor
    if and only if their corners add up to those of the tensor.

    Args:
        shape: Shape of the tensor; ``()`` for a scalar.
        boxes: Regions of it; empty ones count for nothing.

    Returns:
        The answer; False also where the boxes split more than `MAX_SPLIT_DIMS` dimensions.
    """
    whole = Box.whole(shape)
    if not whole.numel:
        return True
    if len(boxes) == 1:
        return boxes[0] == whole
    solid = [box for box in boxes if box.numel]
    split = [d for d, size in enumerate(shape) if any(box.sizes[d] != size for box in solid)]
    if not split:
        return len(solid) == 1
    if len(split) == 1:
        d, end = split[0], 0
        for box in sorted(solid, key=lambda box: box.offsets[d]):
            if box.offsets[d] != end:
                return False
            end += box.sizes[d]
        return end == shape[d]
    if len(split) > MAX_SPLIT_DIMS:
        return False
    corners: dict[tuple[int, ...], int] = {}
    for box in solid:
        _add_corners(corners, box, split, 1)
    _add_corners(corners, whole, split, -1)
    return not any(corners.values())


def overlap(boxes: Sequence[Box]) -> bool:
    """Whether two of these boxes, which are not empty, share an element."""
    # Along the dimension that tells most of them apart.
    dim = max(range(len(boxes[0].sizes)), key=lambda d: len({box.offsets[d] for box in boxes}))
    near: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[dim]):
        near = [other for other in near if other.ends[dim] > box.offsets[dim]]
        if any(other.intersect(box) is not None for other in near):
            return True
        near.append(box)
    return False


def covers_once(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """What `tiles` says, also of fine grids, of which it cannot tell: these are looked at box by box."""
    if tiles(shape, boxes):
        return True
    solid = [box for box in boxes if box.numel]
    return len(solid) > 1 and sum(box.numel for box in solid) == Box.whole(shape).numel and not overlap(solid)


def _add_corners(corners: dict[tuple[int, ...], int], box: Box, split: Sequence[int], weight: int) -> None:
    for upper in product((0, 1), repeat=len(split)):
        corner = tuple([box.offsets[d] + side * box.sizes[d] for d, side in zip(split, upper, strict=True)])
        corners[corner] = corners.get(corner, 0) + (-weight if sum(upper) % 2 else weight)
