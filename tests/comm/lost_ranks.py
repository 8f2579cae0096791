"""Ranks that lose one of them, as processes of their own: they meet through a store that rank 0 hosts, as jobs do.

`main` prints a line of JSON for each loss: what every other rank saw. The losses happen at the same time, to groups of
their own; nobody outlives the process that calls it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from shardwise.comm import Group
from shardwise.errors import PeerError

WORLD = 3
TIMEOUT_SECONDS = 8.0
#: Long after every survivor should have raised.
LIMIT_SECONDS = 60.0


def vanish(how: str) -> None:
    """End, hang or stop this process."""
    if how == "hang":
        time.sleep(2 * LIMIT_SECONDS)
    os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)


def take_part(rank: int, port: int, how: str, victim: int) -> dict[str, object]:
    """Meet, lose the victim, and return the error that this rank gets."""
    torch.set_num_threads(1)
    waiting = timedelta(seconds=30)
    store = dist.TCPStore("127.0.0.1", port, WORLD, is_master=rank == 0, timeout=waiting, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=waiting)
    group = Group.dedicated(None, TIMEOUT_SECONDS)
    group.any(False, "starting")
    if rank == victim:
        vanish(how)
    if how == "kill-late" and rank == 0:
        # The other survivor has seen the death and left before this rank looks.
        time.sleep(3)
    started = time.monotonic()
    try:
        group.any(False, "saving")
    except PeerError as error:
        return {"message": error.message, "rank": error.rank, "seconds": time.monotonic() - started}
    return {"message": "nothing happened"}


def _be(rank: int, port: int, how: str, victim: int, directory: Path) -> NoReturn:
    try:
        found = take_part(rank, port, how, victim)
        (directory / f"{rank}.part").write_text(json.dumps(found))
        (directory / f"{rank}.part").rename(directory / str(rank))
    except BaseException:  # noqa: BLE001 - shown; the parent misses the file
        traceback.print_exc()
    finally:
        # Not by way of the parent's frames, which tidy up.
        os._exit(0)


class Loss:
    """A group that loses one of its ranks."""

    def __init__(self, how: str, victim: int, directory: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.survivors = [rank for rank in range(WORLD) if rank != victim]
        self.children: dict[int, int] = {}
        self._directory = directory
        for rank in range(WORLD):
            child = os.fork()
            if child == 0:
                _be(rank, port, how, victim, directory)
            self.children[rank] = child

    def reap(self) -> bool:
        """Whether a survivor is still there. A zombie would look as if it were still leaving."""
        for rank in self.survivors:
            if rank in self.children and os.waitpid(self.children[rank], os.WNOHANG)[0]:
                del self.children[rank]
        return any(rank in self.children for rank in self.survivors)

    def end(self) -> list[object]:
        """End whoever is left; return what each survivor saw."""
        for child in self.children.values():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        places = [self._directory / str(rank) for rank in self.survivors]
        return [json.loads(place.read_text()) if place.exists() else None for place in places]


def main(losses: list[str]) -> None:
    """Start the groups and print what the survivors saw."""
    started: list[Loss] = []
    deadline = time.monotonic() + LIMIT_SECONDS
    with tempfile.TemporaryDirectory() as root:
        try:
            for loss in losses:
                how, victim = loss.split(":")
                directory = Path(root, loss)
                directory.mkdir()
                started.append(Loss(how, int(victim), directory))
            while sum(loss.reap() for loss in started) and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:
            found = [loss.end() for loss in started]
        for seen in found:
            print(json.dumps(seen))
