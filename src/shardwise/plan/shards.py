"""Sharded files: each rank's pieces in files of its own, readable by torch's Hugging Face reader. Pure.

That reader knows one piece of a tensor for each file (``saved_offsets`` has one entry for a name), so a rank that holds
several disjoint pieces of one tensor puts the second into a further file, whose shard number continues after the
ranks'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shardwise.format.header import arrange, encode_header
from shardwise.format.sharding import encode_sharding_metadata
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.fragments import HeldTensor, in_shape
from shardwise.plan.layout import FileLayout, shard_name
from shardwise.plan.ownership import own
from shardwise.plan.roster import Roster


@dataclass(frozen=True, slots=True, eq=False)
class ShardPiece:
    """A region of a whole tensor, in a shard file; ``data`` has any shape whose row-major order is the box's."""

    spec: TensorSpec
    box: Box
    data: torch.Tensor


@dataclass(frozen=True)
class ShardFile:
    """A file that one rank writes alone: its bytes and the piece behind each entry."""

    layout: FileLayout
    pieces: Mapping[str, ShardPiece]


def plan_shards(
    held: Sequence[HeldTensor],
    roster: Roster,
    rank: int,
    file_index: Mapping[str, int] | None = None,
    stem: str = "model",
) -> tuple[ShardFile, ...]:
    """The files that ``rank`` writes of what it holds; other arguments as for `shard_files`."""
    pieces = []
    for number, fragment in own(held, roster, rank):
        spec, grid, _ = held[number]
        pieces += [ShardPiece(spec, box, data) for box, data in in_shape(fragment, grid, spec.shape)]
    for spec, _, parts in held:
        # No region assigns a tensor without elements to a rank: its first holder writes it.
        if not spec.numel and parts and roster.shard_set(spec.name, parts[0].part).members[0] == rank:
            pieces.append(ShardPiece(spec, Box.whole(spec.shape), torch.empty(spec.shape)))
    return shard_files(pieces, rank, roster.world_size, file_index, stem)


def shard_files(
    pieces: Sequence[ShardPiece], rank: int, world_size: int, file_index: Mapping[str, int] | None, stem: str
) -> tuple[ShardFile, ...]:
    """Put a rank's pieces, which are disjoint, into files; the second half of their names starts with ``stem``.

    ``file_index`` has the number (from 1) of the file that each tensor belongs to in the merged model, all 1 if not
    given.
    """
    numbers = file_index or {}
    last = max(numbers.values(), default=1)
    groups: dict[tuple[int, int], dict[str, ShardPiece]] = {}
    seen: Counter[str] = Counter()
    for piece in pieces:
        name = piece.spec.name
        groups.setdefault((rank + 1 + seen[name] * world_size, numbers.get(name, last)), {})[name] = piece
        seen[name] += 1
    return tuple(_file(shard_name(shard, n, last, stem), found) for (shard, n), found in sorted(groups.items()))


def _file(name: str, pieces: Mapping[str, ShardPiece]) -> ShardFile:
    entries = arrange([TensorSpec(n, piece.box.sizes, piece.spec.dtype) for n, piece in pieces.items()])
    header = encode_header(entries, encode_sharding_metadata({n: piece.box.offsets for n, piece in pieces.items()}))
    return ShardFile(FileLayout(name, header, entries), pieces)
