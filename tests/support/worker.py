"""One rank of the pool: a process that joins a process group, runs what it is sent, leaves, and waits for more.

The forkserver imports this module once, so that a rank has torch and shardwise without importing them again.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import random
import sys
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
from transformers.models.llama import modeling_llama  # noqa: F401 - imported before ranks are forked

import shardwise.checkpointing  # noqa: F401 - likewise
from shardwise.errors import ShardwiseError

#: A collective that waits longer than this has lost a peer; the parent gives up somewhat later.
COLLECTIVE_SECONDS = 60.0

# The collector need not go through what was just imported: that takes time, and in a forked rank a copy of each page.
gc.collect()
gc.freeze()


@dataclass(frozen=True)
class Task:
    """What a rank is to run.

    Attributes:
        world: Number of ranks.
        rank: This one's number.
        store: File through which the ranks meet; new for each task.
        function: A top-level function, found by name in the worker.
        args: Its arguments.
        directory: The test's working directory; the function is run in it, so that a wrong path stays there.
    """

    world: int
    rank: int
    store: Path
    function: Callable[..., object]
    args: tuple[object, ...]
    directory: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a task on one rank: a value, or an error (as a record if it is one of shardwise's)."""

    value: object = None
    failed: bool = False
    record: dict[str, str | int | None] | None = None
    trace: str = ""

    @property
    def error(self) -> ShardwiseError:
        """The error as it was raised, if it was one of shardwise's."""
        assert self.failed, f"the rank did not fail; it returned {self.value!r}"
        assert self.record is not None, f"not an error of shardwise's:\n{self.trace}"
        return ShardwiseError.from_record(self.record)


def serve(connection: Connection) -> None:
    """Run tasks until the parent goes away."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    faulthandler.enable(sys.stderr)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(_run(task))


def _run(task: Task) -> Outcome:
    # One that hangs says where before the parent kills it.
    faulthandler.dump_traceback_later(COLLECTIVE_SECONDS + 20, exit=False)
    try:
        os.chdir(task.directory)
        store = dist.FileStore(str(task.store), task.world)
        dist.init_process_group(
            "gloo", store=store, rank=task.rank, world_size=task.world, timeout=timedelta(seconds=COLLECTIVE_SECONDS)
        )
        try:
            # A rank that is done before its peers have all connected would close their connections.
            dist.barrier()
            # The same on every rank whatever each has run before, and another in each task: what a test makes a second
            # time must not already have the values that it should restore.
            seed = zlib.crc32(bytes(task.store))
            torch.manual_seed(seed)
            numpy.random.seed(seed)
            random.seed(seed)
            return Outcome(task.function(*task.args))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    except ShardwiseError as error:
        return Outcome(failed=True, record=error.to_record(), trace=traceback.format_exc())
    except BaseException:  # noqa: BLE001 - reported to the parent, whatever it is
        return Outcome(failed=True, trace=traceback.format_exc())
    finally:
        faulthandler.cancel_dump_traceback_later()
