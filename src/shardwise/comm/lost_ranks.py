"""Which ranks do not join a call, long before its first exchange times out, and which is gone once one has broken.

A call that one rank never makes (``if rank == 0: checkpointer.save(...)``) leaves the others in its first exchange
until the time-out, half an hour by default. So each waiting rank reports in the job's key-value store, and after
`ABSENT_SECONDS` the lowest waiting rank logs one warning: which ranks have not come, and which calls the others are in.

A broken collective shows a rank only that some connection ended or that the time-out has passed. Two sources identify
the lost rank: on the same machine the process table, at once; on other machines the job's key-value store, where every
rank that noticed the failure reports, so that a rank without a report is missing.

Finding the lost rank takes time too, and a rank has to raise within the time-out that its user configured;
`time_budget` divides that time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from shardwise.disk.processes import process_exists
from shardwise.errors import some
from shardwise.upstream.torch_distributed import default_store

_LOG = logging.getLogger(__name__)

#: A warning names the absent ranks after this many seconds in the first exchange of a call.
ABSENT_SECONDS = 30.0
#: A waiting rank reports after this fraction of that time: shorter waits cost no message.
_REPORTED = 30
_LISTED = 16
#: Seconds between two looks at the process table and the store.
_POLL_SECONDS = 0.1


def time_budget(seconds: float) -> tuple[float, float]:
    """The seconds that a collective may wait for its peers, and that finding out who is missing may take after it.

    A fifth of the time-out, at most 10 s, is for the reports, and a twentieth, at most 2 s, to spare.
    """
    report, spare = min(seconds / 5, 10.0), min(seconds / 20, 2.0)
    return seconds - report - spare, report


class RankProcess(NamedTuple):
    """Where a rank runs: its machine and process."""

    host: str
    pid: int

    @staticmethod
    def own() -> RankProcess:
        """This process's."""
        return RankProcess(socket.gethostname(), os.getpid())

    def is_gone(self) -> bool:
        """Whether the process has ended, as far as this machine can see; false for a process of another machine."""
        if self.host != socket.gethostname():
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return not process_exists(self.pid)
        return state.rpartition(")")[2].split()[0] in ("Z", "X")


def find_lost(
    name: str, rank: int, processes: Sequence[RankProcess], host: int | None, seconds: float
) -> tuple[list[int], str]:
    """Who is missing after a collective of group ``name`` broke on ``rank``.

    Returns when every rank has either reported or died, or when ``seconds`` are over, so that a rank that notices late
    still finds the reports of the others and names the same rank. ``processes`` are those of the ranks, empty if they
    are not known; ``host`` is the rank whose process holds the store, if it is a member. What is returned with the
    ranks is known of them: "died" or "did not answer".
    """
    deadline = time.monotonic() + seconds
    # With the processes in the key, since a restarted job may meet in the store that the last one reported to.
    keys = [
        f"shardwise/broken/{name}/{number}/{process.host}/{process.pid}" for number, process in enumerate(processes)
    ]
    with _Reports(keys, rank) as reports:
        while True:
            left = deadline - time.monotonic()
            refused, silent = reports.refused, reports.silent
            # A rank that has reported may leave: its absence did not break the collective.
            gone = [n for n, process in enumerate(processes) if (silent is None or n in silent) and process.is_gone()]
            all_found = silent is not None and len(gone) == len(silent)
            if left <= 0 or all_found or (refused and gone):
                break
            time.sleep(min(_POLL_SECONDS, left))
        # Give others time to read the reports, perhaps from a store that ends with this process.
        time.sleep(max(0.0, min(2 * _POLL_SECONDS, left)) if len(processes) > 2 else 0.0)
    # The store lives in the first process of the job. With it gone, other ranks had nowhere to report.
    if refused and host is not None and host in gone:
        gone = [host]
    if silent is None:
        silent = () if host is None or host == rank else (host,)
    return (gone, "died") if gone else (list(silent), "did not answer")


class _Reports:
    """Reports in the job's key-value store, followed by a thread: a store whose process has stopped never answers."""

    def __init__(self, keys: Sequence[str], rank: int) -> None:
        #: Ranks that have not reported; ``None`` as long as the store has not answered.
        self.silent: tuple[int, ...] | None = None if keys else ()
        #: Whether the store has failed, and nothing more will come.
        self.refused = False
        self._keys = keys
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, args=(rank,), name="shardwise-lost", daemon=True)

    def __enter__(self) -> Self:
        """Report for this rank, and follow the others' reports from now on."""
        if self._keys:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._keys:
            # A thread in the middle of a call would be torn down with the interpreter; one that never returns may be.
            self._thread.join(_POLL_SECONDS)

    def _follow(self, rank: int) -> None:
        try:
            store = default_store()
            store.set(self._keys[rank], "1")
            silent = tuple(range(len(self._keys)))
            while silent and not self._over.is_set():
                self.silent = silent = tuple(number for number in silent if not store.check([self._keys[number]]))
                self._over.wait(_POLL_SECONDS)
        except (RuntimeError, ValueError):
            self.refused = True


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
            store = default_store().clone()  # type: ignore[attr-defined] # not in torch's stubs
            store.set(self._keys[self._rank], what)
            try:
                if not over.wait(self._seconds - early):
                    others = ((n, key) for n, key in enumerate(self._keys) if n != self._rank)
                    calls = {n: store.get(key).decode(errors="replace") for n, key in others if store.check([key])}
                    self._warn({self._rank: what} | calls)
                    over.wait()
            finally:
                store.delete_key(self._keys[self._rank])

    def _warn(self, here: dict[int, str]) -> None:
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
