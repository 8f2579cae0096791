"""The reads of a load, grouped by the ranks that want the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from shardwise.comm import Group
from shardwise.disk.storage import Storage
from shardwise.engine.agreement import roster_of_kind
from shardwise.engine.read_sharing import Made, Wanted, is_remote, made_of, read_shared, rehearse, spare_memory
from shardwise.plan.fragments import HeldPart, HeldTensor
from shardwise.plan.reads import AnyRead, Read, SourceTensor, plan_reads
from shardwise.plan.sharing import LIMITS, Limits, Replicas
from shardwise.sources.reader import Reader
from shardwise.sources.sources import Source
from shardwise.sources.torch_files import fill_from_file


@dataclass(frozen=True, slots=True)
class Sharing:
    """Whether replicas read the same bytes once: ``always``, ``never``, or ``auto``, from a network file system.

    Pipeline stages do not share tensors.
    """

    mode: str = "never"
    stage: int = 0


NO_SHARING = Sharing()


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
        """Plan what ``tensor`` needs.

        Raises:
            MissingTensorError: ``saved`` does not cover a fragment.
        """
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
        """Check that this rank can plan the rounds, at a point where a failure reaches all ranks. Local."""
        rehearse(self.shared)

    def execute(self, reader: Reader, group: Group, limits: Limits = LIMITS) -> None:
        """Carry out the reads, inside ``group.together``, since replicas pass on what they read.

        Raises:
            ShardwiseError: Reading failed on this rank, and no peer waits for it any more.
        """
        # First, while the ranks are in step: nobody waits for a peer that still reads what is its own.
        if self.shared:
            spare = spare_memory() if self.spare is None else self.spare
            failure = read_shared(self.shared, reader, group, spare, limits)
            if failure is not None:
                raise failure
        reader.execute(self.own)
        for compute in self.computed:
            compute(reader)
        for (file, legacy), tensors in self.opened.items():
            copied = fill_from_file(file, legacy, tensors)
            reader.counts.wanted += copied
            reader.counts.read += copied


def finds_remote(source: Source, group: Group, storage: Storage, sharing: Sharing) -> bool:
    """Whether it matters where the files are, and they are on a network file system as far as this rank sees. Local."""
    if sharing.mode != "auto" or group.world_size == 1:
        return False
    # A cache's files are links into another directory, which may be elsewhere.
    return is_remote(storage, source.files[0] if source.files else source.path)


def find_replicas(held: Sequence[HeldTensor], group: Group, sharing: Sharing, remote: bool) -> Replicas | None:
    """Who wants the same as this rank, ``None`` where every rank reads for itself. All ranks of the group call."""
    if sharing.mode == "never" or group.world_size == 1 or (sharing.mode == "auto" and not remote):
        return None
    roster = roster_of_kind(held, group, sharing.stage)
    return None if roster is None else Replicas(roster, group.rank)
