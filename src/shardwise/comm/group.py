"""A group of ranks that fails together.

Every collective of the library goes through `Group`. Two rules keep ranks from waiting for one another for ever:

* local work between collectives runs inside ``with group.together("what")``, which catches what goes wrong, tells every
  rank, and raises the same typed error on all of them;
* a collective that breaks (a killed peer, a time-out) raises `PeerError`, which names what was being done.

Values travel as JSON or as raw tensor bytes, never as pickles.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from shardwise.comm.lost import Patience, Seat, find_lost
from shardwise.comm.messages import PACKET_BYTES, packet, to_bytes, to_tensor, unpacked
from shardwise.errors import PeerError, RemoteError, ShardwiseError
from shardwise.format.strict_json import JsonValue

_LOG = logging.getLogger(__name__)

#: Status of a rank whose work failed; greater than that of one that only has a flag to raise.
_FAILED = 2

#: Up to so many integers of all ranks together are gathered rather than reduced.
_FEW = 2**14

#: What stands before a value that was made; of one that was not, nothing is told in the first exchange.
_MADE = b"="


@dataclass(slots=True)
class Vote:
    """A question that travels with the status of `Group.together`.

    Attributes:
        flag: This rank's answer, set inside.
        any: Whether any rank's is true; known afterwards.
    """

    flag: bool = False
    any: bool = False


class Group:
    """The ranks that save or load together.

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
        self._seats: tuple[Seat, ...] = ()
        self._report_seconds = 0.0
        if process_group is None:
            self.rank, self.world_size = 0, 1
            self._device = torch.device("cpu")
        else:
            self.rank = dist.get_rank(process_group)
            self.world_size = dist.get_world_size(process_group)
            self._device = _collective_device(process_group)
            self._name = str(process_group.group_name)

    @classmethod
    def current(cls) -> Group:
        """The default process group, or a group of this process alone where none is initialised."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.group.WORLD)
        return cls(None)

    @classmethod
    def dedicated(cls, of: dist.ProcessGroup | None, timeout_seconds: float) -> Group:
        """Make a CPU (gloo) group of the same ranks, for checkpoints alone. The ranks of ``of`` call, and no others.

        A group of its own keeps checkpoint traffic from mixing with the training's, lets a background thread
        communicate while training does, and has a time-out of its own.

        Args:
            of: Whose ranks; ``None`` for the default group's.
            timeout_seconds: Within how long every rank raises `PeerError` once one is gone or hangs. Collectives wait
                somewhat less, so that there is time left to find out which rank it is.

        Raises:
            PeerError: Some rank did not come.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls(None)
        ranks = dist.get_process_group_ranks(of if of is not None else dist.group.WORLD)
        # torch wants every rank of the default group to take part in making a group, unless told that only members do.
        few = len(ranks) < dist.get_world_size()
        patience = Patience.within(timeout_seconds)
        try:
            made = dist.new_group(
                ranks=ranks,
                backend="gloo",
                timeout=timedelta(seconds=patience.collective),
                use_local_synchronization=few,
            )
        except RuntimeError as error:
            raise PeerError(
                f"the ranks lost touch while meeting: {str(error).splitlines()[0]}",
                hint="Look at the other ranks' logs and restart the job; what was published before is untouched.",
            ) from error
        group = cls(made)
        group._owned = True
        group._report_seconds = patience.report
        own = Seat.own()
        seats = cast(list[tuple[str, int]], group.gather_json([own.host, own.pid], "meeting the other ranks"))
        group._seats = tuple(Seat(host, pid) for host, pid in seats)
        return group

    def close(self) -> None:
        """Release the process group if this object made it. Safe to call twice."""
        if self._owned and self._pg is not None:
            self._owned = False
            if dist.is_initialized():
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

    # --- status -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[Vote]:
        """Run local work that succeeds on every rank or fails on every rank. All ranks call.

        The body must not contain a collective. Whatever it raises on any rank is raised on all of them, as the same
        typed error, naming the rank where it happened (the lowest, if several failed).

        Args:
            what: What is being done, for messages: "writing model-00001-of-00002.safetensors".

        Yields:
            Something else to ask in the same exchange.
        """
        failure: BaseException | None = None
        vote = Vote()
        try:
            yield vote
        except Exception as error:  # noqa: BLE001 - raised on every rank by agree()
            failure = error
        vote.any = self.agree(failure, what, vote.flag)

    def agree(self, failure: BaseException | None, what: str, flag: bool = False) -> bool:
        """Exchange status; raise on every rank if any rank passes a failure. All ranks call.

        Args:
            failure: What went wrong on this rank, or ``None``.
            what: What was being done, for messages.
            flag: Something else to ask in the same exchange.

        Returns:
            Whether any rank passed a true ``flag``.

        Raises:
            ShardwiseError: The failure of the lowest rank that has one.
        """
        own = self._wrapped(failure)
        if self.world_size == 1:
            self._raise_alone(own, failure)
            return flag
        # Nearly always nobody has anything to say, which one number tells.
        most = self._largest(_FAILED if own is not None else int(flag), what)
        if most != _FAILED:
            return bool(most)
        self._raise_first(own, failure, what)
        raise AssertionError("a rank reported a failure and sent none")

    def _raise_first(self, own: ShardwiseError | None, failure: BaseException | None, what: str) -> None:
        """Raise the failure of the lowest rank that has one; all ranks call where any has."""
        text = b"" if own is None else json.dumps(own.to_record()).encode()
        for index, theirs in enumerate(self._gather_bytes(text, what)):
            if not theirs:
                continue
            if index == self.rank:
                self._raise_alone(own, failure)
            if own is not None and text != theirs:
                _LOG.error("rank %d also failed while %s: %s", self.global_rank, what, own)
            raise ShardwiseError.from_record(json.loads(theirs))

    def _wrapped(self, failure: BaseException | None) -> ShardwiseError | None:
        return None if failure is None else ShardwiseError.wrap(failure, rank=self.global_rank)

    @staticmethod
    def _raise_alone(own: ShardwiseError | None, failure: BaseException | None) -> None:
        if own is not None:
            raise own from (failure if failure is not own else None)

    @staticmethod
    def _attempt(make: Callable[[], JsonValue], is_told: bool) -> tuple[JsonValue, bytes, Exception | None]:
        """What ``make`` gives, as it is and as it is told; nothing is told of a failure."""
        try:
            value = make()
            return value, _MADE + json.dumps(value).encode() if is_told else _MADE, None
        except Exception as error:  # noqa: BLE001 - raised on every rank
            return None, b"", error

    @property
    def global_rank(self) -> int:
        """This process's rank in the default process group."""
        if self._pg is None or not dist.is_initialized():
            return 0
        return dist.get_rank()

    def global_ranks(self) -> tuple[int, ...]:
        """The global rank of each member, in group order."""
        return (0,) if self._pg is None else tuple(dist.get_process_group_ranks(self._pg))

    # --- values -----------------------------------------------------------------------------------------------------

    def gather_json(self, value: JsonValue, what: str = "gathering") -> list[JsonValue]:
        """Every rank's value, in rank order, on every rank. All ranks call."""
        if self.world_size == 1:
            return [value]
        return [json.loads(text) for text in self._gather_bytes(json.dumps(value).encode(), what)]

    def gather(self, make: Callable[[], JsonValue], what: str) -> list[JsonValue]:
        """What ``make`` gives on every rank, in rank order, on every rank, in one exchange. All ranks call.

        Raises:
            ShardwiseError: What it failed with on the lowest rank where it did, on every rank. ``make`` is local.
        """
        value, text, failure = self._attempt(make, is_told=True)
        own = self._wrapped(failure)
        if self.world_size == 1:
            self._raise_alone(own, failure)
            return [value]
        texts = self._gather_bytes(text, what)
        if not all(texts):
            self._raise_first(own, failure, what)
        return [json.loads(theirs[len(_MADE) :]) for theirs in texts]

    def collect(self, make: Callable[[], JsonValue], what: str) -> list[JsonValue]:
        """As `gather`, but rank 0 alone gets the values; other ranks get an empty list. All ranks call.

        For what every rank has much of and only rank 0 needs: `gather` costs as much again on every rank.
        """
        # Rank 0 need not tell itself more than that it succeeded.
        value, text, failure = self._attempt(make, is_told=not self.is_main)
        own = self._wrapped(failure)
        if self.world_size == 1:
            self._raise_alone(own, failure)
            return [value]
        with self._guard(what):
            first = to_tensor(packet(text), PACKET_BYTES, self._device)
            packets = [unpacked(theirs) for theirs in self._all_gather(first)]
        if not all(size for size, _ in packets):
            self._raise_first(own, failure, what)
        with self._guard(what):
            if not self.is_main:
                if packets[self.rank][0] > len(packets[self.rank][1]):
                    dist.send(to_tensor(text, len(text), self._device), group=self._pg, group_dst=0)
                return []
            found = [value]
            for rank, (size, short) in enumerate(packets[1:], start=1):  # one at a time: memory for one rank's text
                if size > len(short):
                    buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
                    dist.recv(buffer, group=self._pg, group_src=rank)
                    short = to_bytes(buffer)
                found.append(json.loads(short[len(_MADE) :]))
            return found

    def collect_json(self, value: JsonValue, what: str = "collecting") -> list[JsonValue]:
        """Every rank's value, in rank order, on rank 0 alone; other ranks get an empty list. All ranks call."""
        return self.collect(lambda: value, what)

    def broadcast_json(self, value: JsonValue, source: int = 0, what: str = "broadcasting") -> JsonValue:
        """The value of rank ``source`` (in the group), on every rank. All ranks call; others' values are ignored."""
        if self.world_size == 1:
            return value
        return cast(JsonValue, json.loads(self.broadcast_bytes(json.dumps(value).encode(), source, what)))

    def tell(self, make: Callable[[], JsonValue], what: str) -> JsonValue:
        """What ``make`` gives on rank 0, on every rank, in one exchange. All ranks call; ``make`` is local.

        Raises:
            ShardwiseError: What it failed with, on every rank.
        """
        failure: Exception | None = None
        own: ShardwiseError | None = None
        text = b""
        if self.is_main:
            try:
                text = json.dumps([make(), None]).encode()
            except Exception as error:  # noqa: BLE001 - raised on every rank
                failure, own = error, ShardwiseError.wrap(error, rank=self.global_rank)
                text = json.dumps([None, own.to_record()]).encode()
        value, record = json.loads(self.broadcast_bytes(text, 0, what))
        if own is not None:
            raise own from (failure if failure is not own else None)
        if record is not None:
            raise ShardwiseError.from_record(record)
        return cast(JsonValue, value)

    def any(self, flag: bool, what: str = "agreeing") -> bool:
        """Whether any rank passes true. All ranks call."""
        if self.world_size == 1:
            return flag
        return bool(self._largest(int(flag), what))

    def _largest(self, value: int, what: str) -> int:
        with self._guard(what):
            own = torch.tensor([value], dtype=torch.int64, device=self._device)
            dist.all_reduce(own, op=dist.ReduceOp.MAX, group=self._pg)
            return int(own.item())

    def barrier(self, what: str = "waiting for every rank") -> None:
        """Return when every rank has called."""
        self.any(False, what)

    def fold(
        self, xors: Sequence[int], sums: Sequence[int], what: str, failure: BaseException | None = None
    ) -> tuple[list[int], list[int]]:
        """Combine two lists of integers over the ranks, element by element: one by exclusive or, one by sum.

        All ranks call, with lists of the same lengths. Its cost is that of the lists, whatever the number of ranks.

        Args:
            xors: Combined by exclusive or.
            sums: Added up.
            what: What is being done, for messages.
            failure: What went wrong on this rank before; like `agree`, it is raised on every rank.

        Raises:
            ShardwiseError: The failure of the lowest rank that has one.
        """
        own = self._wrapped(failure)
        if self.world_size == 1:
            self._raise_alone(own, failure)
            return list(xors), list(sums)
        counts = [*sums, int(own is not None)]
        if (len(xors) + len(counts)) * self.world_size <= _FEW:  # in one exchange what else takes two
            with self._guard(what):
                rows = torch.stack(self._all_gather(self._integers([*xors, *counts]))).cpu()
            *added, failed = rows[:, len(xors) :].sum(0).tolist()
            bits = rows[:, : len(xors)]
        else:
            with self._guard(what):
                total = self._integers(counts)
                dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self._pg)
                *added, failed = total.tolist()
            bits = torch.empty(0, 0, dtype=torch.int64)
        if failed:
            self._raise_first(own, failure, what)
        if len(bits) or not xors:
            return _exclusive_or(bits) if xors else [], added
        with self._guard(what):
            mine = self._integers(xors)
            if self._device.type != "cpu":  # NCCL has no exclusive or
                return _exclusive_or(torch.stack(self._all_gather(mine)).cpu()), added
            dist.all_reduce(mine, op=dist.ReduceOp.BXOR, group=self._pg)
            return mine.tolist(), added

    def _integers(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self._device)

    # --- bytes ------------------------------------------------------------------------------------------------------

    def broadcast_bytes(self, data: bytes, source: int, what: str) -> bytes:
        """The bytes of rank ``source`` (in the group), on every rank. All ranks call; others' bytes are ignored."""
        if self.world_size == 1:
            return data
        with self._guard(what):
            own = data if source == self.rank else b""
            size, short = unpacked(self._broadcast_sized(packet(own), PACKET_BYTES, source))
            return short if len(short) == size else to_bytes(self._broadcast_sized(own, size, source))

    def deal(self, messages: Sequence[bytes], what: str) -> list[bytes]:
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
            dist.all_to_all_single(theirs, lengths, group=self._pg)
            counts, data = theirs.tolist(), b"".join(messages)
            received = torch.empty(sum(counts), dtype=torch.uint8, device=self._device)
            sent = to_tensor(data, len(data), self._device)
            dist.all_to_all_single(received, sent, counts, lengths.tolist(), group=self._pg)
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
        dist.all_gather(gathered, own, group=self._pg)
        return gathered

    def _broadcast_sized(self, data: bytes, size: int, source: int) -> torch.Tensor:
        buffer = to_tensor(data, size, self._device)
        dist.broadcast(buffer, group=self._pg, group_src=source)
        return buffer

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
            works = [dist.irecv(tensor, group=self._pg, group_src=rank) for rank, tensor in receives]
            works += [dist.isend(tensor, group=self._pg, group_dst=rank) for rank, tensor in sends]
            for work in works:
                if work is not None:
                    work.wait()

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
        lost, how = find_lost(self._name, self.rank, self._seats, host, self._report_seconds)
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


def _exclusive_or(rows: torch.Tensor) -> list[int]:
    for row in rows[1:]:
        rows[0] ^= row
    return cast(list[int], rows[0].tolist())


def _collective_device(process_group: dist.ProcessGroup) -> torch.device:
    """The device on which the group's backend moves bytes."""
    backend = str(dist.get_backend(process_group))
    if "gloo" in backend or "mpi" in backend or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
