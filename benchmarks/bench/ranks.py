"""Running a benchmark on several processes."""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.measure import Row


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    Attributes:
        directory: Where files go; memory-backed for figures that mean something.
        size: Gigabytes of the model.
        repeats: Repeats of each measurement.
    """

    directory: Path
    size: float
    repeats: int


@dataclass(frozen=True)
class Rank:
    """One process of a benchmark."""

    rank: int
    world_size: int
    settings: Settings

    @property
    def directory(self) -> Path:
        """Where this benchmark's files go."""
        return self.settings.directory


Case = Callable[[Rank], list[Row]]


def run_ranks(case: Case, settings: Settings, world_size: int = 2) -> list[Row]:
    """Run ``case`` on fresh processes with a gloo group and one thread each; returns what rank 0 returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = settings.directory / "rows"
    mp.spawn(_rank, args=(case, settings, world_size, port, result), nprocs=world_size)
    rows: list[Row] = pickle.loads(result.read_bytes())  # noqa: S301 - written by our own child a moment ago
    result.unlink()
    return rows


def _rank(rank: int, case: Case, settings: Settings, world_size: int, port: int, result: Path) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    torch.set_num_threads(1)
    logging.getLogger("shardwise").setLevel(logging.WARNING)  # the table is what is to be seen
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        rows = case(Rank(rank, world_size, settings))
        if rank == 0:
            result.write_bytes(pickle.dumps(rows))
        dist.barrier()
    finally:
        dist.destroy_process_group()
