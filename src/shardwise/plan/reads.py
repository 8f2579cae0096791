"""Which bytes to read, and where each goes. Pure.

A saved tensor is a set of chunks, each a box in row-major order somewhere in a file. What a rank wants of it is a set
of fragments. Their intersections become `Read`s: rows of bytes at a regular distance in a file, and the memory that
they fill.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from shardwise.errors import MissingTensorError
from shardwise.geometry import DTYPE_BYTES, Box, TensorSpec, overlap, tiles
from shardwise.plan.fragments import Fragment, HeldTensor
from shardwise.plan.views import factor_shape, refine_box


class SourceChunk(NamedTuple):
    """A saved piece of a tensor.

    Attributes:
        box: Its region, in the tensor's shape.
        file: Index into the source's files.
        offset: Byte offset in the file.
        packed: Length in bytes where the piece is not raw bytes but a serialised tensor (an item of a DCP ``.distcp``
            file); 0 for raw bytes.
    """

    box: Box
    file: int
    offset: int
    packed: int = 0


class RemotePieces(NamedTuple):
    """Where to look up the pieces of a tensor: another rank's part of the distributed table.

    Attributes:
        number: The tensor's number on that rank.
        file: Index of one of the files that hold it, for messages; -1 if none does.
        single: Whether each element is in one place only, so that a piece that this rank knows is the only one for its
            region.
    """

    number: int
    file: int
    single: bool


class SourceTensor(NamedTuple):
    """A saved tensor: what it is, and where its pieces are.

    Attributes:
        spec: What it is.
        chunks: Its pieces; where ``remote`` is set, those that this rank knows.
        remote: Where to look up the pieces, if this rank does not know all of them.
    """

    spec: TensorSpec
    chunks: tuple[SourceChunk, ...]
    remote: RemotePieces | None = None

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
    """Rows of bytes, and the memory that they fill.

    Attributes:
        file: Index into the source's files.
        offset: Byte offset of the first row in the file.
        rows: Number of rows.
        period: Bytes from one row's start to the next.
        width: Bytes of each row.
        dest: The memory, in any strides. A single row may have any shape, in the file's order; with several rows the
            first dimension is ``rows``.
        spec: The saved tensor, for its dtype and for messages.
    """

    file: int
    offset: int
    rows: int
    period: int
    width: int
    dest: torch.Tensor
    spec: TensorSpec


class PackedRead(NamedTuple):
    """A serialised tensor to load, and the region of it to copy.

    Attributes:
        chunk: Where it is.
        region: The region, in the chunk's own coordinates, refined as ``shape``.
        shape: The chunk's shape in the grid.
        dest: What it fills.
        spec: The saved tensor.
    """

    chunk: SourceChunk
    region: Box
    shape: tuple[int, ...]
    dest: torch.Tensor
    spec: TensorSpec


AnyRead = Read | PackedRead


def plan_reads(source: SourceTensor, wanted: HeldTensor) -> list[AnyRead]:
    """The reads that fill every fragment of ``wanted``.

    Raises:
        MissingTensorError: The chunks do not cover a fragment, or overlap in it.
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
    if covered > fragment.box.numel or (
        covered == fragment.box.numel
        and len(regions) > 1
        and not tiles(fragment.box.sizes, regions)  # nearly always true; undecided for fine grids
        and overlap(regions)
    ):
        raise MissingTensorError(
            "pieces of this tensor overlap: the files hold some of its elements twice",
            tensor=source.spec.name,
            hint="The directory mixes files of different checkpoints, or of one and its copy; separate them.",
        )
    if covered != fragment.box.numel:
        raise MissingTensorError(
            f"the checkpoint holds {covered} of the {fragment.box.numel} elements needed of this tensor",
            tensor=source.spec.name,
            hint="A shard file is missing; restore all files of the checkpoint, or choose another one.",
        )
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
