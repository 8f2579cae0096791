"""Ranks, and bytes that travel between them: what `shardwise.comm.group` is made of.

A collective that breaks (a killed peer, a time-out) raises `PeerError`, which names what was being done and, as far as
can be found out, who is gone. Later ones are refused then, since the ranks are out of step.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist

from shardwise.comm import collectives
from shardwise.comm.lost_ranks import RankProcess, TimeoutBudget, find_lost
from shardwise.comm.messages import PACKET_BYTES, packet, to_bytes, to_tensor, unpacked
from shardwise.comm.waiting import ABSENT_SECONDS, Waiting, meeting
from shardwise.errors import PeerError, RemoteError, ShardwiseError


class Ranks:
    """The ranks that save or load together, and how bytes get from one to another.

    Args:
        process_group: Their process group, or ``None`` for a single process.

    Attributes:
        rank: This process's rank in the group.
        world_size: Number of ranks in the group.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._pg = process_group
        self._owned = False
        self._broken: PeerError | None = None
        self._name = ""
        self._processes: tuple[RankProcess, ...] = ()
        self._report_seconds = 0.0
        self._waiting: Waiting | None = None
        if process_group is None:
            self.rank, self.world_size = 0, 1
            self._device = torch.device("cpu")
            self._global_ranks: tuple[int, ...] = (0,)
        else:
            # Read now: torch no longer knows the ranks once the script has destroyed its groups.
            self._global_ranks = tuple(dist.get_process_group_ranks(process_group))
            self.rank = dist.get_rank(process_group)
            self.world_size = dist.get_world_size(process_group)
            self._device = _collective_device(process_group)
            self._name = str(process_group.group_name)

    @classmethod
    def current(cls) -> Self:
        """The default process group, or a group of this process alone where none is initialised."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.group.WORLD)
        return cls(None)

    @classmethod
    def dedicated(
        cls,
        of: dist.ProcessGroup | None,
        timeout_seconds: float,
        what: str = "a call of the checkpointer",
        absent_seconds: float = ABSENT_SECONDS,
    ) -> Self:
        """Make a CPU (gloo) group of the same ranks, for checkpoints alone. The ranks of ``of`` call, and no others.

        A group of its own keeps checkpoint traffic from mixing with the training's, lets a background thread
        communicate while training does, and has a time-out of its own.

        Args:
            of: Whose ranks; ``None`` for the default group's.
            timeout_seconds: Within how long every rank raises `PeerError` once one is gone or hangs. Collectives wait
                somewhat less, so that there is time left to find out which rank it is.
            what: The call in which the ranks meet, for messages.
            absent_seconds: After how long a warning names the ranks that have not come to a call.

        Raises:
            PeerError: Some rank did not come.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls(None)
        ranks = dist.get_process_group_ranks(of if of is not None else dist.group.WORLD)
        # Every rank of the default group has to take part in making a group, unless local synchronization is chosen.
        few = len(ranks) < dist.get_world_size()
        budget = TimeoutBudget.within(timeout_seconds)
        try:
            with meeting(ranks, ranks.index(dist.get_rank()), what, absent_seconds, timeout_seconds):
                made = dist.new_group(
                    ranks=ranks,
                    backend="gloo",
                    timeout=timedelta(seconds=budget.collective),
                    use_local_synchronization=few,
                )
        except RuntimeError as error:
            raise PeerError(
                f"the ranks lost touch while meeting: {str(error).splitlines()[0]}",
                hint="Look at the other ranks' logs and restart the job; what was published before is untouched.",
            ) from error
        group = cls(made)
        group._owned = True
        group._report_seconds = budget.report
        group._waiting = Waiting(group._name, group.rank, ranks, absent_seconds, timeout_seconds)
        own = RankProcess.own()
        processes = group._gather_bytes(json.dumps([own.host, own.pid]).encode(), "meeting the other ranks")
        group._processes = tuple(RankProcess(*json.loads(process)) for process in processes)
        return group

    def close(self) -> None:
        """Release the process group if this object made it. Safe to call twice."""
        if self._waiting is not None:
            self._waiting.close()
        if self._owned and self._pg is not None:
            self._owned = False
            if dist.is_initialized():
                with contextlib.suppress(ValueError):  # the script has destroyed all groups before
                    dist.destroy_process_group(self._pg)
        self._pg = None

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The process group, for code of others that communicates by itself."""
        return self._pg

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0 of the group."""
        return self.rank == 0

    @property
    def global_rank(self) -> int:
        """This process's rank in the default process group."""
        return self._global_ranks[self.rank]

    def global_ranks(self) -> tuple[int, ...]:
        """The global rank of each member, in group order."""
        return self._global_ranks

    @property
    def is_broken(self) -> bool:
        """Whether an exchange broke, so that every later one is refused."""
        return self._broken is not None

    @contextlib.contextmanager
    def coming(self, what: str) -> Iterator[None]:
        """Around the first exchange of a call: while it lasts long, a warning says who has not come to it.

        Args:
            what: The call, for messages.
        """
        if self._waiting is None or self.world_size == 1:
            yield
            return
        with self._waiting.during(what):
            yield

    @property
    def _alive(self) -> dist.ProcessGroup:
        if self._pg is None:
            raise ValueError("the group was closed")
        return self._pg

    # --- bytes ------------------------------------------------------------------------------------------------------

    def broadcast_bytes(self, data: bytes, source: int, what: str) -> bytes:
        """The bytes of rank ``source`` (in the group), on every rank. All ranks call; others' bytes are ignored."""
        if self.world_size == 1:
            return data
        with self._guard(what):
            own = data if source == self.rank else b""
            size, short = unpacked(self._broadcast_sized(packet(own), PACKET_BYTES, source))
            return short if len(short) == size else to_bytes(self._broadcast_sized(own, size, source))

    def exchange(self, messages: Sequence[bytes], what: str) -> list[bytes]:
        """Send each rank a message of its own. All ranks call.

        Args:
            messages: One for each rank, in rank order, this one included.
            what: What is being done, for messages of errors.

        Returns:
            What each rank sent to this one, in rank order.
        """
        if self.world_size == 1:
            return list(messages)
        with self._guard(what):
            lengths = torch.tensor([len(message) for message in messages], dtype=torch.int64, device=self._device)
            theirs = torch.empty_like(lengths)
            collectives.all_to_all(self._alive, theirs, lengths)
            counts, data = theirs.tolist(), b"".join(messages)
            received = torch.empty(sum(counts), dtype=torch.uint8, device=self._device)
            sent = to_tensor(data, len(data), self._device)
            collectives.all_to_all(self._alive, received, sent, counts, lengths.tolist())
            return [to_bytes(part) for part in torch.split(received, counts)]

    def _gather_bytes(self, data: bytes, what: str) -> list[bytes]:
        with self._guard(what):
            own = to_tensor(packet(data), PACKET_BYTES, self._device)
            packets = [unpacked(theirs) for theirs in self._all_gather(own)]
            counts = [size for size, _ in packets]
            widest = max(counts)
            if all(len(short) == size for size, short in packets):
                return [short for _, short in packets]
            # Padding every rank's bytes to the longest would cost world x longest; a broadcast by each rank that has
            # something costs the sum, and in the usual case (one rank has a message) much less.
            if sum(counts) * 4 < widest * self.world_size:
                return [
                    to_bytes(self._broadcast_sized(data if r == self.rank else b"", n, r)) if n else b""
                    for r, n in enumerate(counts)
                ]
            padded = to_tensor(data, widest, self._device)
            return [to_bytes(theirs[:n]) for theirs, n in zip(self._all_gather(padded), counts, strict=True)]

    def _all_gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        gathered = [torch.empty_like(own) for _ in range(self.world_size)]
        collectives.all_gather(self._alive, gathered, own)
        return gathered

    def _broadcast_sized(self, data: bytes, size: int, source: int) -> torch.Tensor:
        buffer = to_tensor(data, size, self._device)
        collectives.broadcast(self._alive, buffer, source)
        return buffer

    def _largest(self, value: int, what: str, seconds: float | None = None) -> int:
        with self._guard(what):
            own = torch.tensor([value], dtype=torch.int64, device=self._device)
            collectives.all_reduce(self._alive, own, dist.ReduceOp(dist.ReduceOp.MAX), seconds)
            return int(own.item())

    def _integers(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self._device)

    # --- rows -------------------------------------------------------------------------------------------------------

    def swap(
        self, sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]], what: str
    ) -> None:
        """Send tensors to peers and receive tensors from peers, point to point.

        Only the ranks concerned call; both ends list the messages between them in the same order.

        Args:
            sends: ``(rank in the group, contiguous CPU tensor)``.
            receives: ``(rank in the group, contiguous CPU tensor to fill)``.
            what: What is being done, for messages.
        """
        if not sends and not receives:
            return
        with self._guard(what):
            works = [collectives.receive(self._alive, tensor, rank) for rank, tensor in receives]
            works += [collectives.send(self._alive, tensor, rank) for rank, tensor in sends]
            for work in works:
                work.wait()

    @contextlib.contextmanager
    def keeping(self, failure: BaseException | None) -> Iterator[None]:
        """Exchanges of a rank that has failed before: should they break, what it failed with is not forgotten.

        Args:
            failure: What went wrong on this rank, or ``None``.

        Raises:
            PeerError: An exchange broke; with ``failure`` in its text and as its cause.
        """
        try:
            yield
        except PeerError as error:
            # Not what a peer failed with, which every rank raises alike.
            if failure is None or failure is error or error is not self._broken:
                raise
            raise error.after(failure) from failure

    @contextlib.contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        if self._broken is not None:
            raise self._broken
        try:
            yield
        except ShardwiseError:
            raise
        except (RuntimeError, ValueError) as error:
            if self._pg is None:
                raise RemoteError(f"{type(error).__name__}: {error}", rank=self.global_rank) from error
            raise self._break(what, error) from error

    def _break(self, what: str, error: Exception) -> PeerError:
        """Find out who is missing, and refuse every later collective: the ranks are out of step."""
        ranks = self.global_ranks()
        host = ranks.index(0) if 0 in ranks else None
        lost, how = find_lost(self._name, self.rank, self._processes, host, self._report_seconds)
        named = [ranks[number] for number in lost]
        if named:
            who = f"rank {named[0]}" if len(named) == 1 else f"ranks {', '.join(map(str, named))}"
            message = f"{who} {how} while {what}"
        else:
            message = f"the ranks lost touch while {what}: {str(error).splitlines()[0]}"
        self._broken = PeerError(
            message,
            rank=named[0] if named else None,
            hint="Look at that rank's log and restart the job; what was published before is untouched.",
        )
        return self._broken


def _collective_device(process_group: dist.ProcessGroup) -> torch.device:
    """The device on which the group's backend moves bytes."""
    backend = str(dist.get_backend(process_group))
    if "gloo" in backend or "mpi" in backend or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
