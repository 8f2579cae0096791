"""Loading: the bytes saved on some ranks read into another sharding, and base models into meta-device models."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bench.measure import Row, Samples, barrier, measure
from bench.models import llama_like, local_tensors, shard, sharded, total_bytes
from bench.ranks import Rank, Settings, run_ranks
from bench.raw import raw_read, raw_write
from shardwise import Checkpointer, CheckpointingConfig


@dataclass(frozen=True)
class Saved:
    """How a checkpoint to load is made: the mode, the number of ranks, and the dimension that they shard."""

    name: str
    mode: str
    ranks: int
    dim: int


@dataclass(frozen=True)
class Loaded:
    """How it is loaded."""

    row: str
    saved: Saved
    ranks: int
    dim: int
    target: float | None


_EXPORT = Saved("export", "every", 2, 0)
_SHARDS = Saved("shards", "false", 2, 0)
_LOADS = (
    Loaded("load, export of 2 on 1", _EXPORT, 1, 0, 1.3),
    Loaded("load, export on 2, rows", _EXPORT, 2, 0, 1.3),
    Loaded("load, export on 2, columns", _EXPORT, 2, 1, 1.3),
    Loaded("load, shards of 2 on 1", _SHARDS, 1, 0, 1.3),
    Loaded("load, shards by rows on 2 by columns", _SHARDS, 2, 1, 1.3),
)


def _mesh(rank: Rank) -> DeviceMesh:
    return init_device_mesh("cpu", (rank.world_size,), mesh_dim_names=("dp",))


def _checkpointer(rank: Rank, mode: str = "every") -> Checkpointer:
    return Checkpointer(CheckpointingConfig(checkpoint_dir=rank.directory, save_consolidated=mode), rank.rank, 0, 0)


def checksum(model: nn.Module) -> int:
    """A sum over all elements of the whole model, as integers. All ranks call."""
    own = sum(int(t.view(torch.int16).sum(dtype=torch.int64)) for t in local_tensors(model))
    total = torch.tensor([own])
    dist.all_reduce(total)
    return int(total.item())


def _make(rank: Rank, saved: Saved) -> list[Row]:
    model = sharded(rank.settings.size, _mesh(rank), seed=rank.rank, dim=saved.dim)
    with _checkpointer(rank, saved.mode) as checkpointer:
        checkpointer.save_model(model, rank.directory / saved.name)
    total = checksum(model)
    if rank.rank == 0:
        (rank.directory / f"{saved.name}.sum").write_text(str(total))
    return []


def against_raw(rank: Rank, tensors: list[torch.Tensor], load: Callable[[], object]) -> Samples:
    """Take turns at a raw parallel read into warm memory and ``load``."""
    raw = rank.directory / f"raw{rank.rank}"
    raw_write(tensors, raw)
    samples = Samples()
    for turn in range(rank.settings.repeats + 1):
        reference = measure(lambda: raw_read(tensors, raw))
        sample = measure(load)
        if turn:
            samples.measured.append(sample)
            samples.reference.append(reference)
        else:
            samples.first = sample
    raw.unlink()
    return samples


def _load(rank: Rank, how: Loaded) -> list[Row]:
    model = sharded(rank.settings.size, _mesh(rank), seed=17, dim=how.dim)
    path = rank.directory / how.saved.name / "model"
    with _checkpointer(rank) as checkpointer:
        samples = against_raw(rank, local_tensors(model), lambda: checkpointer.load_model(model, path))
    if checksum(model) != int((rank.directory / f"{how.saved.name}.sum").read_text()):
        raise RuntimeError(f"{how.row}: what was loaded differs from what was saved")
    return [samples.row(how.row, "raw read", how.target, total_bytes(model))]


def resharding(settings: Settings) -> list[Row]:
    """``load_model`` into another sharding than the one that was saved."""
    rows: list[Row] = []
    for saved in (_EXPORT, _SHARDS):
        run_ranks(partial(_make, saved=saved), settings, saved.ranks)
        for how in _LOADS:
            if how.saved is saved:
                rows += run_ranks(partial(_load, how=how), settings, how.ranks)
        shutil.rmtree(settings.directory / saved.name)
    return rows


def _base(rank: Rank, path: Path) -> list[Row]:
    mesh = _mesh(rank)
    warm = sharded(rank.settings.size, mesh)
    tensors = [torch.empty_like(t).zero_() for t in local_tensors(warm)]
    del warm
    raw = rank.directory / f"raw{rank.rank}"
    raw_write(tensors, raw)
    fresh, warm_ratios = Samples(), []
    nbytes, model = 0, nn.Module()
    with _checkpointer(rank) as checkpointer:
        for turn in range(rank.settings.repeats + 1):
            model = nn.Module()  # lets go of the last one's memory
            model = shard(llama_like(rank.settings.size), mesh)
            nbytes = total_bytes(model)
            barrier()
            warm_reference = measure(lambda: raw_read(tensors, raw))
            reference = measure(lambda: raw_read([torch.empty_like(t) for t in tensors], raw))
            sample = measure(partial(checkpointer.load_base_model, model, "cpu", None, str(path)))
            if turn:
                fresh.measured.append(sample)
                fresh.reference.append(reference)
                warm_ratios.append(sample.seconds / warm_reference.seconds)
            else:
                fresh.first = sample
    if checksum(model) != int((rank.directory / "export.sum").read_text()):
        raise RuntimeError("the base model that was loaded differs from the file's")
    row = fresh.row("base model", "raw read, fresh pages", 1.3, nbytes)
    own = nbytes / rank.world_size / 2**20
    assert row.peak_mib is not None
    row.peak_mib = max(0.0, row.peak_mib - own)
    median = statistics.median(warm_ratios)
    row.note = f"peak is beyond the model's own {own:.0f} MiB; {median:.2f} to a read into memory in use already"
    return [row]


def base_model(settings: Settings) -> list[Row]:
    """``load_base_model`` into a meta-device model on 2 ranks."""
    run_ranks(partial(_make, saved=_EXPORT), settings, 2)
    return run_ranks(partial(_base, path=settings.directory / "export" / "model" / "consolidated"), settings)
