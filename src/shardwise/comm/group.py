"""A group of ranks that fails together.

Every collective of the library goes through `Group`. Two rules keep ranks from waiting for one another for ever:

* local work between collectives runs inside ``with group.together("what")``, which catches an exception,
  sends it to every rank, and raises the same typed error on all of them;
* a collective that breaks (a killed peer, a time-out) raises `PeerError`, which names what was being done, and on a
  rank that had failed by itself before also that failure, as its cause.

Values travel as JSON or as raw tensor bytes, never as pickles.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from shardwise.comm import collectives
from shardwise.comm.messages import PACKET_BYTES, packet, to_bytes, to_tensor, unpacked
from shardwise.comm.ranks import Ranks
from shardwise.errors import ShardwiseError
from shardwise.format.strict_json import JsonValue

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

#: Status of a rank whose work failed; greater than that of one that only has a flag to raise.
_FAILED = 2

#: Up to so many integers of all ranks together are gathered rather than reduced.
_FEW = 2**14

#: Prefix of a value that was computed. A rank that failed sends an empty message in the first exchange.
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


class Group(Ranks):
    """The ranks that save or load together: what they agree on, and the values that they exchange."""

    # --- status -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self, what: str, seconds: float | None = None) -> Iterator[Vote]:
        """Run local work that succeeds on every rank or fails on every rank. All ranks call.

        The body must not contain a collective. Whatever it raises on any rank is raised on all of them, as the same
        typed error, naming the rank where it happened (the lowest, if several failed).

        Args:
            what: What is being done, for messages: "writing model-00001-of-00002.safetensors".
            seconds: How long a rank that is done waits for the others; the group's time-out if not given.

        Yields:
            Something else to ask in the same exchange.
        """
        failure: BaseException | None = None
        vote = Vote()
        try:
            yield vote
        except Exception as error:  # noqa: BLE001 - raised on every rank by agree()
            failure = error
        vote.any = self.agree(failure, what, vote.flag, seconds)

    def attempt(self, work: Callable[[], T], what: str) -> T:
        """What ``work`` gives on this rank, if it succeeds on every rank; else raise, as `together`. All ranks call.

        Args:
            work: Local work, without a collective in it.
            what: What is being done, for messages.
        """
        made: list[T] = []
        with self.together(what):
            made.append(work())
        return made[0]

    def agree(self, failure: BaseException | None, what: str, flag: bool = False, seconds: float | None = None) -> bool:
        """Exchange status; raise on every rank if any rank passes a failure. All ranks call.

        Args:
            failure: What went wrong on this rank, or ``None``.
            what: What was being done, for messages.
            flag: Something else to ask in the same exchange.
            seconds: How long to wait for the others; the group's time-out if not given.

        Returns:
            Whether any rank passed a true ``flag``.

        Raises:
            ShardwiseError: The failure of the lowest rank that has one.
        """
        own = self._wrapped(failure)
        if self.world_size == 1:
            self._raise_alone(own, failure)
            return flag
        # In nearly every call no rank has failed, which one reduced number shows.
        with self.keeping(failure):
            most = self._largest(_FAILED if own is not None else int(flag), what, seconds)
        if most != _FAILED:
            return bool(most)
        self._raise_first(own, failure, what)
        raise AssertionError("a rank reported a failure and sent none")

    def _raise_first(self, own: ShardwiseError | None, failure: BaseException | None, what: str) -> None:
        """Raise the failure of the lowest rank that has one; all ranks call where any has."""
        text = b"" if own is None else json.dumps(own.to_record()).encode()
        with self.keeping(failure):
            everyone = self._gather_bytes(text, what)
        for index, theirs in enumerate(everyone):
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
    def _attempt(make: Callable[[], JsonValue], is_sent: bool) -> tuple[JsonValue, bytes, Exception | None]:
        """The result of ``make``, its encoding (empty after a failure), and the failure."""
        try:
            value = make()
            return value, _MADE + json.dumps(value).encode() if is_sent else _MADE, None
        except Exception as error:  # noqa: BLE001 - raised on every rank
            return None, b"", error

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
        value, text, failure = self._attempt(make, is_sent=True)
        own = self._wrapped(failure)
        if self.world_size == 1:
            self._raise_alone(own, failure)
            return [value]
        with self.keeping(failure):
            texts = self._gather_bytes(text, what)
        if not all(texts):
            self._raise_first(own, failure, what)
        return [json.loads(theirs[len(_MADE) :]) for theirs in texts]

    def collect(self, make: Callable[[], JsonValue], what: str) -> list[JsonValue]:
        """As `gather`, but rank 0 alone gets the values; other ranks get an empty list. All ranks call.

        For what every rank has much of and only rank 0 needs: `gather` costs as much again on every rank.
        """
        # Rank 0 receives its own value directly: its message says only that it succeeded.
        value, text, failure = self._attempt(make, is_sent=not self.is_main)
        own = self._wrapped(failure)
        if self.world_size == 1:
            self._raise_alone(own, failure)
            return [value]
        with self.keeping(failure), self._guard(what):
            first = to_tensor(packet(text), PACKET_BYTES, self._device)
            packets = [unpacked(theirs) for theirs in self._all_gather(first)]
        if not all(size for size, _ in packets):
            self._raise_first(own, failure, what)
        with self._guard(what):
            if not self.is_main:
                if packets[self.rank][0] > len(packets[self.rank][1]):
                    collectives.send(self._alive, to_tensor(text, len(text), self._device), 0).wait()
                return []
            found = [value]
            for rank, (size, short) in enumerate(packets[1:], start=1):  # one at a time: memory for one rank's text
                if size > len(short):
                    buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
                    collectives.receive(self._alive, buffer, rank).wait()
                    short = to_bytes(buffer)
                found.append(json.loads(short[len(_MADE) :]))
            return found

    def broadcast_json(self, value: JsonValue, source: int = 0, what: str = "broadcasting") -> JsonValue:
        """The value of rank ``source`` (in the group), on every rank. All ranks call; others' values are ignored."""
        if self.world_size == 1:
            return value
        return cast(JsonValue, json.loads(self.broadcast_bytes(json.dumps(value).encode(), source, what)))

    def broadcast_result(self, make: Callable[[], JsonValue], what: str) -> JsonValue:
        """Call ``make`` on rank 0 and broadcast its result, in one exchange. All ranks call; ``make`` is local.

        Raises:
            ShardwiseError: ``make`` failed on rank 0; raised on every rank.
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
        with self.keeping(failure):
            received = self.broadcast_bytes(text, 0, what)
        value, record = json.loads(received)
        self._raise_alone(own, failure)
        if record is not None:
            raise ShardwiseError.from_record(record)
        return cast(JsonValue, value)

    def any(self, flag: bool, what: str = "agreeing") -> bool:
        """Whether any rank passes true. All ranks call."""
        if self.world_size == 1:
            return flag
        return bool(self._largest(int(flag), what))

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
            with self.keeping(failure), self._guard(what):
                rows = torch.stack(self._all_gather(self._integers([*xors, *counts]))).cpu()
            *added, failed = rows[:, len(xors) :].sum(0).tolist()
            bits = rows[:, : len(xors)]
        else:
            with self.keeping(failure), self._guard(what):
                total = self._integers(counts)
                collectives.all_reduce(self._alive, total, dist.ReduceOp(dist.ReduceOp.SUM))
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
            collectives.all_reduce(self._alive, mine, dist.ReduceOp(dist.ReduceOp.BXOR))
            return mine.tolist(), added


def _exclusive_or(rows: torch.Tensor) -> list[int]:
    for row in rows[1:]:
        rows[0] ^= row
    return cast(list[int], rows[0].tolist())
