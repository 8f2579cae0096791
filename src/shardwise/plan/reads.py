"""Which bytes to read, where each goes, and which pieces of a tensor a rank has to know for that. Pure.

A saved tensor is a set of chunks, each a box in row-major order somewhere in a file. What a rank wants of it is a set
of fragments. Their intersections become `Read`s: rows of bytes at a regular distance in a file, and the memory that
they fill.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from shardwise.errors import MissingTensorError
from shardwise.geometry import DTYPE_BYTES, Box, TensorSpec, bounding, covers_once, flat_offset
from shardwise.plan.fragments import Fragment, HeldTensor
from shardwise.plan.views import factor_shape, refine_box


class SourceChunk(NamedTuple):
    """A saved piece of a tensor: its region in the tensor's shape, and its file, by number, and byte offset there.

    ``packed`` is its length in bytes if it is a serialised tensor (an item of a DCP ``.distcp`` file), 0 for raw bytes.
    """

    box: Box
    file: int
    offset: int
    packed: int = 0


class RemotePieces(NamedTuple):
    """Where to look up the pieces of a tensor: by its number in another rank's part of the distributed table.

    ``file`` is one of the files that hold it, for messages, -1 if none does; ``single``, whether each element is in one
    place only, so that a piece that this rank knows is the only one for its region.
    """

    number: int
    file: int
    single: bool


class SourceTensor(NamedTuple):
    """A saved tensor and its pieces: those that this rank knows, where ``remote`` says where to look up all of them."""

    spec: TensorSpec
    chunks: tuple[SourceChunk, ...]
    remote: RemotePieces | None = None

    def renamed(self, name: str) -> SourceTensor:
        """The same under another name."""
        return self._replace(spec=self.spec._replace(name=name))

    def knows(self, regions: Sequence[Box]) -> bool:
        """Whether no lookup is needed for these regions: all pieces are known, or each region is one of them."""
        if self.remote is None:
            return True
        if not self.remote.single:
            return False
        if len(regions) == 1 == len(self.chunks):
            return self.chunks[0].box == regions[0]
        return {chunk.box for chunk in self.chunks}.issuperset(regions)


class Read(NamedTuple):
    """Rows of ``width`` bytes, ``period`` bytes apart in a file, the first at ``offset``, and the memory they fill.

    ``dest`` has any strides. A single row may have any shape, in the file's order; with several rows the first
    dimension is ``rows``. ``spec`` is the saved tensor.
    """

    file: int
    offset: int
    rows: int
    period: int
    width: int
    dest: torch.Tensor
    spec: TensorSpec


class PackedRead(NamedTuple):
    """A serialised tensor to load, and the region of it to copy to ``dest``.

    The region is in the chunk's own coordinates, in a grid in which the chunk has the shape ``shape``.
    """

    chunk: SourceChunk
    region: Box
    shape: tuple[int, ...]
    dest: torch.Tensor
    spec: TensorSpec


AnyRead = Read | PackedRead


def plan_reads(source: SourceTensor, wanted: HeldTensor) -> list[AnyRead]:
    """The reads that fill every fragment of ``wanted``.

    Raises `MissingTensorError`: the chunks do not cover a fragment, or overlap in it.
    """
    spec, chunks = source.spec, source.chunks
    if len(chunks) != 1 or chunks[0].packed or wanted.grid != spec.shape:
        return [read for fragment in wanted.fragments for read in _pieces(source, fragment, wanted.grid)]
    (chunk,) = chunks
    found: list[AnyRead] = []
    for fragment in wanted.fragments:
        rows = _rows(fragment.box, chunk.box)
        if rows is None:
            found += _pieces(source, fragment, wanted.grid)
        else:
            found.append(_read_rows(rows, chunk, spec, fragment))
    return found


def _pieces(source: SourceTensor, fragment: Fragment, grid: tuple[int, ...]) -> list[AnyRead]:
    found: list[AnyRead] = []
    regions: list[Box] = []
    for chunk in source.chunks:
        for common, reads in _from_chunk(chunk, source.spec, fragment, grid):
            found += reads
            regions.append(common.relative_to(fragment.box))
    covered = sum(region.numel for region in regions)
    # As many elements as belong there may be some twice and some not at all.
    is_once = covered < fragment.box.numel or len(regions) == 1 or covers_once(fragment.box.sizes, regions)
    if not is_once:
        what = "pieces of this tensor overlap: the files hold some of its elements twice"
        hint = "The directory mixes files of different checkpoints, or of one and its copy; separate them."
        raise MissingTensorError(what, tensor=source.spec.name, hint=hint)
    if covered != fragment.box.numel:
        what = f"the checkpoint holds {covered} of the {fragment.box.numel} elements needed of this tensor"
        hint = "A shard file is missing; restore all files of the checkpoint, or choose another one."
        raise MissingTensorError(what, tensor=source.spec.name, hint=hint)
    return found


def _read_rows(rows: tuple[int, int], chunk: SourceChunk, spec: TensorSpec, fragment: Fragment) -> Read:
    itemsize = DTYPE_BYTES[spec.dtype]
    nbytes = rows[1] * itemsize
    return Read(chunk.file, chunk.offset + rows[0] * itemsize, 1, nbytes, nbytes, fragment.data, spec)


def _from_chunk(
    chunk: SourceChunk, spec: TensorSpec, fragment: Fragment, grid: tuple[int, ...]
) -> Iterator[tuple[Box, Iterable[AnyRead]]]:
    """Regions, in the grid, that a chunk and a fragment have in common, and the reads that fill each."""
    if grid == spec.shape:
        rows = _rows(fragment.box, chunk.box)
        if rows is not None and not chunk.packed:
            yield fragment.box, [_read_rows(rows, chunk, spec, fragment)]
            return
        factors: tuple[tuple[int, ...], ...] = tuple((n,) for n in grid)
        boxes: Sequence[Box] = (chunk.box,)
    else:
        factors = factor_shape(spec.shape, grid)
        boxes = refine_box(chunk.box, factors)
    origin, strides = _memory(chunk.box, factors)
    for box in boxes:
        common = box.intersect(fragment.box)
        if common is None:
            continue
        if chunk.packed:
            packed = PackedRead(chunk, common.relative_to(box), box.sizes, fragment.cut(common).data, spec)
            yield common, [packed]
        else:
            start = sum(o * s for o, s in zip(common.offsets, strides, strict=True)) - origin
            yield common, _strided(chunk, spec, start, common.sizes, strides, fragment.cut(common).data)


@lru_cache(maxsize=65536)  # tensors of one kind have equal boxes
def _rows(inner: Box, outer: Box) -> tuple[int, int] | None:
    """First element and number of elements of ``inner`` in ``outer`` if it is consecutive whole rows of it.

    Most fragments are, and need no further thought.
    """
    whole = (
        len(inner.sizes) > 0
        and inner.numel > 0
        and inner.sizes[1:] == outer.sizes[1:]
        and inner.offsets[1:] == outer.offsets[1:]
        and inner.offsets[0] >= outer.offsets[0]
        and inner.offsets[0] + inner.sizes[0] <= outer.offsets[0] + outer.sizes[0]
    )
    if not whole:
        return None
    return (inner.offsets[0] - outer.offsets[0]) * math.prod(outer.sizes[1:]), inner.numel


def _memory(box: Box, factors: tuple[tuple[int, ...], ...]) -> tuple[int, tuple[int, ...]]:
    """Strides of the grid dimensions inside a chunk, and the position that its own first element would have."""
    strides: list[int] = []
    origin, inner = 0, 1
    for start, size, parts in reversed(list(zip(box.offsets, box.sizes, factors, strict=True))):
        origin += start * inner
        strides += [inner * math.prod(parts[i + 1 :]) for i in reversed(range(len(parts)))]
        inner *= size
    return origin, tuple(reversed(strides))


def _strided(
    chunk: SourceChunk,
    spec: TensorSpec,
    start: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    dest: torch.Tensor,
) -> Iterator[Read]:
    """Split a strided region of a chunk into reads of regular rows."""
    outer = len(sizes)
    run = 1
    while outer > 0 and (strides[outer - 1] == run or sizes[outer - 1] == 1):
        run *= sizes[outer - 1]
        outer -= 1
    item = spec.itemsize
    if outer == 0:
        yield Read(chunk.file, chunk.offset + start * item, 1, run * item, run * item, dest, spec)
        return
    if outer == 1:
        yield Read(chunk.file, chunk.offset + start * item, sizes[0], strides[0] * item, run * item, dest, spec)
        return
    for i in range(sizes[0]):
        yield from _strided(chunk, spec, start + i * strides[0], sizes[1:], strides[1:], dest[i])


#: Up to so many regions of a tensor are sent one by one; for more, the one region that spans them all.
MOST_REGIONS = 8


class ChunkIndex:
    """The pieces of one tensor, found by region without a search through all.

    A checkpoint of N ranks has N pieces of a tensor, and a rank reads few of them: it sends the regions that it wants,
    and receives the pieces that touch them.
    """

    __slots__ = ("_chunks", "_dim", "_longest", "_starts")

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
        self._longest = max(box.sizes[dim] for box in boxes)

    def touching(self, box: Box) -> Sequence[SourceChunk]:
        """The pieces that share an element with a region."""
        dim = self._dim
        if dim is None:
            return self._chunks
        low = box.offsets[dim]
        first = bisect_left(self._starts, low - self._longest + 1)
        last = bisect_left(self._starts, low + box.sizes[dim], first)
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
