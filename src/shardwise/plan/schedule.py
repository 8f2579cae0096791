"""What one rank writes where, in which order. Pure.

The order rotates: rank r of n starts r/n of the way into the list of files, so that ranks do not queue behind one
inode's lock (measured: two writers on one file took 0.7 s where rotating took 0.36 s).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shardwise.plan.fragments import HeldTensor
from shardwise.plan.layout import Layout
from shardwise.plan.ownership import Owned, own
from shardwise.plan.roster import Roster
from shardwise.plan.rows import Exchange, ExchangePlanner
from shardwise.plan.runs import flat_offset, runs, stride_of
from shardwise.types import TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Consecutive bytes of one file.

    Attributes:
        file: Index into the layout's files.
        offset: Byte offset in the file.
        tensor: Index into the list of held tensors.
        spec: The tensor.
        start: Byte offset in the tensor.
        data: The elements, of any strides; in row-major order they are the bytes, after a cast to ``spec.dtype``.
    """

    file: int
    offset: int
    tensor: int
    spec: TensorSpec
    start: int
    data: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.data.numel() * self.spec.itemsize


@dataclass(frozen=True)
class Schedule:
    """One rank's work for an export.

    Attributes:
        runs: What it writes from its own memory, in order.
        exchanges: Tensors that it first turns into rows with their other holders, in an order common to all.
    """

    runs: tuple[Run, ...]
    exchanges: tuple[Exchange, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the rank writes from its own memory."""
        return sum(run.nbytes for run in self.runs)


def schedule(held: Sequence[HeldTensor], layout: Layout, roster: Roster, rank: int) -> Schedule:
    """Plan the writes of ``rank``, without asking anybody.

    Args:
        held: What the rank holds.
        layout: Where each tensor lies.
        roster: Who holds what.
        rank: The rank in the group.
    """
    planner = ExchangePlanner(roster)
    exchanges = []
    for number, tensor in enumerate(held):
        if len(tensor.grid) > 1 and roster.world_size > 1:
            exchange = planner.plan(number, tensor)
            if exchange is not None:
                exchanges.append(exchange)
    skip = frozenset(exchange.tensor for exchange in exchanges)
    found: list[Run] = []
    for owned in own(held, roster, rank, skip):
        found += _runs_of(owned, held[owned.tensor], layout)
    turn = rank * len(layout.files) // max(roster.world_size, 1)
    count = max(len(layout.files), 1)
    found.sort(key=lambda run: ((run.file - turn) % count, run.offset))
    return Schedule(tuple(found), tuple(sorted(exchanges, key=lambda e: held[e.tensor].spec.name)))


def _runs_of(owned: Owned, tensor: HeldTensor, layout: Layout) -> list[Run]:
    place = layout.places[tensor.spec.name]
    box, itemsize = owned.fragment.box, tensor.spec.itemsize
    if box.numel == 0:
        return []
    if stride_of(box, tensor.grid).count == 1:
        start = flat_offset(box.offsets, tensor.grid) * itemsize
        return [Run(place.file, place.offset + start, owned.tensor, tensor.spec, start, owned.fragment.data)]
    return [
        Run(
            place.file,
            place.offset + first * itemsize,
            owned.tensor,
            tensor.spec,
            first * itemsize,
            owned.fragment.data[index],
        )
        for first, _, index in runs(box, tensor.grid)
    ]


def written_by_tensor(schedule_: Schedule) -> Mapping[str, int]:
    """Bytes that a rank writes of each tensor from its own memory."""
    total: dict[str, int] = {}
    for run in schedule_.runs:
        total[run.spec.name] = total.get(run.spec.name, 0) + run.nbytes
    return total
