"""Tensors in flat partitions: the elements of one, in row-major order, lie in vectors of several ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from shardwise.geometry import DTYPE_BYTES, Box
from shardwise.plan.reads import SourceChunk
from shardwise.plan.views import refine_range
from shardwise.sources.others.stored import StoredTensor


class Segment(NamedTuple):
    """A part of a vector.

    Attributes:
        start: Where it begins in the vector, in elements.
        stored: Its elements.
        file: The position of its file.
    """

    start: int
    stored: StoredTensor
    file: int

    @property
    def end(self) -> int:
        """One past its last element."""
        return self.start + self.stored.numel


def pieces(
    segments: Sequence[Segment], position: int, count: int, shape: tuple[int, ...], first: int = 0
) -> Iterator[SourceChunk]:
    """The boxes of a tensor that lie in a run of a vector.

    Args:
        segments: The vector.
        position: Where the run begins in it.
        count: Its elements.
        shape: The tensor's shape.
        first: The tensor's element, in row-major order, with which the run begins.
    """
    for segment in segments:
        low, high = max(position, segment.start), min(position + count, segment.end)
        if low >= high:
            continue
        item = DTYPE_BYTES[segment.stored.dtype]
        offset = segment.stored.offset + (low - segment.start) * item
        boxes = refine_range(first + low - position, high - low, shape) if shape else (Box((), ()),)
        for box in boxes:
            yield SourceChunk(box, segment.file, offset)
            offset += box.numel * item
