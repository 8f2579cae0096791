"""Turning column shards into rows. Pure.

A slice along another dimension than the first is many small runs in the file. Such tensors are written by rows: every
holder is the target of a consecutive range of rows, the ranks swap what each row is made of, a bounded number of rows
at a time, and each writes long runs. Everybody computes everybody's sends and receives from the roster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from shardwise.plan.fragments import HeldTensor, Part
from shardwise.plan.roster import Roster
from shardwise.plan.runs import stride_of
from shardwise.plan.views import refine_range
from shardwise.types import Box

#: Runs shorter than this, if there are more than `FEW_RUNS` of them, are exchanged rather than written one by one.
SHORT_RUN_BYTES = 64 * 1024
FEW_RUNS = 64
#: Bytes that a rank receives in one round of an exchange: the bound on its memory.
ROUND_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Exchange:
    """How one tensor becomes rows.

    Attributes:
        tensor: Index into the list of held tensors.
        outer: Leading grid dimensions that enumerate the rows.
        rows: Number of rows.
        row_shape: Grid shape of one row.
        members: The ranks concerned, ascending; each is the target of an equal share of the rows.
        sources: For each target, the ranks whose pieces make up a row, and their boxes.
        rows_per_round: How many rows a target receives at a time.
    """

    tensor: int
    grid: tuple[int, ...]
    outer: int
    rows: int
    members: tuple[int, ...]
    sources: dict[int, tuple[tuple[int, tuple[Box, ...]], ...]]
    rows_per_round: int

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Grid shape of one row."""
        return self.grid[self.outer :]

    @property
    def rounds(self) -> int:
        """Number of rounds; the same for every member."""
        widest = -(-self.rows // len(self.members))
        return -(-widest // self.rows_per_round)

    def target(self, rank: int, turn: int) -> tuple[int, int]:
        """First row and number of rows that ``rank`` receives in round ``turn`` (none where it has no more)."""
        position = self.members.index(rank)
        low = self.rows * position // len(self.members)
        high = self.rows * (position + 1) // len(self.members)
        start = min(low + turn * self.rows_per_round, high)
        return start, min(start + self.rows_per_round, high) - start

    def row_boxes(self, start: int, count: int) -> tuple[Box, ...]:
        """The boxes that rows ``start .. start + count`` are, in file order."""
        return tuple(
            Box((*lead.offsets, *(0 for _ in self.row_shape)), (*lead.sizes, *self.row_shape))
            for lead in refine_range(start, count, self.grid[: self.outer])
        )

    def pieces(self, boxes: tuple[Box, ...], start: int, count: int) -> Iterator[tuple[int, Box]]:
        """What ``boxes`` contribute to a range of rows: pairs of the box's index and the common region, in order."""
        wanted = self.row_boxes(start, count)
        for number, box in enumerate(boxes):
            for rows in wanted:
                common = box.intersect(rows)
                if common is not None:
                    yield number, common


ShapeKey = tuple[tuple[int, ...], int, tuple[Part, ...]]


class ExchangePlanner:
    """Decides which tensors are exchanged; remembers the answer for tensors of one shape and spread."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._known: dict[ShapeKey, int] = {}

    def plan(self, number: int, tensor: HeldTensor) -> Exchange | None:
        """The exchange that ``tensor`` needs, or ``None`` where its holders can write it as it lies.

        The answer depends on the tensor's description only, so all its holders give the same.
        """
        key = (tensor.grid, tensor.spec.itemsize, tuple(part.part for part in tensor.parts))
        outer = self._known.get(key)
        if outer is None:
            outer = self._known[key] = self._outer(tensor)
        return self._exchange(number, tensor, outer) if outer else None

    def _coordinates(self, tensor: HeldTensor, part: Part) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Pairs of the replicas of a piece and their (first's) coordinate."""
        for ranks in self._roster.shard_set(tensor.spec.name, part).replicas.values():
            yield ranks, () if part.mesh is None else self._roster.coordinates[ranks[0]][part.mesh]

    def _outer(self, tensor: HeldTensor) -> int:
        """Leading dimensions that make rows, or 0 where no exchange is needed."""
        outer, needed = 0, False
        for held in tensor.parts:
            for _, coordinate in self._coordinates(tensor, held.part):
                for box in held.part.boxes(coordinate):
                    how = stride_of(box, tensor.grid)
                    outer = max(outer, how.outer)
                    needed |= how.count > FEW_RUNS and how.run * tensor.spec.itemsize < SHORT_RUN_BYTES
        return outer if needed else 0

    def _exchange(self, number: int, tensor: HeldTensor, outer: int) -> Exchange:
        # A rank whose shard is empty takes no part: it has no memory that would tell the elements' dtype.
        pieces = [
            (ranks, boxes)
            for held in tensor.parts
            for ranks, coordinate in self._coordinates(tensor, held.part)
            if (boxes := held.part.boxes(coordinate))
        ]
        members = tuple(sorted({rank for ranks, _ in pieces for rank in ranks}))
        turn_of = {rank: ranks.index(rank) for ranks, _ in reversed(pieces) for rank in ranks}
        sources: dict[int, tuple[tuple[int, tuple[Box, ...]], ...]] = {}
        for target in members:
            merged: dict[int, tuple[Box, ...]] = {}
            for ranks, boxes in pieces:
                source = target if target in ranks else ranks[turn_of[target] % len(ranks)]
                merged[source] = merged.get(source, ()) + boxes
            sources[target] = tuple(sorted(merged.items()))
        row_bytes = math.prod(tensor.grid[outer:]) * tensor.spec.itemsize
        return Exchange(
            number,
            tensor.grid,
            outer,
            math.prod(tensor.grid[:outer]),
            members,
            sources,
            max(1, ROUND_BYTES // max(row_bytes, 1)),
        )
