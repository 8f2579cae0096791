"""Sharded files: each rank's pieces in files of its own, readable by torch's Hugging Face reader. Pure.

That reader knows one piece of a tensor for each file (``saved_offsets`` has one entry for a name), so a rank that holds
several disjoint pieces of one tensor puts the second into a further file, whose shard number continues after the
ranks'.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shardwise.format.header import arrange, encode_header
from shardwise.format.sharding import encode_sharding_metadata
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.fragments import Fragment, HeldTensor
from shardwise.plan.layout import FileLayout, shard_name
from shardwise.plan.ownership import cut, own
from shardwise.plan.roster import Roster
from shardwise.plan.views import factor_shape


@dataclass(frozen=True, slots=True, eq=False)
class ShardPiece:
    """One piece of a tensor in a shard file.

    Attributes:
        tensor: Index into the list of held tensors.
        spec: The whole tensor.
        box: The piece's region, in the tensor's shape.
        data: Its elements, in any shape whose row-major order is the box's.
    """

    tensor: int
    spec: TensorSpec
    box: Box
    data: torch.Tensor


@dataclass(frozen=True)
class ShardFile:
    """A file that one rank writes alone: its bytes and the piece behind each entry."""

    layout: FileLayout
    pieces: Mapping[str, ShardPiece]


def coarsen(fragment: Fragment, shape: tuple[int, ...], grid: tuple[int, ...]) -> list[tuple[Box, torch.Tensor]]:
    """Express a fragment of a grid as boxes of the shape that the grid refines."""
    if shape == grid:
        return [(fragment.box, fragment.data)]
    per_dim: list[list[tuple[int, int, Box]]] = []
    position = 0
    for factors in factor_shape(shape, grid):
        end = position + len(factors)
        sub = Box(fragment.box.offsets[position:end], fragment.box.sizes[position:end])
        per_dim.append(_ranges(sub, factors))
        position = end
    out = []
    for combo in itertools.product(*per_dim):
        box = Box(tuple(start for start, _, _ in combo), tuple(length for _, length, _ in combo))
        inner = Box(
            tuple(o for _, _, part in combo for o in part.offsets), tuple(s for _, _, part in combo for s in part.sizes)
        )
        out.append((box, cut(fragment, inner).data))
    return out


def _ranges(box: Box, factors: tuple[int, ...]) -> list[tuple[int, int, Box]]:
    """A box of one dimension's factors as ranges of that dimension: ``(start, length, the sub-box)``."""
    whole = len(factors)
    while whole > 0 and box.sizes[whole - 1] == factors[whole - 1]:
        whole -= 1
    outer = max(whole - 1, 0)
    out = []
    for index in itertools.product(
        *(range(o, o + s) for o, s in zip(box.offsets[:outer], box.sizes[:outer], strict=True))
    ):
        sub = Box((*index, *box.offsets[outer:]), (*(1 for _ in index), *box.sizes[outer:]))
        start = 0
        for i, n in zip(sub.offsets, factors, strict=True):
            start = start * n + i
        out.append((start, math.prod(sub.sizes), sub))
    return out


def plan_shards(
    held: Sequence[HeldTensor],
    roster: Roster,
    rank: int,
    file_index: Mapping[str, int] | None = None,
    stem: str = "model",
) -> tuple[ShardFile, ...]:
    """The files that ``rank`` writes.

    Args:
        held: What the rank holds.
        roster: Who holds what.
        rank: The rank in the group.
        file_index: Number (from 1) of the file that each tensor belongs to in the merged model; all 1 if not given.
        stem: What the second half of file names starts with.
    """
    pieces = []
    for owned in own(held, roster, rank):
        tensor = held[owned.tensor]
        for box, data in coarsen(owned.fragment, tensor.spec.shape, tensor.grid):
            if box.numel:
                pieces.append(ShardPiece(owned.tensor, tensor.spec, box, data))
    pieces += _without_elements(held, roster, rank)
    return shard_files(pieces, rank, roster.world_size, file_index, stem)


def _without_elements(held: Sequence[HeldTensor], roster: Roster, rank: int) -> list[ShardPiece]:
    """Tensors without elements, which no region assigns to a rank: their first holder writes them."""
    return [
        ShardPiece(number, tensor.spec, Box.whole(tensor.spec.shape), torch.empty(tensor.spec.shape))
        for number, tensor in enumerate(held)
        if tensor.spec.numel == 0
        and any(roster.shard_set(tensor.spec.name, part.part).members[0] == rank for part in tensor.parts[:1])
    ]


def shard_files(
    pieces: Sequence[ShardPiece], rank: int, world_size: int, file_index: Mapping[str, int] | None, stem: str
) -> tuple[ShardFile, ...]:
    """Put a rank's pieces into files.

    Args:
        pieces: Disjoint pieces.
        rank: The rank in the group.
        world_size: Number of ranks in the group.
        file_index: As in `plan_shards`.
        stem: As in `plan_shards`.
    """
    files = max((file_index or {}).values(), default=1)
    groups: dict[tuple[int, int], dict[str, ShardPiece]] = {}
    seen: dict[str, int] = {}
    for piece in pieces:
        name = piece.spec.name
        turn = seen.get(name, 0)
        seen[name] = turn + 1
        number = (file_index or {}).get(name, files)
        groups.setdefault((rank + 1 + turn * world_size, number), {})[name] = piece
    return tuple(
        _file(shard_name(shard, number, files, stem), found) for (shard, number), found in sorted(groups.items())
    )


def _file(name: str, pieces: Mapping[str, ShardPiece]) -> ShardFile:
    entries = arrange([TensorSpec(n, piece.box.sizes, piece.spec.dtype) for n, piece in pieces.items()])
    header = encode_header(entries, encode_sharding_metadata({n: piece.box.offsets for n, piece in pieces.items()}))
    return ShardFile(FileLayout(name, header, entries), pieces)
