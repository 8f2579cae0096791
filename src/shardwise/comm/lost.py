"""Finding out which rank is gone, once a collective has broken.

A broken collective tells a rank only that some connection ended or that time is up. Two sources say whose fault it was:
on the same machine the process table, at once; elsewhere the job's key-value store, where every rank that noticed the
failure reports, so that whoever has not reported is missing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

#: How long a rank waits for the reports of others after its own collective broke.
REPORT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a rank runs: its machine and process."""

    host: str
    pid: int

    @staticmethod
    def own() -> Seat:
        """This process's."""
        return Seat(socket.gethostname(), os.getpid())

    def is_gone(self) -> bool:
        """Whether the process has ended, as far as this machine can tell; false for other machines'."""
        if self.host != socket.gethostname():
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return not _exists(self.pid)
        return state.rpartition(")")[2].split()[0] in ("Z", "X")


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def find_lost(name: str, rank: int, seats: Sequence[Seat]) -> tuple[tuple[int, ...], str]:
    """Who is missing after a collective of group ``name`` broke on ``rank``.

    Args:
        name: The group's name, the same on every rank.
        rank: This rank in the group.
        seats: Where each rank of the group runs; may be empty if that is not known.

    Returns:
        Ranks of the group, and what is known of them: "has died" or "did not answer".
    """
    _report(name, rank)
    gone = _gone(seats)
    deadline = time.monotonic() + REPORT_SECONDS
    silent: tuple[int, ...] = ()
    while not gone and time.monotonic() < deadline:
        silent = _silent(name, len(seats))
        if not silent:
            break
        time.sleep(0.1)
        gone = _gone(seats)
    return (gone, "has died") if gone else (silent, "did not answer")


def _gone(seats: Sequence[Seat]) -> tuple[int, ...]:
    return tuple(number for number, seat in enumerate(seats) if seat.is_gone())


def _key(name: str, rank: int) -> str:
    return f"shardwise/broken/{name}/{rank}"


def _report(name: str, rank: int) -> None:
    try:
        dist.distributed_c10d._get_default_store().set(_key(name, rank), "1")
    except (RuntimeError, ValueError):
        # The store lives in another process and may be what is gone; _silent() then says so.
        return


def _silent(name: str, world_size: int) -> tuple[int, ...]:
    try:
        store = dist.distributed_c10d._get_default_store()
        return tuple(number for number in range(world_size) if not store.check([_key(name, number)]))
    except (RuntimeError, ValueError):
        return (0,)
