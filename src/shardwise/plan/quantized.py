"""Quantized tensors by the slice: which values and scales a region needs, and what it becomes. Pure.

A quantized tensor is stored as values of few bits and a grid of scales, one scale for each block of values. The
fragments that a rank wants, cut anywhere, become `Slab`s: boxes of the scale grid to read, and `QuantizedPiece`s of
bounded size, each a box of values with the memory that its floating-point numbers fill. The arithmetic is float32
throughout: value times scale, rounded once when it is copied into the destination.

Sources: OCP 8-bit Floating Point Specification 1.0 (E4M3, E5M2), OCP Microscaling Formats 1.0 (E2M1 values, E8M0
scales, blocks of 32); block-scaled FP8 as in DeepSeek-V3 (arXiv:2412.19437, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from shardwise.geometry import Box, TensorSpec, bounding
from shardwise.plan.fragments import HeldTensor, in_shape
from shardwise.plan.reads import SourceTensor

#: Values dequantized at a time: 1 MiB of FP8, and three float32 tensors of 4 MiB while they are computed.
PIECE_ELEMENTS = 2**20
#: Scales held at a time: 4 MiB as float32.
SLAB_SCALES = 2**20
#: Beyond this many boxes of scales, one box around them is read instead of their exact union.
_MOST_BOXES = 256

#: The sixteen E2M1 numbers; the highest bit is the sign.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A tensor that is stored as values and scales.

    Attributes:
        spec: What it is once dequantized: name, shape and ``F32``.
        values: The stored values: one element each, or with ``packed`` bytes of two (the lower half first) along the
            last dimension, which then has half its length.
        scales: The stored scales; its shape is the scale grid, ``ceil(n / block)`` along each stored dimension.
        block: Values that share a scale, along each stored dimension.
        packed: Whether the values are E2M1, two to a byte.
        transposed: Whether the last two dimensions are stored the other way round.
    """

    spec: TensorSpec
    values: SourceTensor
    scales: SourceTensor
    block: tuple[int, ...]
    packed: bool = False
    transposed: bool = False

    def turned(self) -> Quantized:
        """The same stored tensor, read with its last two dimensions swapped."""
        return replace(self, spec=self.spec._replace(shape=_swap(self.spec.shape)), transposed=not self.transposed)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedPiece:
    """A box of stored values, and the memory of that shape which its numbers fill."""

    box: Box
    dest: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Slab:
    """Pieces that are dequantized with one set of scales.

    ``around`` is the box of the scale grid around all of them; ``scales`` are disjoint boxes within it: those that the
    pieces need and no others.
    """

    around: Box
    scales: tuple[Box, ...]
    pieces: tuple[QuantizedPiece, ...]


def plan_slabs(
    tensor: Quantized, wanted: HeldTensor, piece_elements: int = PIECE_ELEMENTS, slab_scales: int = SLAB_SCALES
) -> Iterator[Slab]:
    """Cut what a rank wants of a quantized tensor, in any grid and any strides, into slabs.

    A piece has at most ``piece_elements`` values, a slab ``slab_scales`` scales, as far as whole blocks allow.
    """
    regions: list[QuantizedPiece] = []
    for fragment in wanted.fragments:
        for box, data in in_shape(fragment, wanted.grid, tensor.spec.shape, strided=True):
            if tensor.transposed:
                box, data = Box(_swap(box.offsets), _swap(box.sizes)), data.transpose(-1, -2)
            regions.append(QuantizedPiece(box, data))
    if not regions:
        return
    needed = [scale_box(region.box, tensor.block) for region in regions]
    around = bounding(needed)
    if around.numel <= slab_scales:
        exact = disjoint(needed) if len(needed) <= _MOST_BOXES else (around,)
        yield Slab(around, exact, tuple(p for region in regions for p in _pieces(region, piece_elements)))
        return
    for region in regions:
        # At the borders of blocks, so that no two parts share a scale.
        for part in _cut(region, tensor.block, lambda box: scale_box(box, tensor.block).numel, slab_scales):
            box = scale_box(part.box, tensor.block)
            yield Slab(box, (box,), tuple(_pieces(part, piece_elements)))


def plan_small_slabs(tensor: Quantized, wanted: HeldTensor, piece_elements: int) -> Iterator[Slab]:
    """As `plan_slabs`, with one piece in each slab, so that other ranks can read some of them.

    Scales at the border of two pieces are in both slabs.
    """
    for slab in plan_slabs(tensor, wanted, piece_elements):
        for piece in slab.pieces:
            box = scale_box(piece.box, tensor.block)
            yield Slab(box, (box,), (piece,))


def scale_box(box: Box, block: tuple[int, ...]) -> Box:
    """The scales that a box of values needs."""
    first = tuple(o // b for o, b in zip(box.offsets, block, strict=True))
    last = tuple(-(-e // b) for e, b in zip(box.ends, block, strict=True))
    return Box(first, tuple(e - o for o, e in zip(first, last, strict=True)))


def byte_box(box: Box) -> Box:
    """The bytes that a box of packed values needs: the last dimension counts bytes of two values."""
    low, high = box.offsets[-1] // 2, -(-box.ends[-1] // 2)
    return Box((*box.offsets[:-1], low), (*box.sizes[:-1], high - low))


def dequantize(values: torch.Tensor, scales: torch.Tensor, tensor: Quantized, box: Box, around: Box) -> torch.Tensor:
    """The float32 numbers of a box of stored values, as a new tensor of shape ``box.sizes``.

    ``values`` are those of ``box``, with ``tensor.packed`` the bytes of `byte_box`; ``scales``, in float32, are those
    of the box ``around`` of the scale grid.
    """
    numbers = _unpacked(values, box) if tensor.packed else values.to(torch.float32)
    for dim, (start, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        if scales.shape[dim] == 1:
            continue
        index = torch.arange(start, start + size, device=scales.device) // tensor.block[dim] - around.offsets[dim]
        scales = scales.index_select(dim, index)
    return numbers.mul_(scales)


def scales_to_float(scales: torch.Tensor) -> torch.Tensor:
    """Stored scales as float32; bytes are E8M0: ``2 ** (byte - 127)``, and 255 is not a number."""
    if scales.dtype == torch.float8_e8m0fnu:
        scales = scales.view(torch.uint8)
    if scales.dtype != torch.uint8:
        return scales.to(torch.float32)
    bits = scales.to(torch.int32)
    exponent = torch.where(bits == 0, 0x00400000, bits << 23)  # 2 ** -127 is subnormal in float32
    return torch.where(bits == 255, 0x7FC00000, exponent).to(torch.int32).view(torch.float32)


def _unpacked(values: torch.Tensor, box: Box) -> torch.Tensor:
    table = torch.tensor(_E2M1, dtype=torch.float32, device=values.device)
    halves = torch.stack([values & 0xF, values >> 4], dim=-1).to(torch.int32)
    both = table[halves].reshape(*values.shape[:-1], 2 * values.shape[-1])
    return both.narrow(-1, box.offsets[-1] % 2, box.sizes[-1])


def _swap(dims: tuple[int, ...]) -> tuple[int, ...]:
    return (*dims[:-2], dims[-1], dims[-2])


# --- boxes --------------------------------------------------------------------------------------------------------


def disjoint(boxes: Sequence[Box]) -> tuple[Box, ...]:
    """Boxes that cover the same elements, each element once."""
    out: list[Box] = []
    for box in dict.fromkeys(boxes):
        rest = [box]
        for known in tuple(out):
            rest = [piece for old in rest for piece in _minus(old, known)]
        out += rest
    return tuple(out)


def _minus(box: Box, other: Box) -> Iterator[Box]:
    """The rest of a box without another, as disjoint boxes."""
    common = box.intersect(other)
    if common is None:
        yield box
        return
    offsets, sizes = list(box.offsets), list(box.sizes)
    for dim, (low, high) in enumerate(zip(common.offsets, common.ends, strict=True)):
        for start, end in ((offsets[dim], low), (high, offsets[dim] + sizes[dim])):
            if end > start:
                yield Box((*offsets[:dim], start, *offsets[dim + 1 :]), (*sizes[:dim], end - start, *sizes[dim + 1 :]))
        offsets[dim], sizes[dim] = low, high - low


def _part(region: QuantizedPiece, dim: int, start: int, size: int) -> QuantizedPiece:
    box = region.box
    offsets = (*box.offsets[:dim], box.offsets[dim] + start, *box.offsets[dim + 1 :])
    return QuantizedPiece(
        Box(offsets, (*box.sizes[:dim], size, *box.sizes[dim + 1 :])), region.dest.narrow(dim, start, size)
    )


def _pieces(region: QuantizedPiece, most: int) -> Iterator[QuantizedPiece]:
    """Cut a region into rows that lie one after the other, of at most ``most`` values."""
    return _cut(region, (1,) * len(region.box.sizes), lambda box: box.numel, most)


def _cut(
    region: QuantizedPiece, block: tuple[int, ...], cost: Callable[[Box], int], most: int
) -> Iterator[QuantizedPiece]:
    box = region.box
    if cost(box) <= most:
        yield region
        return
    for dim, (start, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        rows = -(-(start + size) // block[dim]) - start // block[dim]
        if rows == 1:
            continue
        step = max(1, rows * most // cost(box)) * block[dim]
        begin = start
        while begin < start + size:
            end = min(start + size, (begin // block[dim]) * block[dim] + step)
            yield from _cut(_part(region, dim, begin - start, end - begin), block, cost, most)
            begin = end
        return
    yield region
