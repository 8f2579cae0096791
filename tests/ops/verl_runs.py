"""Saves by verl's own ``FSDPCheckpointManager``, on gloo, in processes of their own."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from tests.integrations.runs import announce
from tests.ops.llamas import llama
from tests.ops.trainer_runs import copy_what_is_gathered, gathered

WORLD = 2


def rank(run: tuple[Path, int], number: int, port: int) -> None:
    """Train a step of FSDP of a version, and save ``global_step_3/actor`` and, gathered by torch, ``whole.pt``."""
    directory, version = run
    announce(number, WORLD, port)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

    dist.init_process_group("gloo")
    copy_what_is_gathered()
    model: torch.nn.Module = llama(6)
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("fsdp",))
    if version == 2:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = FullyShardedDataParallel(
            model, device_mesh=mesh, device_id=torch.device("cpu"), use_orig_params=True, sync_module_states=False
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    tokens = torch.arange(16).view(2, 8)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    scheduler.step()
    manager = FSDPCheckpointManager(model, optimizer, scheduler)
    manager.save_checkpoint(str(directory / "global_step_3" / "actor"), global_step=3)
    whole = gathered(model)
    if number == 0:
        torch.save(whole, directory / "whole.pt")
    dist.barrier()
    dist.destroy_process_group()
