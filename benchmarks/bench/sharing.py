"""Replicas that read the same, each for itself or each byte once and passed on: here, and from a slow server."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist

from bench.loading import checksum
from bench.measure import Row, Samples, measure
from bench.models import sharded, total_bytes
from bench.ranks import Rank, Settings, run_ranks
from shardwise import Checkpointer, CheckpointingConfig
from shardwise.disk.storage import LocalStorage

#: What the simulated server gives to all of its clients together.
SERVER_BYTES_PER_SECOND = 200 * 2**20


class SlowStorage(LocalStorage):
    """A file server whose bandwidth the ranks share: a read takes as long as all ranks' reads at once would."""

    def read(self, handle: int, into: memoryview, offset: int) -> int:
        _wait(len(into))
        return super().read(handle, into, offset)

    def read_rows(
        self, handle: int, into: memoryview, rows: int, width: int, pitch: int, period: int, offset: int
    ) -> int:
        _wait((rows - 1) * period + width)
        return super().read_rows(handle, into, rows, width, pitch, period, offset)


def _wait(nbytes: int) -> None:
    time.sleep(nbytes * dist.get_world_size() / SERVER_BYTES_PER_SECOND)


@dataclass(frozen=True)
class _How:
    row: str
    ranks: int
    slow: bool


_HOWS = (
    _How("share-reads, 2 replicas, local", 2, False),
    _How("share-reads, 4 replicas, local", 4, False),
    _How("share-reads, 2 replicas, slow server", 2, True),
    _How("share-reads, 4 replicas, slow server", 4, True),
)


def _engine(rank: Rank, mode: str, slow: bool) -> Checkpointer:
    config = CheckpointingConfig(
        checkpoint_dir=rank.directory, save_consolidated="every", share_replica_reads=mode, io_threads=1
    )
    return Checkpointer(config, rank.rank, 0, 0, storage=SlowStorage() if slow else None)


def _make(rank: Rank) -> list[Row]:
    model = sharded(rank.settings.size, None)
    with _engine(rank, "never", slow=False) as checkpointer:
        checkpointer.save_model(model, rank.directory / "saved")
    (rank.directory / "sum").write_text(str(checksum(model)))
    return []


def _load(rank: Rank, how: _How) -> list[Row]:
    model = sharded(rank.settings.size, None, seed=rank.rank + 1)
    path = rank.directory / "saved" / "model"
    samples = Samples()
    with _engine(rank, "never", how.slow) as alone, _engine(rank, "always", how.slow) as shared:
        for turn in range(rank.settings.repeats + 1):
            reference = measure(partial(alone.load_model, model, path))
            sample = measure(partial(shared.load_model, model, path))
            if turn:
                samples.measured.append(sample)
                samples.reference.append(reference)
            else:
                samples.first = sample
    if checksum(model) != int((rank.directory / "sum").read_text()) * rank.world_size:
        raise RuntimeError(f"{how.row}: what was loaded differs from what was saved")
    note = "as by default on a network file system" if how.slow else "default here: each rank reads"
    return [samples.row(how.row, "each rank reads", None, total_bytes(model), note=note)]


def share_reads(settings: Settings) -> list[Row]:
    """``load_model`` of a replicated model with and without passing reads on."""
    run_ranks(_make, settings, 1)
    rows: list[Row] = []
    for how in _HOWS:
        rows += run_ranks(partial(_load, how=how), settings, how.ranks)
    return rows
