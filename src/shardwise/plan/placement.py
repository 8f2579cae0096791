"""Which regions of a tensor a rank holds, from the placements and the rank's mesh coordinate. Pure.

The rules are those of ``torch.distributed.tensor``: mesh dimensions apply from left to right, a dimension is cut as
``torch.chunk`` cuts (pieces of ``ceil(n / parts)``, the last ones short or empty), and a strided shard first cuts the
dimension into ``split_factor`` groups, each of which is cut again. Where FSDP2 wraps a tensor-parallel parameter the
result is one region; as a packed placement (fused weights under tensor parallelism) it is several disjoint ones, which
DCP's own hooks describe as a single chunk.

The exception to the order is FSDP2 over tensor parallelism along one dimension. FSDP2 cuts what tensor parallelism left
on the rank, writes its strided shard *before* the others and gives it their number as ``split_factor``; read from left
to right that says the same for even pieces only, and something else where the weight is packed as well (measured with
torch 2.13: ``full_tensor()`` of such a parameter comes out permuted).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from shardwise.geometry import Box


@dataclass(frozen=True, slots=True)
class Replicated:
    """Every index of the mesh dimension holds the same."""


@dataclass(frozen=True, slots=True)
class Sharded:
    """The mesh dimension cuts tensor dimension ``dim`` into consecutive pieces."""

    dim: int


@dataclass(frozen=True, slots=True)
class Strided:
    """The mesh dimension takes one piece from each of ``split_factor`` groups of tensor dimension ``dim``."""

    dim: int
    split_factor: int


Placement = Replicated | Sharded | Strided


class MeshKey(NamedTuple):
    """The key by which ranks identify the same kind of mesh: names (or empty strings) and sizes of its dimensions.

    ``ordinal`` tells meshes of equal names and shape on one rank apart, in the order in which tensors use them.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    ordinal: int = 0


class Region(NamedTuple):
    """One rectangular piece of what a rank holds: where it lies globally, and starts in the rank's local tensor."""

    box: Box
    local: tuple[int, ...]


Interval = tuple[int, int]


def chunk(length: int, parts: int, index: int) -> Interval:
    """Start and length of piece ``index`` when ``length`` elements are cut into ``parts`` as ``torch.chunk`` does."""
    size = -(-length // parts)
    start = min(index * size, length)
    return start, min(size, length - start)


def _cut(intervals: list[Interval], groups: int, parts: int, index: int) -> list[Interval]:
    """Piece ``index`` of ``parts`` of each group of what is held along one dimension, neighbours merged."""
    length = sum(size for _, size in intervals)
    taken: list[Interval] = []
    for group in range(groups):
        group_start, group_length = chunk(length, groups, group)
        start, size = chunk(group_length, parts, index)
        start, position = start + group_start, 0
        for begin, held in intervals:
            low, high = max(start, position), min(start + size, position + held)
            if low < high and taken and sum(taken[-1]) == begin + low - position:
                taken[-1] = (taken[-1][0], taken[-1][1] + high - low)
            elif low < high:
                taken.append((begin + low - position, high - low))
            position += held
    return taken


def _cut_last(mesh_shape: tuple[int, ...], placements: tuple[Placement, ...]) -> tuple[int, ...]:
    """Mesh dimensions over which FSDP2 cuts what later ones left: strided by exactly the number of those pieces."""
    found = []
    for at, placement in enumerate(placements):
        if isinstance(placement, Strided):
            later = [
                n
                for n, other in zip(mesh_shape[at + 1 :], placements[at + 1 :], strict=True)
                if not isinstance(other, Replicated) and other.dim == placement.dim
            ]
            if later and math.prod(later) == placement.split_factor:
                found.append(at)
    return tuple(found)


@lru_cache(maxsize=65536)
def regions(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Placement, ...], coordinate: tuple[int, ...]
) -> tuple[Region, ...]:
    """The disjoint regions of a tensor that the rank at ``coordinate`` holds, in the order of its local tensor.

    ``shape`` is global; the others have one entry for each mesh dimension. None where the local tensor is empty.
    """
    per_dim: list[list[Interval]] = [[(0, n)] if n else [] for n in shape]
    late = _cut_last(mesh_shape, placements)
    for at in (*(i for i in range(len(placements)) if i not in late), *reversed(late)):
        placement = placements[at]
        if not isinstance(placement, Replicated):
            groups = placement.split_factor if isinstance(placement, Strided) and at not in late else 1
            per_dim[placement.dim] = _cut(per_dim[placement.dim], groups, mesh_shape[at], coordinate[at])
    starts = [itertools.accumulate((size for _, size in intervals), initial=0) for intervals in per_dim]
    return tuple(
        Region(Box(tuple(b for (b, _), _ in each), tuple(s for (_, s), _ in each)), tuple(at for _, at in each))
        for each in itertools.product(*map(zip, per_dim, starts))
    )


def shard_coordinate(placements: tuple[Placement, ...], coordinate: tuple[int, ...]) -> tuple[int, ...]:
    """The part of a coordinate that decides what is held: equal for two ranks if and only if they are replicas."""
    return tuple(
        index for placement, index in zip(placements, coordinate, strict=True) if not isinstance(placement, Replicated)
    )
