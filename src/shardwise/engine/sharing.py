"""The reads of a load, grouped by the ranks that want the same bytes: of those one reads and passes on, in rounds.

Ranks that want the same bytes (replicas under DDP or HSDP, norms that tensor parallelism leaves whole) know so from the
roster, and each computes the same rounds by itself: in every round each of some replicas reads a share, consecutive
pieces in file order, and receives the others' shares.

Bytes of ordinary tensors travel as they are in the file, and every rank converts them as if it had read them itself;
what has to be made of several reads, such as dequantized values, travels as it is in memory. While a round is passed
on, the next one is read. Bytes that cannot be received at their destination go through three reused slabs of memory:
one for received bytes, and two in turn for read ones. A rank whose reading fails keeps taking part until
the rounds are over, so that its peers are not left waiting; its failure is then raised where all ranks learn of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch

from shardwise.comm import FirstFailure, Group
from shardwise.disk.storage import IsLocal, Storage, file_system_type
from shardwise.dtypes import torch_dtype
from shardwise.engine.agreement import roster_of_kind
from shardwise.plan.fragments import HeldPart, HeldTensor, Part
from shardwise.plan.reads import AnyRead, PackedRead, Read, SourceTensor, plan_reads
from shardwise.plan.roster import Roster
from shardwise.sources.reader import Reader, cut_read
from shardwise.sources.sources import Source
from shardwise.sources.tensor_bytes import flat_bytes, is_as_stored
from shardwise.sources.torch_files import fill_from_file
from shardwise.timing import phase

T = TypeVar("T")

#: What a round passes on: what a rank receives or sends at a time, whatever the number of replicas.
ROUND_BYTES = 16 * 2**20
#: Largest share that one replica reads in a round; more in one request is no faster.
LARGEST_SHARE = 4 * 2**20
#: Smallest one, however many replicas there are: else a request's latency is all that counts.
SMALLEST_SHARE = 256 * 2**10
#: Smaller pieces of a share travel together, larger ones straight from memory to memory.
ALONE_BYTES = 256 * 2**10
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
    """An optional capability of a `Storage`: whether reading a file goes over a network."""

    def is_remote(self, path: Path) -> bool:
        """Whether the files at ``path``, which exists, are on another machine."""


def is_remote(storage: Storage, path: Path) -> bool:
    """Whether replicas that read at ``path`` ask a network file system for the same bytes."""
    if isinstance(storage, KnowsDistance):
        return storage.is_remote(path)
    if not isinstance(storage, IsLocal):
        return True
    kind = file_system_type(storage.local_path(path))
    return kind in _REMOTE or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE)


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """Memory ``dest``, of one shape and dtype on all replicas, that one of them fills by its own code for all.

    ``fill`` fills memory of that shape and dtype through a reader, as often as it is called.
    """

    dest: torch.Tensor
    fill: Callable[[torch.Tensor, Reader], None]


@dataclass(slots=True, eq=False)
class Wanted:
    """The reads that a set of replicas has in common, in one order on all of them; destinations are each rank's.

    ``made`` gives, for the most bytes of a piece, the pieces of what has to be made, as they are needed.
    """

    reads: list[Read] = field(default_factory=list)
    made: list[Callable[[int], Iterator[Made]]] = field(default_factory=list)


Piece = Read | Made


@dataclass(frozen=True, slots=True)
class Replicas:
    """Which ranks want the same as this one; ``roster`` knows only those that hold tensors of the same kinds."""

    roster: Roster
    rank: int

    def of(self, name: str, part: Part) -> tuple[int, ...]:
        """The ranks that hold the same of ``part`` of a tensor, ascending, this one included."""
        return self.roster.shard_set(name, part).replicas_of(self.rank)


class Share(NamedTuple):
    """The pieces, in file order, that one replica, a rank in the group, reads in one round."""

    reader: int
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return sum(map(nbytes_of, self.pieces))


class _Slab:
    """Memory that is reused round after round, so that a load's memory does not depend on the allocator."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def clear(self, nbytes: int) -> None:
        """Provide ``nbytes`` for a new round; nothing that was taken before is in use any more.

        Of what the round before had, at most a round's is kept; a tensor that is read whole may have needed more.
        """
        self._used = 0
        if not nbytes <= self._memory.numel() <= max(nbytes, ROUND_BYTES):
            # The old one goes first.
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._memory = torch.empty(nbytes, dtype=torch.uint8)

    def take(self, nbytes: int) -> torch.Tensor:
        """The next ``nbytes`` of it."""
        start, self._used = self._used, self._used + _aligned(nbytes)
        return self._memory[start : start + nbytes]


@dataclass(slots=True, eq=False)
class _Parcel:
    """The memory of one share on one rank, and the messages that carry it.

    ``places`` are pieces with the memory of their bytes as they travel: a piece's own destination where possible.
    """

    places: list[tuple[Piece, torch.Tensor]] = field(default_factory=list)
    messages: list[torch.Tensor] = field(default_factory=list)

    def install(self) -> None:
        """Convert the pieces that do not lie at their destination yet."""
        for piece, memory in self.places:
            if memory is not piece.dest:
                dest = piece.dest.detach()
                dest.copy_(memory.view(dest.shape))


class Round(NamedTuple):
    """What some replicas read and pass on at a time."""

    members: tuple[int, ...]
    shares: tuple[Share, ...]

    def shares_of(self, rank: int, *, own: bool) -> dict[int, Share]:
        """What ``rank`` reads of it, or what is passed on to it, by the shares' numbers."""
        return {number: share for number, share in enumerate(self.shares) if (share.reader == rank) == own}


#: This rank's parcels of a round, by the share's number, and its first failure.
_Outcome = tuple[dict[int, _Parcel], Exception | None]


def made_of(read: PackedRead, _: int) -> Iterator[Made]:
    """A serialised tensor has to be loaded whole, whatever its size and whatever is wanted of it."""
    yield Made(read.dest, lambda memory, reader: reader.execute([read._replace(dest=memory)]))


def spare_memory() -> torch.Tensor:
    """Memory for the messages of a rank that has failed, allocated before any peer can be left waiting.

    Enough for a share of single bytes, each at an aligned place. Until a failure it takes address space alone.
    """
    return torch.empty(LARGEST_SHARE * _ALIGNMENT, dtype=torch.uint8)


@phase("exchange")
def read_shared(
    shared: Mapping[tuple[int, ...], Wanted], reader: Reader, group: Group, spare: torch.Tensor
) -> Exception | None:
    """Read what replicas want alike, each byte by one of them. The replicas call, each with the same sets.

    ``shared`` has for each set of replicas that this rank is part of what they have in common; ``spare`` is from
    `spare_memory`. Returns what failed locally first; what is passed on in later rounds is then of no use. Raises
    `PeerError`: a peer left.
    """
    failure: Exception | None = None
    # One order of the sets for all ranks, so that no two of them wait for each other in different sets.
    upcoming = (each for members in sorted(shared) for each in _rounds(members, shared[members]))
    current = next(upcoming, None)
    if current is None:
        return None
    arriving, slabs = _Slab(), itertools.cycle((_Slab(), _Slab()))
    with ThreadPoolExecutor(1, thread_name_prefix="shardwise-ahead") as ahead:
        reading = _begun(ahead, partial(_read, current, next(slabs), reader, group.rank, idle=False))
        while current is not None:
            parcels, refused = reading()
            failure = failure or refused
            following = next(upcoming, None)
            if following is not None:
                # The slab of the round before this one, which has been passed on.
                read = partial(_read, following, next(slabs), reader, group.rank, idle=failure is not None)
                reading = _begun(ahead, read)
            with group.keeping(failure):
                refused = _pass_on(current, parcels, arriving, reader, group, spare, idle=failure is not None)
            failure = failure or refused
            current = following
    return failure


def _begun(ahead: ThreadPoolExecutor, read: Callable[[], _Outcome]) -> Callable[[], _Outcome]:
    """Start to read on another thread, or, where the system has none left, read at once: peers wait for the outcome."""
    try:
        return ahead.submit(read).result
    except RuntimeError:
        outcome = read()
        return lambda: outcome


def largest_share(replicas: int) -> int:
    """How much one of so many replicas reads in a round; also the largest piece."""
    return min(LARGEST_SHARE, max(SMALLEST_SHARE, ROUND_BYTES // replicas))


def _rounds(members: tuple[int, ...], wanted: Wanted) -> Iterator[Round]:
    return rounds(_pieces(wanted, largest_share(len(members))), members)


def rounds(pieces: Iterable[Piece], members: tuple[int, ...]) -> Iterator[Round]:
    """Deal pieces to replicas: neighbours to one, and each new share to the replica that has read the least so far.

    ``pieces`` are in an order common to the replicas. One above `largest_share` is a share of its own, and one above
    `ROUND_BYTES` a round. Every replica gets the same rounds for the same sizes.
    """
    read = dict.fromkeys(members, 0)

    def dealt(pieces: tuple[Piece, ...]) -> Share:
        reader = min(members, key=read.__getitem__)
        share = Share(reader, pieces)
        # A share of no bytes would be dealt to the same replica for ever.
        read[reader] += max(share.nbytes, 1)
        return share

    shares = map(dealt, _groups(pieces, nbytes_of, largest_share(len(members))))
    return (Round(members, found) for found in _groups(shares, lambda share: share.nbytes, ROUND_BYTES))


def _groups(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[tuple[T, ...]]:
    """Neighbours together, as many as have at most ``most`` bytes, at least one."""
    gathered: list[T] = []
    total = 0
    for item in items:
        nbytes = size(item)
        if gathered and total + nbytes > most:
            yield tuple(gathered)
            gathered, total = [], 0
        gathered.append(item)
        total += nbytes
    if gathered:
        yield tuple(gathered)


def _pieces(wanted: Wanted, most: int) -> Iterator[Piece]:
    for read in sorted(wanted.reads, key=lambda read: (read.file, read.offset)):
        yield from cut_read(read, most)
    for made in wanted.made:
        yield from made(most)


def nbytes_of(piece: Piece) -> int:
    """Bytes of a piece as they travel."""
    return piece.rows * piece.width if isinstance(piece, Read) else piece.dest.nbytes


def _memory_of(piece: Piece) -> tuple[torch.dtype, tuple[int, ...]]:
    """Dtype and shape in which a piece travels."""
    if isinstance(piece, Made):
        return piece.dest.dtype, tuple(piece.dest.shape)
    dtype = torch_dtype(piece.spec.dtype)
    return dtype, (piece.rows, piece.width // dtype.itemsize)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _fits(piece: Piece) -> bool:
    """Whether the bytes that travel are those of the destination's memory."""
    dest = piece.dest
    return (
        dest.device.type == "cpu" and dest.dtype == _memory_of(piece)[0] and dest.is_contiguous() and is_as_stored(dest)
    )


def _staged_bytes(share: Share) -> int:
    """Bytes of a slab that a share takes on this rank."""
    staged = (piece for piece in share.pieces if nbytes_of(piece) < ALONE_BYTES or not _fits(piece))
    return sum(_aligned(nbytes_of(piece)) for piece in staged)


def _parcel(share: Share, slab: _Slab) -> _Parcel:
    """Memory for a share; its messages depend on nothing that differs between ranks."""
    parcel = _Parcel()
    small: list[tuple[Piece, int]] = []
    end = 0
    for piece in share.pieces:
        nbytes = nbytes_of(piece)
        if nbytes < ALONE_BYTES:
            small.append((piece, end))
            end += _aligned(nbytes)
            continue
        dtype, shape = _memory_of(piece)
        memory = piece.dest if _fits(piece) else slab.take(nbytes).view(dtype).view(shape)
        parcel.places.append((piece, memory))
        # A serialised tensor is one piece, however large it is.
        flat = flat_bytes(memory)
        parcel.messages += [flat[start : start + LARGEST_SHARE] for start in range(0, nbytes, LARGEST_SHARE)]
    if small:
        packed = slab.take(end)
        for piece, start in small:
            dtype, shape = _memory_of(piece)
            memory = packed[start : start + nbytes_of(piece)].view(dtype)
            parcel.places.append((piece, memory.view(shape)))
        parcel.messages.append(packed)
    return parcel


def _parcels(shares: Mapping[int, Share], slab: _Slab) -> dict[int, _Parcel]:
    """Memory for some shares of one round, by their numbers."""
    slab.clear(sum(_staged_bytes(share) for share in shares.values()))
    return {number: _parcel(share, slab) for number, share in shares.items()}


def _read(this: Round, slab: _Slab, reader: Reader, rank: int, *, idle: bool) -> _Outcome:
    """Read this rank's shares of a round, unless ``idle``; a failure is kept and raised later."""
    parcels: dict[int, _Parcel] = {}
    kept = FirstFailure()
    with kept:
        if not idle:
            parcels = _parcels(this.shares_of(rank, own=True), slab)
        for parcel in parcels.values():
            _fill(parcel, reader)
    return parcels, kept.error


def _fill(parcel: _Parcel, reader: Reader) -> None:
    reads: list[AnyRead] = []
    for piece, memory in parcel.places:
        if isinstance(piece, Made):
            piece.fill(memory.detach(), reader)
        else:
            reads.append(piece._replace(dest=memory.detach()))
    reader.execute(reads)
    parcel.install()


def _pass_on(
    this: Round,
    parcels: Mapping[int, _Parcel],
    slab: _Slab,
    reader: Reader,
    group: Group,
    spare: torch.Tensor,
    *,
    idle: bool,
) -> Exception | None:
    """Send and receive the messages of a round; blank ones if this rank has failed or finds no memory for them."""
    own, theirs = this.shares_of(group.rank, own=True), this.shares_of(group.rank, own=False)
    arriving: dict[int, _Parcel] = {}
    kept = FirstFailure()
    with kept:
        arriving = {} if idle else _parcels(theirs, slab)
    sends_blanks = idle or kept.error is not None

    def messages(number: int, made: Mapping[int, _Parcel]) -> list[torch.Tensor]:
        return _blanks(this.shares[number], spare) if sends_blanks else made[number].messages

    others = [member for member in this.members if member != group.rank]
    sends = [(other, message) for number in own for message in messages(number, parcels) for other in others]
    receives = [(share.reader, message) for number, share in theirs.items() for message in messages(number, arriving)]
    group.swap(sends, receives, "passing on what replicas have read")
    if not sends_blanks:
        reader.counts.passed += sum(message.numel() for _, message in receives)
        with kept:
            for parcel in arriving.values():
                parcel.install()
    return kept.error


def _blanks(share: Share, spare: torch.Tensor) -> list[torch.Tensor]:
    """Messages of the sizes that those of `_parcel` have, all of them in the same memory."""
    counts = [nbytes_of(piece) for piece in share.pieces]
    large = [nbytes for nbytes in counts if nbytes >= ALONE_BYTES]
    sizes = [min(LARGEST_SHARE, n - start) for n in large for start in range(0, n, LARGEST_SHARE)]
    if len(large) < len(counts):
        sizes.append(sum(_aligned(nbytes) for nbytes in counts if nbytes < ALONE_BYTES))
    if max(sizes, default=0) > len(spare):  # very many tiny pieces, each at an aligned place
        spare = torch.empty(max(sizes), dtype=torch.uint8)
    return [spare[:size] for size in sizes]


@dataclass(slots=True)
class PlannedReads:
    """The reads of one rank.

    Attributes:
        own: What it reads by itself.
        shared: The ranks of a set of replicas -> what they want alike.
        computed: What it computes by itself from what it reads.
        opened: A file that `torch.load` has to open, and whether without restrictions -> what is wanted of it.
        made_bytes: Stored bytes behind what is computed, this rank's part.
        spare: See `spare_memory`; made while planning, which all ranks do together.
    """

    own: list[AnyRead] = field(default_factory=list)
    shared: dict[tuple[int, ...], Wanted] = field(default_factory=dict)
    computed: list[Callable[[Reader], None]] = field(default_factory=list)
    opened: dict[tuple[Path, bool], list[HeldTensor]] = field(default_factory=dict)
    made_bytes: int = 0
    spare: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that this rank is about to read, its part of what is shared included."""
        own = sum(r.rows * r.width if isinstance(r, Read) else r.chunk.packed for r in self.own)
        shared = (sum(r.rows * r.width for r in w.reads) // len(members) for members, w in self.shared.items())
        return own + sum(shared) + self.made_bytes

    def _wanted_by(self, members: tuple[int, ...]) -> Wanted:
        if self.spare is None:
            self.spare = spare_memory()
        return self.shared.setdefault(members, Wanted())

    def add(self, saved: SourceTensor, tensor: HeldTensor, replicas: Replicas | None) -> None:
        """Plan what ``tensor`` needs. Raises `MissingTensorError`: ``saved`` does not cover a fragment."""
        if replicas is None:
            self.own += plan_reads(saved, tensor)
            return
        for part in tensor.parts:
            members = replicas.of(tensor.spec.name, part.part)
            one = tensor if len(tensor.parts) == 1 else tensor._replace(parts=(part,))
            if len(members) == 1:
                self.own += plan_reads(saved, one)
                continue
            wanted = self._wanted_by(members)
            for read in plan_reads(saved, one):
                if isinstance(read, Read):
                    wanted.reads.append(read)
                elif read.dest.numel():
                    wanted.made.append(partial(made_of, read))
                    self.made_bytes += read.chunk.packed // len(members)

    def add_made(
        self, tensor: HeldTensor, replicas: Replicas | None, make: Callable[[HeldTensor, int], Iterator[Made]]
    ) -> HeldTensor:
        """Plan what has to be made of ``tensor`` for this rank and its replicas; returns what nobody else holds.

        ``make``, given a part of ``tensor`` and the most bytes of a piece, gives the pieces that fill it.
        """
        alone: list[HeldPart] = []
        for part in tensor.parts:
            members = (0,) if replicas is None else replicas.of(tensor.spec.name, part.part)
            if len(members) == 1:
                alone.append(part)
                continue
            self._wanted_by(members).made.append(partial(make, tensor._replace(parts=(part,))))
            self.made_bytes += sum(f.box.numel for f in part.fragments) // len(members)
        return tensor._replace(parts=tuple(alone))

    def rehearse(self) -> None:
        """Go through the rounds without reading, at a point where a failure still reaches all ranks. Local.

        A rank that cannot compute the sizes of its rounds could not take part in them.
        """
        for members in sorted(self.shared):
            for _ in _rounds(members, self.shared[members]):
                pass

    def execute(self, reader: Reader, group: Group) -> None:
        """Carry out the reads, inside ``group.together``, since replicas pass on what they read.

        Raises `ShardwiseError`: reading failed on this rank, and no peer waits for it any more.
        """
        # First, while the ranks are in step: nobody waits for a peer that still reads what is its own.
        if self.shared:
            spare = spare_memory() if self.spare is None else self.spare
            failure = read_shared(self.shared, reader, group, spare)
            if failure is not None:
                raise failure
        reader.execute(self.own)
        for compute in self.computed:
            compute(reader)
        for (file, legacy), tensors in self.opened.items():
            copied = fill_from_file(file, legacy, tensors)
            reader.counts.wanted += copied
            reader.counts.read += copied


def finds_remote(source: Source, group: Group, storage: Storage, mode: str) -> bool:
    """Whether it matters where the files are, and they are on a network file system as far as this rank sees. Local."""
    if mode != "auto" or group.world_size == 1:
        return False
    # A cache's files are links into another directory, which may be elsewhere.
    return is_remote(storage, source.files[0] if source.files else source.path)


def find_replicas(held: Sequence[HeldTensor], group: Group, mode: str, stage: int, remote: bool) -> Replicas | None:
    """Who wants the same as this rank, ``None`` where every rank reads for itself. All ranks of the group call.

    ``mode`` is ``always``, ``never``, or ``auto``, from a network file system. Pipeline stages do not share tensors.
    """
    if mode == "never" or group.world_size == 1 or (mode == "auto" and not remote):
        return None
    roster = roster_of_kind(held, group, stage)
    return None if roster is None else Replicas(roster, group.rank)
