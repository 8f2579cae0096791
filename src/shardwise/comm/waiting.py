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

from shardwise.errors import some
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
    """Warns when this rank has waited ``seconds`` for others, by a thread for each wait.

    ``name`` is the group's, ``rank`` this rank in it, and ``ranks`` are the global ranks of all in order; after
    ``limit`` seconds the wait ends in an error, which the message says.
    """

    def __init__(self, name: str, rank: int, ranks: Sequence[int], seconds: float, limit: float) -> None:
        self._keys = [f"shardwise/waiting/{name}/{number}" for number in range(len(ranks))]
        self._rank, self._ranks = rank, tuple(ranks)
        self._seconds, self._limit = seconds, limit
        self._watching: threading.Thread | None = None

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Watch over the exchange that begins the call ``what``: ``save(epoch_0_step_1)``."""
        over = threading.Event()
        watching = threading.Thread(
            target=self._watch, args=(what, over, self._watching), name="shardwise-waiting", daemon=True
        )
        # Python starts no thread while it ends, nor does a system that has none left. The peers wait for this rank all
        # the same, which then gives no warning.
        with contextlib.suppress(RuntimeError):
            watching.start()
            self._watching = watching
        try:
            yield
        finally:
            over.set()

    def _watch(self, what: str, over: threading.Event, before: threading.Thread | None) -> None:
        early = self._seconds / _REPORTED
        if over.wait(early):
            return
        if before is not None:
            before.join()  # it takes back what it reported under the same key
        with contextlib.suppress(RuntimeError, ValueError):  # no store to report to, or its process has ended
            # A connection of its own: the default store's is taken as long as another thread waits for a key.
            store = cast(_Store, default_store()).clone()
            store.set(self._keys[self._rank], what)
            try:
                if not over.wait(self._seconds - early):
                    self._warn(store, what)
                    over.wait()
            finally:
                store.delete_key(self._keys[self._rank])

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
        ranks = some([self._ranks[number] for number in numbers], _LISTED)
        return f"rank{'s' if len(numbers) > 1 else ''} {ranks}"


def meeting_name(ranks: Sequence[int]) -> str:
    """What stands for the name of a group that has none yet, since its ranks are about to make it."""
    return f"meeting-{'-'.join(map(str, ranks[:4]))}-{len(ranks)}"
