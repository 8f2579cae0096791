"""A training script that leaves with an asynchronous save pending, in one of the ways that scripts do."""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.disk.storage import Buffer, LocalStorage
from shardwise.errors import StorageError


class Slow(LocalStorage):
    """Is still writing when the script leaves; with ``fails`` it never succeeds."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def write(self, handle: int, data: Buffer, offset: int) -> None:
        time.sleep(0.5)
        if self.fails:
            raise StorageError.from_os(OSError(5, "Input/output error"))
        super().write(handle, data, offset)


def train(root: str, how: str, fails: bool) -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    config = CheckpointingConfig(checkpoint_dir=root, is_async=True, collective_timeout_seconds=40)
    checkpointer = Checkpointer(config, rank, 0, 0, storage=Slow(fails))
    if how in ("fall", "destroy", "lost reference"):
        checkpointer.save(0, 7, model)
        if how == "lost reference":
            del checkpointer
        return
    if how == "destroy before finalize":
        checkpointer.save(0, 7, model)
        dist.destroy_process_group()
        checkpointer.finalize()
        return
    with checkpointer:
        checkpointer.save(0, 7, model)
        if how == "exit":
            sys.exit(0)
        if how == "raise" or (how == "raise on one" and rank == 1):
            raise RuntimeError("training failed")


def main(root: str, how: str, fails: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{root}-store", int(os.environ["WORLD_SIZE"]))
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    try:
        train(root, how, bool(fails))
    finally:
        if how == "destroy" and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
