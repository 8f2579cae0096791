"""The part of a tensor that a rank holds, under the name in the file: the value that all stages exchange. Pure.

A fragment is a source when saving and a destination when loading. Its box is in the tensor's *grid*, a refinement of
its shape with the same row-major order (see `shardwise.plan.views`); for an unconverted tensor the grid is the shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from shardwise.geometry import Box, TensorSpec
from shardwise.plan.placement import MeshKey, Placement, Region, regions
from shardwise.plan.views import AxisView, hub_boxes, hub_views


class Fragment(NamedTuple):
    """A region of a tensor with its memory. Two are never compared but by identity.

    Attributes:
        box: Where it lies, in the tensor's grid.
        data: Its elements: shape ``box.sizes``, any strides, any device. Its dtype may differ from the file's.
    """

    box: Box
    data: torch.Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """How one native tensor, spread over a mesh, contributes to a tensor of the file. The same on every rank.

    Attributes:
        native_shape: Global shape of the native tensor.
        mesh: The mesh that it is spread over; ``None`` for a plain tensor, which every holder holds whole.
        placements: One for each mesh dimension.
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
        object.__setattr__(
            self, "_hash", hash((self.native_shape, self.mesh, self.placements, self.view, self.may_differ))
        )

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
    """This rank's part of one tensor of the file. Two are never compared but by identity.

    Attributes:
        spec: Name, global shape and dtype in the file.
        grid: The refinement of ``spec.shape`` in which the fragments' boxes are given.
        parts: Usually one; several where native tensors are joined into one of the file.
    """

    spec: TensorSpec
    grid: tuple[int, ...]
    parts: tuple[HeldPart, ...]

    def renamed(self, name: str) -> HeldTensor:
        """The same under another name."""
        return self._replace(spec=self.spec._replace(name=name))

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
    """The part of a tensor in a box; the same memory."""
    return whole[tuple(slice(o, e) for o, e in zip(box.offsets, box.ends, strict=True))]


def seen_through(view: AxisView | None, native: HeldPart) -> HeldPart:
    """A rank's share of a native tensor, seen through a view; the same memory. Without a view, unchanged."""
    if view is None:
        return native
    pieces = (pair for fragment in native.fragments for pair in hub_views(view, fragment.box, fragment.data))
    return HeldPart(replace(native.part, view=view), native.coordinate, tuple(Fragment(*pair) for pair in pieces))


def hold(
    spec: TensorSpec,
    part: Part,
    coordinate: tuple[int, ...],
    local: torch.Tensor,
    grid: tuple[int, ...] | None = None,
) -> HeldTensor:
    """Describe a local tensor as fragments.

    Args:
        spec: The tensor in the file.
        part: How the native tensor is spread, and how the file's tensor looks into it.
        coordinate: This rank's mesh coordinate; ``()`` for a plain tensor.
        local: This rank's local native tensor.
        grid: The file tensor's grid; its shape if not given.
    """
    fragments = tuple(_fragments(part.view, part.regions(coordinate), local))
    return HeldTensor(spec, grid or spec.shape, (HeldPart(part, coordinate, fragments),))


def _fragments(view: AxisView | None, held: Iterable[Region], local: torch.Tensor) -> Iterator[Fragment]:
    for region in held:
        data = local
        if region.box.sizes != local.shape:
            for dim, (start, size) in enumerate(zip(region.local, region.box.sizes, strict=True)):
                data = data.narrow(dim, start, size)
        if view is None:
            yield Fragment(region.box, data)
        else:
            yield from (Fragment(box, part) for box, part in hub_views(view, region.box, data))
