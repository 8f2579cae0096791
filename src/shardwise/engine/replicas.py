"""Comparing replicas: ranks that hold the same tensor have to hold the same bytes, or the saved model is a mix.

Each rank digests what it holds as a replica of others, and contributes one number to an exchange that a save has
anyway: the numbers of all ranks add up to zero if all replicas are equal. Only where they do not, two more exchanges
find out which tensors differ, and between which ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple, cast

import torch

from shardwise.comm import Group, JsonValue
from shardwise.disk.crc import crc32c
from shardwise.errors import ReplicasDifferError
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.roster import Roster
from shardwise.sources.tensor_bytes import byte_blocks
from shardwise.timing import phase

#: Bits of a tensor's hash that are added up over tensors and ranks; the sum then fits into 64 bits.
_BITS = 40
_MASK = (1 << _BITS) - 1
#: Number of tensors that are named, with the ranks of each; the others are counted.
_SHOWN = 5
_HINT = (
    "Replicas drift apart where gradients are not synchronised (no DDP, no all-reduce, ignored_params) or each rank "
    "starts from another seed. If each rank's own value is meant, as of experts that are kept by hand, name the "
    "tensors in per_rank_state; if the lowest rank's is to stand for all, set replicas='first'."
)


class Replica(NamedTuple):
    """A part of a tensor that ``ranks``, ascending, all hold, and this rank's memory of it."""

    name: str
    part: int
    ranks: tuple[int, ...]
    data: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Comparison:
    """This rank's replicas to compare, and their digests, once these are known. Every rank has one for each roster."""

    roster: Roster
    rank: int
    own: tuple[Replica, ...]
    crcs: tuple[int, ...] = ()

    def reading(self, memory: Mapping[str, torch.Tensor]) -> Comparison:
        """The same with other memory behind the tensors, by name: this rank's local tensors."""
        return replace(self, own=tuple([each._replace(data=(memory[each.name],)) for each in self.own]))

    def hashes(self) -> Iterable[tuple[Replica, int]]:
        """Each replica with a number that depends on its name and digest."""
        for replica, crc in zip(self.own, self.crcs, strict=True):
            text = f"{replica.name}\0{replica.part}\0{crc}".encode()
            yield replica, int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") & _MASK

    def weight(self, ranks: tuple[int, ...]) -> int:
        """The weight of this rank's numbers in the sum over its replicas: equal numbers add up to zero."""
        return 1 - len(ranks) if ranks[0] == self.rank else 1

    def share(self) -> int:
        """This rank's summand; the sum over all ranks is zero if all replicas are equal."""
        sums: dict[tuple[int, ...], int] = {}
        for replica, number in self.hashes():
            sums[replica.ranks] = sums.get(replica.ranks, 0) + number
        return sum((number & _MASK) * self.weight(ranks) for ranks, number in sums.items())


def comparison(held: Sequence[HeldTensor], roster: Roster, rank: int) -> Comparison:
    """Find what this rank holds as a replica of others, except for tensors that may differ. Local."""
    if roster.world_size == 1:
        return Comparison(roster, rank, ())
    found: list[Replica] = []
    before, part = -1, 0
    for number, held_part, shard_set in roster.holders(held):
        part = part + 1 if number == before else 0
        before = number
        if held_part.part.may_differ:
            continue
        ranks = shard_set.replicas_of(rank)
        if len(ranks) > 1:
            data = tuple([fragment.data for fragment in held_part.fragments])
            found.append(Replica(held[number].spec.name, part, ranks, data))
    return Comparison(roster, rank, tuple(found))


@phase("compare")
def look_at(comparisons: Sequence[Comparison], threads: int = 1) -> list[Comparison]:
    """Digest what this rank holds as replicas. Local; reads each byte of it once."""
    known: dict[tuple[object, ...], int] = {}  # a tied tensor has several names
    return [replace(each, crcs=_crcs(each.own, known, threads)) for each in comparisons]


def share_of(seen: Iterable[Comparison]) -> int:
    """This rank's summand of all comparisons together."""
    return sum(digested.share() for digested in seen)


def _crcs(own: Sequence[Replica], known: dict[tuple[object, ...], int], threads: int) -> tuple[int, ...]:
    keys = [tuple(map(_place, replica.data)) for replica in own]
    fresh = {key: replica.data for key, replica in zip(keys, own, strict=True) if key not in known}
    # Tensors that modules make are made one module at a time.
    made = {key: data for key, data in fresh.items() if any(tensor.is_meta for tensor in data)}
    known.update((key, _crc(data)) for key, data in made.items())
    fresh = {key: data for key, data in fresh.items() if key not in made}
    if threads > 1 and len(fresh) > 1:
        with ThreadPoolExecutor(threads, thread_name_prefix="shardwise-compare") as pool:
            known.update(zip(fresh, pool.map(_crc, fresh.values()), strict=True))
    else:
        known.update((key, _crc(data)) for key, data in fresh.items())
    return tuple([known[key] for key in keys])


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    flags = tensor.is_conj(), tensor.is_neg()
    return tensor.device, tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), tensor.dtype, *flags


def _crc(data: tuple[torch.Tensor, ...]) -> int:
    """CRC-32C of the row-major bytes of tensors, as they are in memory: a NaN equals one of the same bits."""
    crc = 0
    for tensor in data:
        for block in byte_blocks(tensor, tensor.dtype):
            crc = crc32c(block, crc)
    return crc


def refuse(seen: Iterable[Comparison], group: Group) -> None:
    """Find the replicas that differ and raise `ReplicasDifferError`, the same on every rank.

    All ranks call, once the sum of their shares is not zero.
    """
    for digested in seen:
        sums = dict.fromkeys([spec.name for spec in digested.roster.specs], 0)
        for replica, number in digested.hashes():
            sums[replica.name] += number * digested.weight(replica.ranks)
        _, totals = group.fold([], list(sums.values()), "looking for replicas that differ")
        names = [name for name, total in zip(sums, totals, strict=True) if total]
        if names:
            raise ReplicasDifferError(_message(names, digested, group), tensor=names[0], hint=_HINT)
    raise ReplicasDifferError("ranks hold different values of tensors that they hold as replicas", hint=_HINT)


def _message(names: Sequence[str], digested: Comparison, group: Group) -> str:
    shown = names[:_SHOWN]
    own: list[JsonValue] = [
        [replica.name, replica.part, replica.ranks[0], crc]
        for replica, crc in zip(digested.own, digested.crcs, strict=True)
        if replica.name in shown
    ]
    ranks = group.global_ranks
    rows = cast(list[list[tuple[str, int, int, int]]], group.gather_json(own, "comparing replicas that differ"))
    found: dict[str, dict[tuple[int, int], dict[int, list[int]]]] = {name: {} for name in shown}
    for rank, row in enumerate(rows):
        for name, part, first, crc in row:
            values = found[name].setdefault((part, first), {})
            values.setdefault(crc, []).append(ranks[rank])
    listed = "; ".join(f"{name!r} ({_values(sets)})" for name, sets in found.items())
    more = f"; and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    several, it = (f"{len(names)} tensors have", "them") if len(names) > 1 else ("a tensor has", "it")
    return f"{several} different values on ranks that hold the same part of {it}: {listed}{more}"


def _values(sets: Mapping[tuple[int, int], Mapping[int, Sequence[int]]]) -> str:
    """The ranks by what they hold, of the first set of replicas that differ."""
    for values in sets.values():
        if len(values) > 1:
            first, *others = [_ranks(ranks) for ranks in values.values()]
            verb = "have" if first.startswith("ranks") else "has"
            return ", ".join([f"{first} {verb} one value", *(f"{ranks} another" for ranks in others)])
    # One rank takes others for replicas that hold the tensor in another way.
    return " and ".join(_ranks([rank]) for values in sets.values() for ranks in values.values() for rank in ranks)


def _ranks(ranks: Sequence[int]) -> str:
    """Ranks for a message: ``rank 3``, ``ranks 0-2, 5``."""
    spans = [
        [rank for _, rank in run] for _, run in groupby(enumerate(sorted(ranks)), key=lambda pair: pair[1] - pair[0])
    ]
    text = ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans[:8])
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {text}{', ...' if len(spans) > 8 else ''}"
