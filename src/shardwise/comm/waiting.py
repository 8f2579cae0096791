"""Warning about ranks that do not join a call, long before the collective times out.

A call that one rank never makes (``if rank == 0: checkpointer.save(...)``) leaves the others in its first exchange
until the time-out, half an hour by default. So each waiting rank reports in the job's key-value store, and after
`ABSENT_SECONDS` the lowest waiting rank logs one warning: which ranks have not come, and which calls the others are in.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol, Self, cast

from shardwise.upstream.torch_distributed import default_store

_LOG = logging.getLogger(__name__)

#: A warning names the absent ranks after this many seconds in the first exchange of a call.
ABSENT_SECONDS = 30.0
#: A waiting rank reports after this fraction of that time: shorter waits cost no message.
_REPORTED = 30
_LISTED = 16


class _Store(Protocol):
    """The part of torch's key-value stores that is used here."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def delete_key(self, key: str) -> bool: ...

    def clone(self) -> Self: ...


class Waiting:
    """A thread that warns when this rank has waited ``seconds`` for others. It sleeps unless the rank is waiting.

    ``name`` is the group's, ``rank`` this rank in it, and ``ranks`` are the global ranks of all in order; after
    ``limit`` seconds the wait ends in an error, which the message says.
    """

    def __init__(self, name: str, rank: int, ranks: Sequence[int], seconds: float, limit: float) -> None:
        self._keys = [f"shardwise/waiting/{name}/{number}" for number in range(len(ranks))]
        self._rank, self._ranks = rank, tuple(ranks)
        self._seconds, self._limit = seconds, limit
        self._changed = threading.Condition()
        self._what: str | None = None
        self._turn = 0
        self._closed = False
        self._thread: threading.Thread | None = None
        self._store: _Store | None = None

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Watch over the exchange that begins the call ``what``: ``save(epoch_0_step_1)``."""
        with self._changed:
            self._turn += 1
            self._what = what
            if self._thread is None:
                self._thread = threading.Thread(target=self._follow, name="shardwise-waiting", daemon=True)
                self._thread.start()
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._what = None
                self._changed.notify()

    def close(self) -> None:
        """End the thread. Safe to call twice."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _follow(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._what is not None or self._closed)
                what, turn = self._what, self._turn
            if what is None:
                return
            with contextlib.suppress(RuntimeError, ValueError):  # no store to report to, or its process has ended
                self._watch(what, turn)
            self._over(turn, None)

    def _watch(self, what: str, turn: int) -> None:
        early = self._seconds / _REPORTED
        if self._over(turn, early):
            return
        store = self._opened()
        store.set(self._keys[self._rank], what)
        try:
            if not self._over(turn, self._seconds - early):
                self._warn(store, what)
                self._over(turn, None)
        finally:
            store.delete_key(self._keys[self._rank])

    def _over(self, turn: int, seconds: float | None) -> bool:
        """Wait until the exchange is over; returns whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._what is None or self._turn != turn or self._closed, seconds)

    def _opened(self) -> _Store:
        if self._store is None:
            # A connection of its own: the default store's is taken as long as another thread waits for a key.
            self._store = cast(_Store, default_store()).clone()
        return self._store

    def _warn(self, store: _Store, what: str) -> None:
        here = {self._rank: what}
        for number, key in enumerate(self._keys):
            if number != self._rank and store.check([key]):
                here[number] = store.get(key).decode(errors="replace")
        absent = [number for number in range(len(self._keys)) if number not in here]
        if self._rank != min(here) or not absent:
            return
        doing: dict[str, list[int]] = {}
        for number, call in sorted(here.items()):
            doing.setdefault(call, []).append(number)
        waits = "; ".join(f"{self._named(numbers)} in {call}" for call, numbers in doing.items())
        _LOG.warning(
            "%s %s not come for %.0f s. Waiting: %s. Every rank has to make the call, not only some; an error follows "
            "after %.0f s.",
            self._named(absent),
            "has" if len(absent) == 1 else "have",
            self._seconds,
            waits,
            self._limit,
        )

    def _named(self, numbers: Sequence[int]) -> str:
        ranks = [str(self._ranks[number]) for number in numbers]
        more = f" and {len(ranks) - _LISTED} more" if len(ranks) > _LISTED else ""
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks[:_LISTED])}{more}"


@contextlib.contextmanager
def meeting(ranks: Sequence[int], rank: int, what: str, seconds: float, limit: float) -> Iterator[None]:
    """Watch over the creation of a group, which has no name yet, in the call ``what``; others as in `Waiting`."""
    waiting = Waiting("meeting-" + "-".join(map(str, ranks[:4])) + f"-{len(ranks)}", rank, ranks, seconds, limit)
    try:
        with waiting.during(what):
            yield
    finally:
        waiting.close()
