"""Which bytes one rank writes where, in which order: one writer for every byte, balanced by bytes. Pure.

Ranks that hold the same bytes (replicas under HSDP, DDP or plain tensors) share the writing: a large region is cut into
rows, one piece for each replica; small ones go whole to the replica that has the least so far. Replicas see the same
tensors in the same order, so each computes the whole assignment by itself.

Where replicas may have different values (`Part.may_differ`) nothing is split: the lowest rank writes all that it holds,
so that tensors which belong together are published with the values of one rank.

In an export the order rotates: rank r of n starts r/n of the way into the list of files, so that ranks do not queue
behind one inode's lock (measured: two writers on one file took 0.7 s where rotating took 0.36 s).

Shards are files of one rank each, readable by torch's Hugging Face reader. That reader knows one piece of a tensor for
each file (``saved_offsets`` has one entry for a name), so a rank that holds several disjoint pieces of one tensor puts
the second into a further file, whose shard number continues after the ranks'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import torch

from shardwise.format.header import arrange, encode_header, encode_sharding_metadata
from shardwise.geometry import DTYPE_BYTES, Box, TensorSpec, only_run, runs, split_rows
from shardwise.plan.fragments import Fragment, HeldTensor, in_shape
from shardwise.plan.layout import FileLayout, Layout, shard_name
from shardwise.plan.roster import Roster
from shardwise.plan.rows import Exchange, ExchangePlanner

#: Below this, a region is written whole by one replica: cutting it would only make small writes.
SPLIT_REPLICATED_ABOVE_BYTES = 4 * 2**20


def own(
    held: Sequence[HeldTensor], roster: Roster, rank: int, skip: frozenset[int] = frozenset()
) -> list[tuple[int, Fragment]]:
    """The regions that ``rank`` alone writes of what it holds, each with its tensor's number in the list.

    The rows of the tensors ``skip`` are exchanged.
    """
    loads: dict[tuple[int, ...], list[int]] = {}
    mine: list[tuple[int, Fragment]] = []
    for number, part, shard_set in roster.holders(held):
        if number in skip:
            continue
        replicas = shard_set.replicas_of(rank)
        if len(replicas) == 1 or part.part.may_differ:
            if replicas[0] == rank:
                mine.extend([(number, fragment) for fragment in part.fragments])
            continue
        load = loads.setdefault(replicas, [0] * len(replicas))
        position = replicas.index(rank)
        for fragment in part.fragments:
            taken = _share(fragment, held[number].spec.itemsize, load, position)
            if taken is not None:
                mine.append((number, taken))
    return mine


def left_to_others(held: Sequence[HeldTensor], roster: Roster, rank: int) -> frozenset[str]:
    """Names of the tensors whose replicas may differ and that a lower rank than ``rank`` writes."""
    return frozenset(
        held[number].spec.name
        for number, part, shard_set in roster.holders(held)
        if part.part.may_differ and shard_set.replicas_of(rank)[0] != rank
    )


def _share(fragment: Fragment, itemsize: int, load: list[int], position: int) -> Fragment | None:
    nbytes = fragment.box.numel * itemsize
    if nbytes < SPLIT_REPLICATED_ABOVE_BYTES:
        lightest = min(range(len(load)), key=load.__getitem__)
        load[lightest] += max(nbytes, 1)
        return fragment if lightest == position else None
    box = split_rows(fragment.box, len(load), position)
    return None if box is None else fragment.cut(box)


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

    Other tensors it first turns into rows with their other holders: ``exchanges``, each with its tensor's number in the
    list of held ones, in an order common to all.
    """

    runs: tuple[WriteRun, ...]
    exchanges: tuple[tuple[int, Exchange], ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the rank writes from its own memory."""
        return sum(run.nbytes for run in self.runs)


def schedule(held: Sequence[HeldTensor], layout: Layout, roster: Roster, rank: int) -> Schedule:
    """Plan the writes of ``rank``, which holds ``held``, without asking anybody."""
    exchanges = ExchangePlanner(roster).plan_all(held) if roster.world_size > 1 else []
    skip = frozenset(number for number, _ in exchanges)
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
    return Schedule(tuple(ordered), tuple(sorted(exchanges, key=lambda pair: held[pair[0]].spec.name)))


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
