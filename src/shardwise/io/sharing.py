"""Passing on what one replica has read: rounds of reads and messages between ranks that want the same bytes.

The bytes travel as they are in the file, and every rank converts them as if it had read them itself. While a round is
passed on, the next one is read. A rank whose reading fails keeps taking part until the rounds are over, so that its
peers are not left waiting; its failure is then raised where all ranks learn of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from shardwise.comm import Group
from shardwise.format.dtypes import torch_dtype
from shardwise.io.memory import blocks, flat_bytes
from shardwise.io.reader import Reader
from shardwise.io.storage import Storage, file_system_type
from shardwise.plan.reads import Read
from shardwise.plan.sharing import LIMITS, Limits, Share, rounds

#: Every dtype's elements lie at a multiple of this in a message.
_ALIGNMENT = 16

#: As the system calls them in its list of mounts.
_REMOTE_NAMES = (
    "nfs nfs4 lustre gpfs ceph beegfs wekafs panfs pvfs2 orangefs glusterfs afs cifs smb3 smbfs ocfs2 gfs2 fuse"
)
_REMOTE = frozenset(_REMOTE_NAMES.split())
#: Local file systems that happen to be served by a process; all other ``fuse.*`` are taken for remote ones.
_LOCAL_FUSE = frozenset(("fuse.fuse-overlayfs", "fuse.overlayfs", "fuse.mergerfs", "fuse.ntfs-3g", "fuse.bindfs"))


@runtime_checkable
class KnowsDistance(Protocol):
    """What a `Storage` may offer besides: whether reading a file goes over a network."""

    def is_remote(self, path: Path) -> bool:
        """Whether the files at ``path``, which exists, are on another machine."""
        ...


def is_remote(storage: Storage, path: Path) -> bool:
    """Whether replicas that read at ``path`` ask a network file system for the same bytes."""
    if isinstance(storage, KnowsDistance):
        return storage.is_remote(path)
    kind = file_system_type(path)
    return kind in _REMOTE or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE)


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """A piece, and where its bytes are in memory as they are in the file: its own destination if that will do."""

    read: Read
    memory: torch.Tensor

    @property
    def is_staged(self) -> bool:
        return self.memory is not self.read.dest


@dataclass(slots=True, eq=False)
class _Parcel:
    """The memory of one share on one rank: the messages that carry it."""

    places: list[_Place] = field(default_factory=list)
    messages: list[torch.Tensor] = field(default_factory=list)

    def install(self) -> None:
        """Convert what does not lie at its destination yet."""
        for place in self.places:
            if place.is_staged:
                place.read.dest.detach().copy_(place.memory.view(place.read.dest.shape))


@dataclass(frozen=True, slots=True)
class _Round:
    members: tuple[int, ...]
    shares: tuple[Share[Read], ...]
    limits: Limits


@dataclass(slots=True)
class _Outcome:
    """What this rank has read of a round, by the share's number, and what went wrong first."""

    parcels: dict[int, _Parcel] = field(default_factory=dict)
    failure: Exception | None = None


def read_shared(
    shared: Mapping[tuple[int, ...], Sequence[Read]], reader: Reader, group: Group, limits: Limits = LIMITS
) -> Exception | None:
    """Read what replicas want alike, each byte by one of them. The replicas call, each with sets of the same reads.

    Args:
        shared: The ranks of each set of replicas that this rank is part of -> reads that they have in common, in one
            order but for each rank's own destinations.
        reader: Reads this rank's shares, and counts.
        group: Whose ranks pass on.
        limits: How much at a time; the same on every rank.

    Returns:
        What failed locally first; later rounds are then passed on as they are, and are not to be used.

    Raises:
        PeerError: A peer left.
    """
    failure: Exception | None = None
    # One order of the sets for all ranks, so that no two of them wait for each other in different sets.
    upcoming = (
        _Round(m, shares, limits) for m, reads in sorted(shared.items()) for shares in _rounds(m, reads, limits)
    )
    current = next(upcoming, None)
    if current is None:
        return None
    with ThreadPoolExecutor(1, thread_name_prefix="shardwise-ahead") as ahead:
        reading = ahead.submit(_read, current, reader, group.rank, idle=False)
        while current is not None:
            outcome = reading.result()
            failure = failure or outcome.failure
            following = next(upcoming, None)
            if following is not None:
                reading = ahead.submit(_read, following, reader, group.rank, idle=failure is not None)
            refused = _pass_on(current, outcome.parcels, reader, group, idle=failure is not None)
            failure = failure or refused
            current = following
    return failure


def _rounds(members: tuple[int, ...], reads: Sequence[Read], limits: Limits) -> Iterator[tuple[Share[Read], ...]]:
    ordered = sorted(reads, key=lambda read: (read.file, read.offset))
    pieces = (piece for read in ordered for piece in cut_read(read, limits.share(len(members))))
    yield from rounds(((piece.rows * piece.width, piece) for piece in pieces), members, limits)


def cut_read(read: Read, most: int) -> Iterator[Read]:
    """Reads of at most ``most`` bytes each that together do what ``read`` does; cut alike on every rank."""
    if read.dest.numel() == 0:
        return
    if read.rows * read.width <= most:
        yield read
    elif read.rows == 1:
        offset = read.offset
        for block in blocks(read.dest[0], max(1, most // read.spec.itemsize)):
            nbytes = block.numel() * read.spec.itemsize
            yield Read(read.file, offset, 1, nbytes, nbytes, block.unsqueeze(0), read.spec)
            offset += nbytes
    else:
        step = max(1, most // read.width)
        for first in range(0, read.rows, step):
            dest = read.dest[first : first + step]
            offset = read.offset + first * read.period
            part = Read(read.file, offset, dest.shape[0], read.period, read.width, dest, read.spec)
            yield from cut_read(part, most) if read.width > most else (part,)


def _parcel(share: Share[Read], alone: int) -> _Parcel:
    """Memory for a share; its messages depend on nothing that differs between ranks."""
    parcel = _Parcel()
    small: list[tuple[Read, int]] = []
    end = 0
    for read in share.pieces:
        nbytes = read.rows * read.width
        if nbytes < alone:
            small.append((read, end))
            end += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
            continue
        dest, dtype = read.dest.detach(), torch_dtype(read.spec.dtype)
        fits = dest.device.type == "cpu" and dest.dtype == dtype and dest.is_contiguous()
        memory = read.dest if fits else torch.empty((read.rows, nbytes // read.rows // dtype.itemsize), dtype=dtype)
        parcel.places.append(_Place(read, memory))
        parcel.messages.append(flat_bytes(memory))
    if small:
        packed = torch.empty(end, dtype=torch.uint8)
        for read, start in small:
            memory = packed[start : start + read.rows * read.width].view(torch_dtype(read.spec.dtype))
            parcel.places.append(_Place(read, memory.view(read.rows, -1)))
        parcel.messages.append(packed)
    return parcel


def _read(this: _Round, reader: Reader, rank: int, *, idle: bool) -> _Outcome:
    """Read this rank's shares of a round, unless there is no point any more; what fails is kept for later."""
    outcome = _Outcome()
    try:
        for number, share in enumerate(this.shares):
            if share.reader == rank:
                parcel = outcome.parcels[number] = _parcel(share, this.limits.alone)
                if not idle:
                    reader.execute([_into(place) for place in parcel.places])
                    parcel.install()
    except Exception as error:  # noqa: BLE001 - raised once no peer waits
        outcome.failure = error
    return outcome


def _into(place: _Place) -> Read:
    read = place.read
    return Read(read.file, read.offset, read.rows, read.period, read.width, place.memory, read.spec)


def _pass_on(
    this: _Round, parcels: Mapping[int, _Parcel], reader: Reader, group: Group, *, idle: bool
) -> Exception | None:
    sends: list[tuple[int, torch.Tensor]] = []
    receives: list[tuple[int, torch.Tensor]] = []
    arriving: list[_Parcel] = []
    for number, share in enumerate(this.shares):
        if share.reader == group.rank:
            # A failed reader has no parcel for shares that it did not come to.
            parcel = parcels.get(number) or _parcel(share, this.limits.alone)
            others = [member for member in this.members if member != group.rank]
            sends += [(other, message) for other in others for message in parcel.messages]
        else:
            parcel = _parcel(share, this.limits.alone)
            arriving.append(parcel)
            receives += [(share.reader, message) for message in parcel.messages]
    group.swap(sends, receives, "passing on what replicas have read")
    reader.counts.passed += sum(message.numel() for _, message in receives)
    if idle:
        return None
    try:
        for parcel in arriving:
            parcel.install()
    except Exception as error:  # noqa: BLE001 - raised once no peer waits
        return error
    return None
