"""Other ways to the same files, for comparison."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from bench.measure import Row, tree_bytes
from bench.models import local_tensors, sharded, total_bytes
from bench.ranks import Rank, Settings, run_ranks
from bench.saving import against_raw
from shardwise.geometry import TensorSpec
from shardwise.plan.layout import lay_out


def _torch_writer(rank: Rank) -> list[Row]:
    mesh = init_device_mesh("cpu", (rank.world_size,), mesh_dim_names=("dp",))
    model = sharded(rank.settings.size, mesh, seed=rank.rank)
    specs = [TensorSpec(n, tuple(p.shape), "BF16") for n, p in model.named_parameters()]
    layout = lay_out(specs)
    index = {e.spec.name: number for number, file in enumerate(layout.files, start=1) for e in file.entries}
    on_disk = 0

    def save(path: Path) -> None:
        writer = HuggingFaceStorageWriter(
            path=str(path), fqn_to_index_mapping=index, save_distributed=True, enable_consolidation=True
        )
        dcp.save(model.state_dict(), storage_writer=writer)

    def check(path: Path) -> int:
        nonlocal on_disk
        on_disk = tree_bytes(path)
        return on_disk

    samples = against_raw(rank, local_tensors(model), save, check)
    nbytes = total_bytes(model)
    return [samples.row("torch HuggingFaceStorageWriter", "raw write", None, nbytes, disk_ratio=on_disk / nbytes)]


def torch_writer(settings: Settings) -> list[Row]:
    """torch's own writer of Hugging Face files, shards first and then a merge; split into the same files."""
    return run_ranks(_torch_writer, settings)


def _gather(rank: Rank) -> list[Row]:
    mesh = init_device_mesh("cpu", (rank.world_size,), mesh_dim_names=("dp",))
    model = sharded(rank.settings.size, mesh, seed=rank.rank)

    def save(path: Path) -> None:
        whole = {name: _whole(parameter, rank) for name, parameter in model.named_parameters()}
        if rank.rank == 0:
            path.mkdir()
            save_file(whole, path / "model.safetensors")
            with (path / "model.safetensors").open("rb") as file:
                os.fsync(file.fileno())

    samples = against_raw(rank, local_tensors(model), save, tree_bytes)
    return [samples.row("gather on rank 0, save_file", "raw write", None, total_bytes(model))]


def _whole(parameter: nn.Parameter, rank: Rank):
    data = parameter.detach()
    full = data.full_tensor() if isinstance(data, DTensor) else data
    return full if rank.rank == 0 else full.new_empty(0)


def gather(settings: Settings) -> list[Row]:
    """All of the model in rank 0's memory, then one file."""
    return run_ranks(_gather, settings)
