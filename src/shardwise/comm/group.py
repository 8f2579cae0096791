"""A group of ranks that fails together.

Every collective of the library goes through `Group`. Two rules keep ranks from waiting for one another for ever:

* local work between collectives runs inside ``with group.together("what")``, which catches an exception, sends it to
  every rank, and raises the same typed error on all of them;
* a collective that breaks (a killed peer, a time-out) raises `PeerError`. It names the operation, the lost rank as far
  as it can be found out, and on a rank that had failed before also that failure, as its cause. Later collectives are
  refused, since the ranks are out of step.

Values travel as JSON or as raw tensor bytes, never as pickles.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, Self, TypeVar, cast

import torch
import torch.distributed as dist

from shardwise.comm import collectives
from shardwise.comm.collectives import PACKET_BYTES, packet, to_bytes, to_tensor, unpacked
from shardwise.comm.lost_ranks import ABSENT_SECONDS, RankProcess, Waiting, find_lost, meeting_name, time_budget
from shardwise.errors import PeerError, RemoteError, ShardwiseError
from shardwise.format.strict_json import JsonValue

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
#: The type of a value that travels as JSON, as whoever unpacks it names it: a tuple arrives as a list.
JsonT = TypeVar("JsonT", bound=JsonValue)

#: Status of a rank on which the work failed; 0 and 1 are the flag of a rank on which it succeeded.
_FAILED = 2

#: Up to so many integers of all ranks together are gathered rather than reduced.
_FEW = 2**14


@dataclass(slots=True)
class Vote:
    """This rank's flag, set inside of `Group.together`, and whether any rank's is true, known afterwards."""

    flag: bool = False
    any: bool = False


class FirstFailure:
    """Keeps what failed first on this rank in its ``with`` blocks, so that the rank goes on while its peers wait.

    It is raised where all ranks learn of it. A `PeerError` passes: nobody waits any more.
    """

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception) or isinstance(error, PeerError):
            return False
        self.error = self.error or error
        return True


class Group:
    """The ranks that save or load together: what they agree on, and the values that they exchange.

    ``process_group`` is ``None`` for a single process; ``rank`` and ``world_size`` are those of the group.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        #: For other code that communicates by itself.
        self.process_group = process_group
        self._owned = False
        self._broken: PeerError | None = None
        self._name = ""
        self._processes: tuple[RankProcess, ...] = ()
        self._report_seconds = 0.0
        self._waiting: Waiting | None = None
        if process_group is None:
            self.rank, self.world_size = 0, 1
            self._device = torch.device("cpu")
            #: The global rank of each member, in group order.
            self.global_ranks: tuple[int, ...] = (0,)
        else:
            # Read now: torch no longer knows the ranks once the script has destroyed its groups.
            self.global_ranks = tuple(dist.get_process_group_ranks(process_group))
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
            of: The group with these ranks; ``None`` for the default group.
            timeout_seconds: Every rank raises `PeerError` within this time once a rank is gone or hangs.
            what: The call in which the ranks meet, for messages.
            absent_seconds: A warning names the ranks that have not joined a call after this time.

        Raises:
            PeerError: Some rank did not take part.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls(None)
        ranks = dist.get_process_group_ranks(of if of is not None else dist.group.WORLD)
        # Every rank of the default group has to take part in making a group, unless local synchronization is chosen.
        few = len(ranks) < dist.get_world_size()
        waits, reports = time_budget(timeout_seconds)
        timeout = timedelta(seconds=waits)
        try:
            rank = ranks.index(dist.get_rank())
            with Waiting(meeting_name(ranks), rank, ranks, absent_seconds, timeout_seconds).during(what):
                made = dist.new_group(ranks, timeout, "gloo", use_local_synchronization=few)
        except RuntimeError as error:
            raise PeerError(
                f"not every rank of {len(ranks)} came to {what} within {timeout_seconds:.0f} s, while meeting for the "
                f"first call: {str(error).splitlines()[0]}",
                hint="Make the call on every rank, not only on some (`if rank == 0`); where that is so, look at the "
                "other ranks' logs. What was published before is untouched.",
            ) from error
        group = cls(made)
        group._owned = True
        group._report_seconds = reports
        group._waiting = Waiting(group._name, group.rank, ranks, absent_seconds, timeout_seconds)
        processes = group.gather_json(RankProcess.own(), "meeting the other ranks")
        group._processes = tuple(RankProcess(*cast(tuple[str, int], process)) for process in processes)
        return group

    def close(self) -> None:
        """Release the process group if this object made it. Safe to call twice."""
        if self._owned and self.process_group is not None:
            self._owned = False
            if dist.is_initialized():
                with contextlib.suppress(ValueError):  # the script has destroyed all groups before
                    dist.destroy_process_group(self.process_group)
        self.process_group = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0 of the group."""
        return self.rank == 0

    @property
    def global_rank(self) -> int:
        """This process's rank in the default process group."""
        return self.global_ranks[self.rank]

    @property
    def is_broken(self) -> bool:
        """Whether an exchange broke, so that every later one is refused."""
        return self._broken is not None

    def coming(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Around the first exchange of the call ``what``: a warning names the absent ranks if it takes long."""
        if self._waiting is None or self.world_size == 1:
            return contextlib.nullcontext()
        return self._waiting.during(what)

    @property
    def _alive(self) -> dist.ProcessGroup:
        if self.process_group is None:
            raise ValueError("the group was closed")
        return self.process_group

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
        """Send each rank, this one included, a message of its own. All ranks call.

        Returns what each rank sent to this one, in rank order. ``what`` is being done, for errors, as everywhere here.
        """
        if self.world_size == 1:
            return list(messages)
        with self._guard(what):
            lengths = self._integers([len(message) for message in messages])
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
            own = self._integers([value])
            collectives.all_reduce(self._alive, own, dist.ReduceOp.MAX, seconds)
            return int(own.item())

    def _integers(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    # --- rows -------------------------------------------------------------------------------------------------------

    def swap(
        self, sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]], what: str
    ) -> None:
        """Send contiguous CPU tensors to peers, by their ranks in the group, and receive such from peers.

        Only the ranks concerned call; both ends list the messages between them in the same order.
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
        """Keep ``failure``, this rank's own, if an exchange in the block breaks.

        Raises:
            PeerError: An exchange broke; with ``failure`` in its text and as its cause.
        """
        try:
            yield
        except PeerError as error:
            # A peer's failure is raised alike on every rank.
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
            if self.process_group is None:
                raise RemoteError(f"{type(error).__name__}: {error}", rank=self.global_rank) from error
            raise self._break(what, error) from error

    def _break(self, what: str, error: Exception) -> PeerError:
        """Find out who is missing, and refuse every later collective: the ranks are out of step."""
        ranks = self.global_ranks
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

    # --- status -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self, what: str, seconds: float | None = None) -> Iterator[Vote]:
        """Run local work that succeeds on every rank or fails on every rank. All ranks call.

        The body must not contain a collective. Whatever it raises on any rank is raised on all of them, as the same
        typed error, naming the rank where it happened (the lowest, if several failed). A flag travels in the same
        exchange. A rank that is done waits ``seconds`` for the others; the group's time-out if not given.
        """
        failure: BaseException | None = None
        vote = Vote()
        try:
            yield vote
        except Exception as error:  # noqa: BLE001 - raised on every rank by agree()
            failure = error
        vote.any = self.agree(failure, what, vote.flag, seconds)

    def attempt(self, work: Callable[[], T], what: str) -> T:
        """The result of ``work``, which is local, if it succeeds on every rank; else raise, as `together`."""
        made: list[T] = []
        with self.together(what):
            made.append(work())
        return made[0]

    def agree(self, failure: BaseException | None, what: str, flag: bool = False, seconds: float | None = None) -> bool:
        """Exchange status, and whether any rank passes a true ``flag``, which is returned. All ranks call.

        Raises:
            ShardwiseError: The failure of the lowest rank that passes one.
        """
        if self.world_size == 1:
            self._raise_alone(failure)
            return flag
        # In nearly every call no rank has failed, which one reduced number shows.
        with self.keeping(failure):
            most = self._largest(_FAILED if failure is not None else int(flag), what, seconds)
        if most == _FAILED:
            self._raise_first(failure, what)
        return bool(most)

    def _raise_first(self, failure: BaseException | None, what: str) -> NoReturn:
        """Raise the failure of the lowest rank that has one; all ranks call where any has."""
        own = None if failure is None else self._wrapped(failure)
        with self.keeping(failure):
            everyone = self._gather_bytes(b"" if own is None else json.dumps(own.to_record()).encode(), what)
        rank, theirs = next((rank, theirs) for rank, theirs in enumerate(everyone) if theirs)
        if rank == self.rank:
            self._raise_alone(failure)
        raised = ShardwiseError.from_record(json.loads(theirs))
        if own is not None and own.message != raised.message:
            _LOG.error("rank %d also failed while %s: %s", self.global_rank, what, own)
        raise raised

    def _wrapped(self, failure: BaseException) -> ShardwiseError:
        return ShardwiseError.wrap(failure, rank=self.global_rank)

    def _raise_alone(self, failure: BaseException | None) -> None:
        if failure is not None:
            own = self._wrapped(failure)
            raise own from (failure if failure is not own else None)

    def _attempted(
        self, make: Callable[[], T], encode: Callable[[T], bytes]
    ) -> tuple[list[T], bytes, Exception | None]:
        """The result of ``make`` and its encoding, or the failure."""
        try:
            value = make()
            return [value], encode(value), None
        except Exception as error:  # noqa: BLE001 - raised on every rank
            return [], b"", error

    # --- values -----------------------------------------------------------------------------------------------------

    def gather_json(self, value: JsonT, what: str = "gathering") -> list[JsonT]:
        """Every rank's value, in rank order, on every rank. All ranks call."""
        return self.gather(lambda: value, what)

    def gather(self, make: Callable[[], JsonT], what: str) -> list[JsonT]:
        """The results of ``make`` of all ranks, in rank order, on every rank, in one exchange. All ranks call.

        Raises:
            ShardwiseError: ``make``, which is local, failed: the error of the lowest such rank, on every rank.
        """
        if self.world_size == 1:
            return [self.attempt(make, what)]
        _, text, failure = self._attempted(make, lambda value: json.dumps(value).encode())
        with self.keeping(failure):
            texts = self._gather_bytes(text, what)
        if not all(texts):
            self._raise_first(failure, what)
        return [json.loads(theirs) for theirs in texts]

    def collect(self, make: Callable[[], JsonT], what: str) -> list[JsonT]:
        """As `gather`, but only rank 0 gets the values; other ranks get an empty list. All ranks call.

        For large values that only rank 0 needs: `gather` would cost every rank the memory and time of all of them.
        """
        if self.world_size == 1:
            return [self.attempt(make, what)]
        # Rank 0 receives its own value directly: its message says only that it succeeded.
        made, text, failure = self._attempted(make, lambda value: b"0" if self.is_main else json.dumps(value).encode())
        with self.keeping(failure), self._guard(what):
            first = to_tensor(packet(text), PACKET_BYTES, self._device)
            packets = [unpacked(theirs) for theirs in self._all_gather(first)]
        if not all(size for size, _ in packets):
            self._raise_first(failure, what)
        with self._guard(what):
            if not self.is_main:
                if packets[self.rank][0] > len(packets[self.rank][1]):
                    collectives.send(self._alive, to_tensor(text, len(text), self._device), 0).wait()
                return []
            found = made
            for rank, (size, short) in enumerate(packets[1:], start=1):  # one at a time: memory for one rank's text
                if size > len(short):
                    buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
                    collectives.receive(self._alive, buffer, rank).wait()
                    short = to_bytes(buffer)
                found.append(json.loads(short))
            return found

    def broadcast_result(self, make: Callable[[], JsonT], what: str) -> JsonT:
        """Call ``make`` on rank 0 and broadcast its result, in one exchange. All ranks call; ``make`` is local.

        Raises:
            ShardwiseError: ``make`` failed on rank 0; raised on every rank.
        """
        failure: Exception | None = None
        text = b""
        if self.is_main:
            try:
                text = json.dumps([make(), None]).encode()
            except Exception as error:  # noqa: BLE001 - raised on every rank
                failure, text = error, json.dumps([None, self._wrapped(error).to_record()]).encode()
        with self.keeping(failure):
            value, record = json.loads(self.broadcast_bytes(text, 0, what))
        self._raise_alone(failure)
        if record is not None:
            raise ShardwiseError.from_record(record)
        return cast(JsonT, value)

    def any(self, flag: bool, what: str = "agreeing") -> bool:
        """Whether any rank passes true. All ranks call."""
        return self.agree(None, what, flag)

    def fold(
        self, xors: Sequence[int], sums: Sequence[int], what: str, failure: BaseException | None = None
    ) -> tuple[list[int], list[int]]:
        """Combine two lists of integers over the ranks, element by element: one by exclusive or, one by sum.

        All ranks call, with lists of the same lengths. Its cost is that of the lists, whatever the number of ranks.

        Raises:
            ShardwiseError: The ``failure`` of the lowest rank that passes one, which is what went wrong before.
        """
        if self.world_size == 1:
            self._raise_alone(failure)
            return list(xors), list(sums)
        counts = [*sums, int(failure is not None)]
        at_once = (len(xors) + len(counts)) * self.world_size <= _FEW  # one exchange instead of two
        with self.keeping(failure), self._guard(what):
            if at_once:
                rows = torch.stack(self._all_gather(self._integers([*xors, *counts]))).cpu()
                bits, total = rows[:, : len(xors)], rows[:, len(xors) :].sum(0)
            else:
                total = self._integers(counts)
                collectives.all_reduce(self._alive, total, dist.ReduceOp.SUM)
            *added, failed = total.tolist()  # an accelerator's exchange may break only here
        if failed:
            self._raise_first(failure, what)
        if not xors:
            return [], added
        if not at_once:
            with self._guard(what):
                bits = self._integers(xors)
                if self._device.type == "cpu":
                    collectives.all_reduce(self._alive, bits, dist.ReduceOp.BXOR)
                    return bits.tolist(), added
                bits = torch.stack(self._all_gather(bits)).cpu()  # NCCL has no exclusive or
        return functools.reduce(torch.bitwise_xor, bits).tolist(), added


def _collective_device(process_group: dist.ProcessGroup) -> torch.device:
    """The device on which the group's backend moves bytes."""
    backend = str(dist.get_backend(process_group))
    if "gloo" in backend or "mpi" in backend or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
