"""What the machine allows where a load or a save cannot be sequential: bare loops, without the library.

Two operations are further from the raw references than the others. Here each is a loop of system calls, compared with
the same reference as the library's row: what remains between the two figures is the library's part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh

from bench.measure import Row, Samples, barrier, measure
from bench.models import local_tensors, sharded
from bench.ranks import Rank, Settings, run_ranks
from bench.raw import raw_read, raw_write
from bench.saving import removed

#: Rows are read in blocks that stay in the cache of a core.
_BLOCK = 512 * 1024


def _read_columns(tensors: Sequence[torch.Tensor], path: Path, rank: int, ranks: int) -> None:
    """Read each tensor as this rank's columns of a matrix that is ``ranks`` times as wide, one behind the other."""
    handle = os.open(path, os.O_RDONLY)
    buffer = memoryview(bytearray(_BLOCK))
    try:
        offset = 0
        for tensor in tensors:
            target = tensor.reshape(tensor.shape[0], -1).view(torch.uint8).numpy()
            rows, width = target.shape
            period = width * ranks
            step = max(1, _BLOCK // period)
            lines = np.frombuffer(buffer, dtype=np.uint8)[: step * period].reshape(step, period)
            own = lines[:, rank * width : (rank + 1) * width]
            for start in range(0, rows, step):
                some = min(step, rows - start)
                if os.preadv(handle, [buffer[: some * period]], offset + start * period) != some * period:
                    raise RuntimeError(f"{path} is too short")
                target[start : start + some] = own[:some]
            offset += rows * period
    finally:
        os.close(handle)


def _columns(rank: Rank) -> list[Row]:
    mesh = init_device_mesh("cpu", (rank.world_size,), mesh_dim_names=("dp",))
    tensors = [t for t in local_tensors(sharded(rank.settings.size, mesh, seed=rank.rank, dim=1)) if t.ndim == 2]
    raw, shared = rank.directory / f"raw{rank.rank}", rank.directory / "shared"
    raw_write(tensors, raw)
    if rank.rank == 0:
        raw_write(tensors * rank.world_size, shared)
    samples = _in_turns(
        rank,
        lambda: raw_read(tensors, raw),
        lambda: _read_columns(tensors, shared, rank.rank, rank.world_size),
    )
    nbytes = sum(tensor.nbytes for tensor in tensors) * rank.world_size
    return [samples.row("limit: read columns of one file", "raw read", None, nbytes)]


def _write_at(tensors: Sequence[torch.Tensor], path: Path, rank: int, ranks: int) -> None:
    """Write this rank's rows of every tensor into one file that is there, where an export has them."""
    handle = os.open(path, os.O_WRONLY)
    try:
        offset = 0
        for tensor in tensors:
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
            done, place = 0, offset + rank * tensor.nbytes
            while done < len(data):
                done += os.pwrite(handle, data[done:], place + done)
            offset += ranks * tensor.nbytes
        os.fsync(handle)
    finally:
        os.close(handle)


def _one_file(rank: Rank) -> list[Row]:
    mesh = init_device_mesh("cpu", (rank.world_size,), mesh_dim_names=("dp",))
    tensors = local_tensors(sharded(rank.settings.size, mesh, seed=rank.rank))
    own = sum(tensor.nbytes for tensor in tensors)
    raw, target = rank.directory / "raw", rank.directory / "target"

    def clear() -> None:
        for path in (raw, target):
            removed(rank, path)
            if rank.rank == 0:
                path.mkdir()
        if rank.rank == 0:
            with (target / "file").open("wb") as file:
                file.truncate(own * rank.world_size)
        barrier()

    samples = _in_turns(
        rank,
        lambda: raw_write(tensors, raw / f"rank{rank.rank}"),
        lambda: _write_at(tensors, target / "file", rank.rank, rank.world_size),
        clear,
        own,
    )
    return [samples.row("limit: write into one file", "raw write", None, own * rank.world_size)]


def _in_turns(
    rank: Rank,
    reference: Callable[[], object],
    operation: Callable[[], object],
    before: Callable[[], object] = barrier,
    fresh_bytes: int = 0,
) -> Samples:
    samples = Samples()
    for turn in range(rank.settings.repeats + 1):
        before()
        there = measure(reference, fresh_bytes)
        before()
        here = measure(operation, fresh_bytes)
        if turn:
            samples.reference.append(there)
            samples.measured.append(here)
        else:
            samples.first = here
    return samples


def limits(settings: Settings) -> list[Row]:
    """The two bare loops on 2 ranks."""
    return run_ranks(_columns, settings) + run_ranks(_one_file, settings)
