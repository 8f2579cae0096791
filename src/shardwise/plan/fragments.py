"""The part of a tensor that a rank holds, under the name in the file: the value that all stages exchange. Pure.

A fragment is a source when saving and a destination when loading. Its box is in the tensor's *grid*, a refinement of
its shape with the same row-major order (see `shardwise.plan.views`); for an unconverted tensor the grid is the shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from shardwise.geometry import Box, TensorSpec, flat_offset
from shardwise.plan.placement import MeshKey, Placement, Region, regions
from shardwise.plan.views import AxisView, factor_shape, hub_boxes, hub_views


class Fragment(NamedTuple):
    """A region of a tensor, in its grid, with its memory. Two are never compared but by identity.

    ``data`` has the shape ``box.sizes``, any strides, any device; its dtype may differ from the file's.
    """

    box: Box
    data: torch.Tensor

    def cut(self, box: Box) -> Fragment:
        """The part inside ``box``, which lies within; no copy."""
        if box.sizes == self.data.shape:
            return self
        return Fragment(box, part_in_box(self.data, box.relative_to(self.box)))


@dataclass(frozen=True, slots=True)
class Part:
    """How one native tensor, spread over a mesh, contributes to a tensor of the file. The same on every rank.

    Attributes:
        mesh: The mesh that it is spread over; ``None`` for a plain tensor, which every holder holds whole.
        view: How the file's tensor looks into it; ``None`` where both are the same.
        may_differ: Whether replicas may have different values, as buffers do: what is saved is then the value of the
            lowest of the ranks that hold it, whole. Replicas of other tensors are compared.
    """

    native_shape: tuple[int, ...]
    mesh: MeshKey | None = None
    placements: tuple[Placement, ...] = ()
    view: AxisView | None = None
    may_differ: bool = False
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # A part is the key under which planning remembers what tensors have in common: it is hashed far more often
        # than it is made.
        content = self.native_shape, self.mesh, self.placements, self.view, self.may_differ
        object.__setattr__(self, "_hash", hash(content))

    def __hash__(self) -> int:
        return self._hash

    def regions(self, coordinate: tuple[int, ...]) -> tuple[Region, ...]:
        """The regions of the native tensor that the rank at ``coordinate`` holds."""
        if self.mesh is None:
            return (Region(Box.whole(self.native_shape), (0,) * len(self.native_shape)),)
        return regions(self.native_shape, self.mesh.shape, self.placements, coordinate)

    def boxes(self, coordinate: tuple[int, ...]) -> tuple[Box, ...]:
        """The regions of the file's tensor, in its grid, that the rank at ``coordinate`` holds."""
        held = (region.box for region in self.regions(coordinate))
        if self.view is None:
            return tuple(held)
        return tuple(hub for box in held for hub in hub_boxes(self.view, box))


class HeldPart(NamedTuple):
    """This rank's share of a `Part`: its coordinate and the memory behind each box."""

    part: Part
    coordinate: tuple[int, ...]
    fragments: tuple[Fragment, ...]


class HeldTensor(NamedTuple):
    """This rank's part of one tensor of the file, in a grid of its shape. Two are never compared but by identity.

    It has one part, or several where native tensors are joined into one of the file.
    """

    spec: TensorSpec
    grid: tuple[int, ...]
    parts: tuple[HeldPart, ...]

    def renamed(self, name: str) -> HeldTensor:
        """The same under another name."""
        return self._replace(spec=self.spec._replace(name=name))

    @staticmethod
    def alone(spec: TensorSpec, fragments: Iterable[Fragment]) -> HeldTensor:
        """Regions, in the tensor's own shape, of a tensor that is spread over no mesh."""
        return HeldTensor(spec, spec.shape, (HeldPart(Part(spec.shape), (), tuple(fragments)),))

    def elsewhere(self, memory: Callable[[torch.Tensor], torch.Tensor]) -> HeldTensor:
        """The same regions with other memory, given for each fragment's."""
        parts = [
            part._replace(fragments=tuple(Fragment(box, memory(data)) for box, data in part.fragments))
            for part in self.parts
        ]
        return self._replace(parts=tuple(parts))

    @property
    def fragments(self) -> tuple[Fragment, ...]:
        """All fragments of all parts."""
        if len(self.parts) == 1:
            return self.parts[0].fragments
        return tuple([fragment for part in self.parts for fragment in part.fragments])


def copy_whole(whole: torch.Tensor, held: HeldTensor) -> None:
    """Copy a whole tensor, of the shape of the grid, into what this rank holds of it."""
    for box, data in held.fragments:
        data.copy_(part_in_box(whole, box))


def part_in_box(whole: torch.Tensor, box: Box) -> torch.Tensor:
    """The part of a tensor in a box; the same memory. ``RuntimeError`` for a box that reaches beyond the tensor."""
    for dim, (start, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        whole = whole.narrow(dim, start, size)  # a slice would quietly be a smaller part
    return whole


def in_shape(
    fragment: Fragment, grid: tuple[int, ...], shape: tuple[int, ...], *, strided: bool = False
) -> Iterator[Fragment]:
    """Express a region in a grid as regions of the shape that the grid refines, as few as possible; no copy.

    Their memory keeps the grid's dimensions. If ``strided`` it has those of ``shape``, which may take more regions.
    """
    if grid == shape or not fragment.box.numel:
        yield from (fragment,) if fragment.box.numel else ()
        return
    (offsets, sizes), strides, at = fragment.box, fragment.data.stride() if strided else (), 0
    groups = factor_shape(shape, grid)
    per_dim: list[list[Box]] = []
    for factors in groups:
        dims = slice(at, at + len(factors))
        per_dim.append(_ranges(Box(offsets[dims], sizes[dims]), factors, strides[dims]))
        at += len(factors)
    for inner in itertools.product(*per_dim):
        starts = tuple(flat_offset(box.offsets, factors) for box, factors in zip(inner, groups, strict=True))
        box = Box(starts, tuple(box.numel for box in inner))
        data = fragment.cut(Box(*(sum(each, ()) for each in zip(*inner, strict=True)))).data
        yield Fragment(box, data.view(box.sizes) if strided else data)


def _ranges(box: Box, factors: tuple[int, ...], strides: tuple[int, ...]) -> list[Box]:
    """A box of one dimension's factors as boxes that are ranges of it, and one stride apart where there are any."""
    first = len(factors) - 1
    length, stride = box.sizes[first], strides[first] if strides else 0
    while first > 0 and box.sizes[first] == factors[first]:
        size, step = box.sizes[first - 1], strides[first - 1] if strides else 0
        if strides and size > 1 and length > 1 and step != stride * length:
            break
        stride = step if length == 1 else stride
        length *= size
        first -= 1
    outer = (range(o, o + s) for o, s in zip(box.offsets[:first], box.sizes[:first], strict=True))
    return [
        Box((*index, *box.offsets[first:]), (*(1 for _ in index), *box.sizes[first:]))
        for index in itertools.product(*outer)
    ]


def seen_through(view: AxisView | None, native: HeldPart) -> HeldPart:
    """A rank's share of a native tensor, seen through a view; the same memory. Without a view, unchanged."""
    if view is None:
        return native
    pieces = (pair for fragment in native.fragments for pair in hub_views(view, fragment.box, fragment.data))
    return HeldPart(replace(native.part, view=view), native.coordinate, tuple(Fragment(*pair) for pair in pieces))


def hold(spec: TensorSpec, part: Part, coordinate: tuple[int, ...], local: torch.Tensor) -> HeldTensor:
    """Describe ``local``, this rank's local native tensor, as fragments of the file's tensor ``spec``.

    ``coordinate`` is ``()`` for a plain tensor.
    """
    found: list[Fragment] = []
    for box, start in part.regions(coordinate):
        data = local if box.sizes == local.shape else part_in_box(local, Box(start, box.sizes))
        if part.view is None:
            found.append(Fragment(box, data))
        else:
            found += [Fragment(hub, piece) for hub, piece in hub_views(part.view, box, data)]
    return HeldTensor(spec, spec.shape, (HeldPart(part, coordinate, tuple(found)),))
