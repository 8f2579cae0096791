"""One writer for every byte, balanced by bytes. Pure.

Ranks that hold the same bytes (replicas under HSDP, DDP or plain tensors) share the writing: a large region is cut into
rows, one piece for each replica; small ones go whole to the replica that has the least so far. Replicas see the same
tensors in the same order, so each computes the whole assignment by itself.

Where replicas may have different values (`Part.may_differ`) nothing is split: the lowest rank writes all that it holds,
so that tensors which belong together are published with the values of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shardwise.geometry import split_rows
from shardwise.plan.fragments import Fragment, HeldTensor
from shardwise.plan.roster import Roster

#: Below this, a region is written whole by one replica: cutting it would only make small writes.
SPLIT_REPLICATED_ABOVE_BYTES = 4 * 2**20


class OwnedFragment(NamedTuple):
    """A region that this rank alone writes, and its tensor's number in the list of held ones."""

    tensor: int
    fragment: Fragment


def own(
    held: Sequence[HeldTensor], roster: Roster, rank: int, skip: frozenset[int] = frozenset()
) -> list[OwnedFragment]:
    """The regions that ``rank`` writes of what it holds, without the tensors ``skip``, whose rows are exchanged."""
    loads: dict[tuple[int, ...], list[int]] = {}
    mine: list[OwnedFragment] = []
    for number, part, shard_set in roster.holders(held):
        if number in skip:
            continue
        replicas = shard_set.replicas_of(rank)
        if len(replicas) == 1 or part.part.may_differ:
            if replicas[0] == rank:
                mine.extend([OwnedFragment(number, fragment) for fragment in part.fragments])
            continue
        load = loads.setdefault(replicas, [0] * len(replicas))
        position = replicas.index(rank)
        for fragment in part.fragments:
            taken = _share(fragment, held[number].spec.itemsize, load, position)
            if taken is not None:
                mine.append(OwnedFragment(number, taken))
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
