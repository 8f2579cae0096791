"""Which pieces of a sharded tensor a rank has to know. Pure.

A checkpoint of N ranks has N pieces of a tensor, and a rank reads few of them: it sends the regions that it wants, and
receives the pieces that touch them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from shardwise.geometry import Box, bounding, flat_offset
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.reads import SourceChunk
from shardwise.plan.views import factor_shape

#: Up to so many regions of a tensor are sent one by one; for more, the one region that spans them all.
MOST_REGIONS = 8


class ChunkIndex:
    """The pieces of one tensor, found by region without a search through all.

    Args:
        chunks: The pieces.
    """

    __slots__ = ("_chunks", "_dim", "_ends", "_longest", "_sliced", "_starts")

    def __init__(self, chunks: Sequence[SourceChunk]) -> None:
        boxes = [chunk.box for chunk in chunks]
        dims = range(len(boxes[0].sizes) if boxes else 0)
        # Along the dimension with the most distinct offsets.
        dim = max(dims, key=lambda d: len({box.offsets[d] for box in boxes}), default=None)
        self._dim = dim
        self._chunks = tuple(chunks)
        if dim is None:
            return
        self._chunks = tuple(sorted(chunks, key=lambda chunk: chunk.box.offsets[dim]))
        self._starts = [chunk.box.offsets[dim] for chunk in self._chunks]
        self._ends = [start + chunk.box.sizes[dim] for start, chunk in zip(self._starts, self._chunks, strict=True)]
        self._longest = max(box.sizes[dim] for box in boxes)
        self._sliced = len({(box.offsets[:dim], box.offsets[dim + 1 :], box.sizes[:dim], box.sizes[dim + 1 :])
                            for box in boxes}) == 1  # fmt: skip

    def touching(self, box: Box) -> Sequence[SourceChunk]:
        """The pieces that share an element with a region.

        Of tensors that are cut along one dimension, also those that a piece's own emptiness keeps from it.
        """
        dim = self._dim
        if dim is None:
            return self._chunks
        low = box.offsets[dim]
        first = bisect_left(self._starts, low - self._longest + 1)
        last = bisect_left(self._starts, low + box.sizes[dim], first)
        if self._sliced:
            while first < last and self._ends[first] <= low:
                first += 1
            return self._chunks[first:last]
        return [chunk for chunk in self._chunks[first:last] if chunk.box.intersect(box) is not None]


def wanted_regions(tensor: HeldTensor) -> list[Box]:
    """The regions that a rank holds, in the tensor's own shape; together they cover its fragments, or more."""
    boxes = [fragment.box for fragment in tensor.fragments if 0 not in fragment.box.sizes]
    if len(boxes) > MOST_REGIONS:
        boxes = [bounding(boxes)]
    if tensor.grid == tensor.spec.shape:
        return boxes
    factors = factor_shape(tensor.spec.shape, tensor.grid)
    return [_coarse(box, factors) for box in boxes]


def _coarse(box: Box, factors: Sequence[tuple[int, ...]]) -> Box:
    """The smallest box of a tensor around a box of its grid, which is not empty."""
    offsets, ends, at = [], [], 0
    for parts in factors:
        dims = slice(at, at + len(parts))
        offsets.append(flat_offset(box.offsets[dims], parts))
        ends.append(flat_offset(tuple(end - 1 for end in box.ends[dims]), parts) + 1)
        at += len(parts)
    return Box(tuple(offsets), tuple(end - start for start, end in zip(offsets, ends, strict=True)))
