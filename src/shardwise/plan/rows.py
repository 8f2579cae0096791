"""Turning column shards into rows. Pure.

A slice along another dimension than the first is many small runs in the file. Such tensors are written by rows: every
holder is the target of a consecutive range of rows, the ranks swap what each row is made of, a bounded number of rows
at a time, and each writes long runs. Everybody computes everybody's sends and receives from the roster.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from shardwise.geometry import Box, flat_offset, stride_of
from shardwise.plan.fragments import HeldTensor, Part
from shardwise.plan.placement import MeshKey, Replicated
from shardwise.plan.roster import Roster, ShardSet
from shardwise.plan.views import AxisView, refine_range

#: Runs shorter than this, if there are more than `FEW_RUNS` of them, are exchanged rather than written one by one.
SHORT_RUN_BYTES = 64 * 1024
FEW_RUNS = 64
#: Bytes that a rank receives in one round of an exchange: the bound on its memory.
ROUND_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Exchange:
    """How tensors of one shape and spread become rows; a target receives ``rows_per_round`` at a time.

    ``held`` are the replicas that hold each piece, and its boxes, at least one each; ``outer`` leading dimensions of
    the grid enumerate the rows.
    """

    held: tuple[tuple[tuple[int, ...], tuple[Box, ...]], ...]
    grid: tuple[int, ...]
    outer: int
    rows_per_round: int
    _known: dict[int, tuple[tuple[int, tuple[Box, ...]], ...]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def lead(self) -> tuple[int, ...]:
        """Grid shape of the rows."""
        return self.grid[: self.outer]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Grid shape of one row."""
        return self.grid[self.outer :]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.prod(self.lead)

    @property
    def rounds(self) -> int:
        """Number of rounds; the same for every member."""
        widest = -(-self.rows // len(self.members))
        return -(-widest // self.rows_per_round)

    @cached_property
    def _turn(self) -> dict[int, int]:
        return {rank: turn for ranks, _ in reversed(self.held) for turn, rank in enumerate(ranks)}

    @cached_property
    def members(self) -> tuple[int, ...]:
        """All ranks concerned, ascending; each is the target of an equal share of the rows."""
        return tuple(sorted(self._turn))

    @cached_property
    def _position(self) -> dict[int, int]:
        return {rank: position for position, rank in enumerate(self.members)}

    @cached_property
    def _row_ranges(self) -> list[tuple[int, int]]:
        """The first row that each piece touches, and the one after the last."""
        found = []
        for _, boxes in self.held:
            first = min(flat_offset(box.offsets[: self.outer], self.lead) for box in boxes)
            last = max(flat_offset(tuple(end - 1 for end in box.ends[: self.outer]), self.lead) for box in boxes)
            found.append((first, last + 1))
        return found

    def share(self, target: int) -> tuple[int, int]:
        """The first row of a target, and the one after its last."""
        rows, position, count = self.rows, self._position[target], len(self.members)
        return rows * position // count, rows * (position + 1) // count

    def sources(self, target: int) -> tuple[tuple[int, tuple[Box, ...]], ...]:
        """The ranks whose pieces make up the rows of a target, and their boxes.

        Computed on demand: of the many ranks that hold a tensor, each exchanges rows with few.
        """
        known = self._known.get(target)
        if known is None:
            low, high = self.share(target)
            merged: dict[int, tuple[Box, ...]] = {}
            for (ranks, boxes), (first, end) in zip(self.held, self._row_ranges, strict=True):
                if first < high and low < end:
                    source = target if target in ranks else ranks[self._turn[target] % len(ranks)]
                    merged[source] = merged.get(source, ()) + boxes
            known = self._known[target] = tuple(sorted(merged.items()))
        return known

    def target(self, rank: int, turn: int) -> tuple[int, int]:
        """First row and number of rows that ``rank`` receives in round ``turn`` (none where it has no more)."""
        low, high = self.share(rank)
        start = min(low + turn * self.rows_per_round, high)
        return start, min(start + self.rows_per_round, high) - start

    def row_boxes(self, start: int, count: int) -> tuple[Box, ...]:
        """The boxes that rows ``start .. start + count`` are, in file order."""
        return tuple(
            Box((*lead.offsets, *(0 for _ in self.row_shape)), (*lead.sizes, *self.row_shape))
            for lead in refine_range(start, count, self.lead)
        )

    def pieces(self, boxes: tuple[Box, ...], start: int, count: int) -> Iterator[tuple[Box, Box]]:
        """The contribution of ``boxes`` to a range of rows: pairs of a box and the common region, in order."""
        wanted = self.row_boxes(start, count)
        for box in boxes:
            for rows in wanted:
                common = box.intersect(rows)
                if common is not None:
                    yield box, common


ShapeKey = tuple[tuple[int, ...], int, tuple[Part, ...]]
#: The replicas of a piece, and the coordinate of the first of them.
Holders = tuple[tuple[int, ...], tuple[int, ...]]


class ExchangePlanner:
    """Decides which tensors are exchanged; remembers the answer for tensors of one shape and spread."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._known: dict[ShapeKey, int] = {}
        self._alike: dict[ShapeKey, int] = {}
        self._planned: dict[tuple[ShapeKey, tuple[ShardSet, ...]], Exchange] = {}
        self._at_index: dict[tuple[ShardSet, Part, tuple[int, ...]], dict[tuple[int, ...], list[Holders]]] = {}

    def plan_all(self, held: Sequence[HeldTensor]) -> list[tuple[int, Exchange]]:
        """The exchanges that a rank's tensors need, each with its tensor's number."""
        planned = ((number, self.plan(tensor)) for number, tensor in enumerate(held) if len(tensor.grid) > 1)
        return [(number, exchange) for number, exchange in planned if exchange is not None]

    def plan(self, tensor: HeldTensor) -> Exchange | None:
        """The exchange that ``tensor`` needs, or ``None`` where its holders can write it as it lies.

        The answer depends on the tensor's description only, so all its holders give the same.
        """
        key = (tensor.grid, tensor.spec.itemsize, tuple([part.part for part in tensor.parts]))
        outer = self._known.get(key)
        if outer is None:
            outer = self._known[key] = self._outer(tensor, key)
        if not outer:
            return None
        sets = tuple([self._roster.shard_set(tensor.spec.name, held.part) for held in tensor.parts])
        planned = self._planned.get((key, sets))
        if planned is None:
            planned = self._planned[(key, sets)] = self._exchange(tensor, outer)
        return planned

    def _outer(self, tensor: HeldTensor, key: ShapeKey) -> int:
        """Leading dimensions that make rows, or 0 where no exchange is needed."""
        if all(_in_rows(part) for part in key[2]):
            return 0
        # Spread over the ranks, one expert of a fused tensor makes the same boxes as the next: those of the first
        # expert decide for all; computing each would take the number of experts times that of ranks.
        alike = (*key[:2], tuple([_first_alike(part) for part in key[2]]))
        known = self._alike.get(alike)
        if known is not None:
            return known
        outer, needed = 0, False
        for held in tensor.parts:
            for _, coordinate in self._holders(tensor, held.part):
                for box in held.part.boxes(coordinate):
                    how = stride_of(box, tensor.grid)
                    outer = max(outer, how.outer)
                    needed |= how.count > FEW_RUNS and how.run * tensor.spec.itemsize < SHORT_RUN_BYTES
        self._alike[alike] = outer if needed else 0
        return self._alike[alike]

    def _holders(self, tensor: HeldTensor, part: Part) -> Sequence[Holders]:
        """Who holds a piece of the tensor; some may turn out to hold none, where the view leaves out what they have."""
        found = self._roster.shard_set(tensor.spec.name, part)
        if part.mesh is None:
            return [(ranks, ()) for ranks in found.replicas.values()]
        fixed = _fixed(part.view)
        native = replace(part, view=None)
        dims = tuple([dim for dim, _, _ in fixed])
        index = self._at_index.get((found, native, dims))
        if index is None:
            index = self._at_index[(found, native, dims)] = self._by_index(found, native, part.mesh, dims)
        return index.get(tuple([at for _, _, at in fixed]), ())

    def _by_index(
        self, found: ShardSet, native: Part, mesh: MeshKey, dims: tuple[int, ...]
    ) -> dict[tuple[int, ...], list[Holders]]:
        """The holders of every index along some dimensions; all holders under ``()`` where there are none."""
        index: dict[tuple[int, ...], list[Holders]] = {}
        for ranks in found.replicas.values():
            coordinate = self._roster.coordinates[ranks[0]][mesh]
            boxes = [region.box for region in native.regions(coordinate)]
            ranges = [[range(box.offsets[d], box.offsets[d] + box.sizes[d]) for d in dims] for box in boxes]
            for at in dict.fromkeys(at for its_ranges in ranges for at in itertools.product(*its_ranges)):
                index.setdefault(at, []).append((ranks, coordinate))
        return index

    def _exchange(self, tensor: HeldTensor, outer: int) -> Exchange:
        # A rank whose shard is empty takes no part: it has no memory that would show the elements' dtype.
        pieces = tuple(
            # Of replicas that may differ the lowest takes part alone.
            (ranks[:1] if held.part.may_differ else ranks, boxes)
            for held in tensor.parts
            for ranks, coordinate in self._holders(tensor, held.part)
            if (boxes := held.part.boxes(coordinate))
        )
        row_bytes = math.prod(tensor.grid[outer:]) * tensor.spec.itemsize
        return Exchange(pieces, tensor.grid, outer, max(1, ROUND_BYTES // max(row_bytes, 1)))


def _fixed(view: AxisView | None) -> list[tuple[int, int, int]]:
    """The whole native dimensions that a view fixes: ``(native dimension, native grid dimension, index)``."""
    if view is None:
        return []
    dims = [dim if len(factors) == 1 else None for dim, factors in enumerate(view.native_grid) for _ in factors]
    return [(dim, at, index) for at, index in view.fixed if (dim := dims[at]) is not None]


def _in_rows(part: Part) -> bool:
    """Whether a part is cut along the first dimension only, so that whatever a rank holds of it is runs of rows."""
    return part.view is None and all(isinstance(p, Replicated) or p.dim == 0 for p in part.placements)


def _first_alike(part: Part) -> Part:
    """The same part at the first index of every whole dimension that its view fixes."""
    if part.view is None:
        return part
    whole = {at for _, at, _ in _fixed(part.view)}
    fixed = tuple([(at, 0 if at in whole else index) for at, index in part.view.fixed])
    return replace(part, view=replace(part.view, fixed=fixed))
