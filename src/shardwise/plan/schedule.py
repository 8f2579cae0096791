"""Which bytes one rank writes where, in which order. Pure.

The order rotates: rank r of n starts r/n of the way into the list of files, so that ranks do not queue behind one
inode's lock (measured: two writers on one file took 0.7 s where rotating took 0.36 s).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import torch

from shardwise.geometry import DTYPE_BYTES, TensorSpec, only_run, runs
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.layout import Layout
from shardwise.plan.ownership import own
from shardwise.plan.roster import Roster
from shardwise.plan.rows import Exchange, ExchangePlanner


class WriteRun(NamedTuple):
    """Consecutive bytes of one file.

    Attributes:
        file: Index into the layout's files.
        offset: Byte offset in the file.
        spec: The tensor; the bytes are ``data`` in row-major order, cast to its dtype.
        start: Byte offset in the tensor.
        data: The elements, of any strides.
    """

    file: int
    offset: int
    spec: TensorSpec
    start: int
    data: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.data.numel() * self.spec.itemsize


@dataclass(frozen=True)
class Schedule:
    """What one rank writes of an export from its own memory, in order.

    Other tensors it first turns into rows with their other holders: ``exchanges``, in an order common to all.
    """

    runs: tuple[WriteRun, ...]
    exchanges: tuple[Exchange, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the rank writes from its own memory."""
        return sum(run.nbytes for run in self.runs)


def schedule(held: Sequence[HeldTensor], layout: Layout, roster: Roster, rank: int) -> Schedule:
    """Plan the writes of ``rank``, which holds ``held``, without asking anybody."""
    exchanges = ExchangePlanner(roster).plan_all(held) if roster.world_size > 1 else []
    skip = frozenset(exchange.tensor for exchange in exchanges)
    by_file: list[list[WriteRun]] = [[] for _ in layout.files]
    places = layout.places
    for number, (box, data) in own(held, roster, rank, skip):
        spec, grid, _ = held[number]
        file, offset = places[spec.name]
        first = only_run(box, grid)
        found = [(first, data)] if first is not None else [(at, data[index]) for at, _, index in runs(box, grid)]
        itemsize = DTYPE_BYTES[spec.dtype]
        by_file[file] += [WriteRun(file, offset + at * itemsize, spec, at * itemsize, run) for at, run in found]
    turn = rank * len(layout.files) // max(roster.world_size, 1)
    ordered = [run for its in by_file[turn:] + by_file[:turn] for run in sorted(its, key=attrgetter("offset"))]
    return Schedule(tuple(ordered), tuple(sorted(exchanges, key=lambda e: held[e.tensor].spec.name)))
