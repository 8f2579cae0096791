"""Saving: consolidated and sharded, and what digests cost."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from bench.measure import Row, Samples, barrier, measure, tree_bytes
from bench.models import llama_like, local_tensors, sharded, total_bytes
from bench.ranks import Rank, Settings, run_ranks
from bench.raw import raw_write
from shardwise import Checkpointer, CheckpointingConfig
from shardwise.comm import Group
from shardwise.disk.storage import LocalStorage
from shardwise.engine import export
from shardwise.engine.agreement import Agreement
from shardwise.engine.export import ExportOptions, plan_export, write_export
from shardwise.engine.replicas import comparison, look_at
from shardwise.format.header import arrange, encode_header
from shardwise.geometry import TensorSpec
from shardwise.stateful_wrappers import ModelState


def removed(rank: Rank, path: Path) -> None:
    """Remove a tree outside of any measurement."""
    dist.barrier()
    if rank.rank == 0:
        shutil.rmtree(path, ignore_errors=True)
    dist.barrier()


def against_raw(
    rank: Rank, tensors: list[torch.Tensor], save: Callable[[Path], object], check: Callable[[Path], int]
) -> Samples:
    """Take turns at a raw parallel write of this rank's part and ``save`` of the whole, each into fresh files.

    One unmeasured turn comes first; its memory counts.
    """
    samples = Samples()
    raw, target = rank.directory / "raw", rank.directory / "target"
    own_bytes = sum(tensor.nbytes for tensor in tensors)
    for turn in range(rank.settings.repeats + 1):
        if rank.rank == 0:
            raw.mkdir()
        barrier()
        reference = measure(lambda: raw_write(tensors, raw / f"rank{rank.rank}"), own_bytes)
        removed(rank, raw)
        sample = measure(lambda: save(target), own_bytes)
        if turn:
            samples.measured.append(sample)
            samples.reference.append(reference)
        else:
            samples.first = sample
            check(target)
        removed(rank, target)
    return samples


def _saves(rank: Rank, name: str, config: CheckpointingConfig, size: float, target: float | None) -> Row:
    mesh = init_device_mesh("cpu", (rank.world_size,), mesh_dim_names=("dp",))
    model = sharded(size, mesh, seed=rank.rank)
    nbytes, on_disk, files = total_bytes(model), 0, 0

    def check(path: Path) -> int:
        nonlocal on_disk, files
        on_disk = tree_bytes(path / "model")
        files = len(list((path / "model").rglob("*.safetensors")))
        return on_disk

    with Checkpointer(config, rank.rank, 0, 0) as checkpointer:
        samples = against_raw(rank, local_tensors(model), lambda path: checkpointer.save_model(model, path), check)
    return samples.row(
        name, "raw write", target, nbytes, disk_ratio=on_disk / nbytes, note=f"{files} files; peak includes the first"
    )


def _consolidated(rank: Rank) -> list[Row]:
    config = CheckpointingConfig(checkpoint_dir=rank.directory, save_consolidated="every")
    size = rank.settings.size
    rows = [_saves(rank, f"consolidated, {size:g} GB", config, size, 1.25)]
    rows.append(_saves(rank, f"consolidated, {size / 3:.2g} GB", config, size / 3, 1.25))
    return rows


def consolidated(settings: Settings) -> list[Row]:
    """``save_model`` with ``every`` on 2 ranks."""
    return run_ranks(_consolidated, settings)


def _base(directory: Path, size: float, files: int, rank: Rank) -> Path:
    """A base model directory of ``files`` files without its data: only headers are read of it."""
    base = directory / f"base{files}"
    if rank.rank == 0:
        base.mkdir()
        specs = [TensorSpec(n, tuple(p.shape), "BF16") for n, p in llama_like(size).named_parameters()]
        share = sum(spec.nbytes for spec in specs) / files
        groups: list[list[TensorSpec]] = [[] for _ in range(files)]
        done = 0
        for spec in specs:
            groups[min(files - 1, int(done / share))].append(spec)
            done += spec.nbytes
        for number, group in enumerate(groups, start=1):
            entries = arrange(group)
            head = encode_header(entries, {"format": "pt"})
            name = f"model-{number:05d}-of-{files:05d}.safetensors" if files > 1 else "model.safetensors"
            with (base / name).open("wb") as file:
                file.write(head)
                file.truncate(len(head) + entries[-1].end)
            with safe_open(base / name, "pt"):
                pass
    dist.barrier()
    return base


def _with_base(rank: Rank) -> list[Row]:
    rows = []
    for files, what in ((1, "one file"), (4, "4 files")):
        base = _base(rank.directory, rank.settings.size, files, rank)
        config = CheckpointingConfig(
            checkpoint_dir=rank.directory, save_consolidated="every", model_repo_id=str(base), verify_export=False
        )
        rows.append(_saves(rank, f"consolidated, base of {what}", config, rank.settings.size, None))
    return rows


def with_base(settings: Settings) -> list[Row]:
    """The same with a base model whose split into files is kept: one file is the worst case, an inode for all ranks."""
    return run_ranks(_with_base, settings)


def _sharded(rank: Rank) -> list[Row]:
    config = CheckpointingConfig(checkpoint_dir=rank.directory, save_consolidated="false")
    return [_saves(rank, "sharded", config, rank.settings.size, 1.25)]


def sharded_save(settings: Settings) -> list[Row]:
    """``save_model`` without export: files that no two ranks share."""
    return run_ranks(_sharded, settings)


def _replicated(rank: Rank) -> list[Row]:
    model = sharded(rank.settings.size, None)
    rows = []
    for mode, replicas in itertools.product(("every", "false"), ("compare", "first")):
        config = CheckpointingConfig(checkpoint_dir=rank.directory, save_consolidated=mode, replicas=replicas)
        with Checkpointer(config, rank.rank, 0, 0) as checkpointer:
            samples = against_raw(
                rank, _halves(model, rank), lambda path, engine=checkpointer: engine.save_model(model, path), tree_bytes
            )
        what = "consolidated" if mode == "every" else "sharded"
        rows.append(samples.row(f"replicated, {what}, {replicas}", "raw write", None, total_bytes(model)))
    return [*rows, _comparing(rank, model)]


def _comparing(rank: Rank, model: nn.Module) -> Row:
    """What comparing takes by itself: every rank digests all that it holds."""
    group, held = Group.dedicated(None, 600), ModelState(model).held()
    compared = [comparison(held, Agreement(group).roster(lambda: held, "describing"), group.rank)]
    halves = _halves(model, rank)
    samples = against_raw(rank, halves, lambda _: look_at(compared), lambda _: 0)
    group.close()
    return samples.row("replicated, comparing alone", "raw write", None, total_bytes(model))


def _halves(model: nn.Module, rank: Rank) -> list[torch.Tensor]:
    """This rank's share of what all ranks hold."""
    return [tensor.view(-1).chunk(rank.world_size)[rank.rank] for tensor in local_tensors(model)]


def replicated(settings: Settings) -> list[Row]:
    """``save_model`` of a model that both ranks hold whole, its replicas compared, or not."""
    return run_ranks(_replicated, settings)


def _digests(rank: Rank) -> list[Row]:
    mesh = init_device_mesh("cpu", (rank.world_size,), mesh_dim_names=("dp",))
    model = sharded(rank.settings.size, mesh, seed=rank.rank)
    group, storage = Group.dedicated(None, 600), LocalStorage()
    held = ModelState(model).held()
    roster = Agreement(group).roster(lambda: held, "describing")
    samples, target = Samples(), rank.directory / "target"
    plan = plan_export(held, roster, group, target, ExportOptions())
    own_bytes = plan.schedule.nbytes
    for turn in range(rank.settings.repeats + 1):
        with patch.object(export, "crc32c", _no_digest):
            without = measure(lambda: write_export(plan, group, storage), own_bytes)
        removed(rank, target)
        sample = measure(lambda: write_export(plan, group, storage), own_bytes)
        removed(rank, target)
        if turn:
            samples.measured.append(sample)
            samples.reference.append(without)
    group.close()
    return [samples.row("digests, consolidated", "without digests", 1.15, total_bytes(model))]


def _no_digest(block: memoryview, before: int) -> int:
    return 0


def digests(settings: Settings) -> list[Row]:
    """Writing the files of an export with and without digests."""
    return run_ranks(_digests, settings)
