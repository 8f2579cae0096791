"""Reading bytes once that several ranks want: which rank reads which piece, in rounds of bounded size. Pure.

Ranks that want the same bytes (replicas under DDP or HSDP, norms that tensor parallelism leaves whole) know so from the
roster, and each computes the same rounds by itself: in every round each of some replicas reads a share, consecutive
pieces in file order, and receives the others' shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from shardwise.plan.fragments import Part
from shardwise.plan.roster import Roster

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is read and passed on at a time, in bytes.

    Attributes:
        round: What a round passes on: what a rank receives or sends at a time, whatever the number of replicas.
        largest: Largest share that one replica reads in a round; more in one request is no faster.
        smallest: Smallest one, however many replicas there are: else a request's latency is all that counts.
        alone: Smaller pieces of a share travel together, larger ones straight from memory to memory.
    """

    round: int = 16 * 2**20
    largest: int = 4 * 2**20
    smallest: int = 256 * 2**10
    alone: int = 256 * 2**10

    def share(self, replicas: int) -> int:
        """How much one of so many replicas reads in a round; also the largest piece."""
        return min(self.largest, max(self.smallest, self.round // replicas))


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Share(Generic[T]):
    """The pieces, in file order, that one replica, a rank in the group, reads in one round."""

    reader: int
    pieces: tuple[T, ...]


@dataclass(frozen=True, slots=True)
class Replicas:
    """Which ranks want the same as this one; ``roster`` knows only those that hold tensors of the same kinds."""

    roster: Roster
    rank: int

    def of(self, name: str, part: Part) -> tuple[int, ...]:
        """The ranks that hold the same of ``part`` of a tensor, ascending, this one included."""
        return self.roster.shard_set(name, part).replicas_of(self.rank)


def rounds(
    pieces: Iterable[tuple[int, T]], members: Sequence[int], limits: Limits = LIMITS
) -> Iterator[tuple[Share[T], ...]]:
    """Deal pieces to replicas: neighbours to one, and each new share to the replica that has read the least so far.

    ``pieces``, with their bytes, are in an order common to the replicas. One above ``limits.share`` is a share of its
    own, and one above ``limits.round`` a round. Every replica gets the same rounds for the same sizes.
    """
    read = dict.fromkeys(members, 0)

    def dealt(nbytes: int, share: tuple[T, ...]) -> Share[T]:
        reader = min(members, key=read.__getitem__)
        # A share of no bytes would be dealt to the same replica for ever.
        read[reader] += max(nbytes, 1)
        return Share(reader, share)

    shares = _groups(pieces, limits.share(len(members)))
    dealt_shares = ((nbytes, dealt(nbytes, share)) for nbytes, share in shares)
    return (found for _, found in _groups(dealt_shares, limits.round))


def _groups(pieces: Iterable[tuple[int, U]], most: int) -> Iterator[tuple[int, tuple[U, ...]]]:
    """Neighbours together, as many as have at most ``most`` bytes, at least one."""
    gathered: list[U] = []
    total = 0
    for nbytes, piece in pieces:
        if gathered and total + nbytes > most:
            yield total, tuple(gathered)
            gathered, total = [], 0
        gathered.append(piece)
        total += nbytes
    if gathered:
        yield total, tuple(gathered)
