"""What wraps a module over several ranks, beyond the ways that every other row is spread in."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from tests.zoo.rows import Right, Row
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, StateDictType, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel


def net() -> nn.Sequential:
    # Sizes that two ranks do not share evenly.
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 5))


def fsdp1(kind: StateDictType | None, keeps: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = FullyShardedDataParallel(net(), use_orig_params=keeps, device_id=torch.device("cpu"))
            if kind is not None:
                FullyShardedDataParallel.set_state_dict_type(module, kind)
        return module

    return build


def sharded(module: nn.Module, **settings: object) -> nn.Module:
    for part in module.children():
        fully_shard(part, **settings)
    return fully_shard(module, **settings)


def by_columns() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 4, bias=False), nn.Linear(4, 6))
    return fully_shard(module, shard_placement_fn=lambda p: Shard(p.ndim - 1 if p.shape[-1] % 2 == 0 else 0))


def ignoring() -> nn.Module:
    module = net()
    return fully_shard(module, ignored_params={module[0].weight})


def tensor_parallel(inside: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        parallelize_module(module, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if inside:
            module = nn.Sequential(nn.BatchNorm1d(4), module)
        return module

    return build


def by_hand() -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    module = net()
    module[0].weight = nn.Parameter(distribute_tensor(module[0].weight.detach(), mesh, [Shard(1)]))
    return module


def ddp(module: nn.Module) -> nn.Module:
    return DistributedDataParallel(module)


def averaged_sharded() -> nn.Module:
    return sharded(AveragedModel(net()))


ROWS: dict[str, Callable[[], nn.Module]] = {
    "FSDP2: unevenly, unit by unit": lambda: sharded(net()),
    "FSDP2: not resharded after forward": lambda: sharded(net(), reshard_after_forward=False),
    "FSDP2: mixed precision": lambda: sharded(net(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
    "FSDP2: by columns": by_columns,
    "FSDP2: ignored parameters": ignoring,
    "FSDP2, compiled": lambda: torch.compile(sharded(net())),  # type: ignore[arg-type, return-value]
    "FSDP2, activation checkpointing": lambda: sharded(nn.Sequential(*map(checkpoint_wrapper, net()))),
    "FSDP2, AveragedModel": averaged_sharded,
    "tensor parallel": tensor_parallel(False),
    "tensor parallel beside replicas": tensor_parallel(True),
    "a DTensor placed by hand": by_hand,
    "DDP": lambda: ddp(net()),
    "DDP, compiled": lambda: torch.compile(ddp(net())),  # type: ignore[arg-type, return-value]
    "DDP of a compiled model": lambda: ddp(torch.compile(net())),  # type: ignore[arg-type]
    "AveragedModel of DDP": lambda: AveragedModel(ddp(net())),
}


def rows() -> list[Row]:
    """All rows; they need a process group."""
    found = [Row(name, build, change=False, group=True, spreads=("",)) for name, build in ROWS.items()]
    for title, kind in (
        ("", None),
        (", full", StateDictType.FULL_STATE_DICT),
        (", sharded", StateDictType.SHARDED_STATE_DICT),
        (", local", StateDictType.LOCAL_STATE_DICT),
    ):
        for keeps in (True, False):
            name = f"FSDP1{title}{', original parameters' if keeps else ''}"
            build = fsdp1(kind, keeps)
            found.append(Row(name, build, Right.EITHER, change=False, group=True, spreads=("",)))
    return found
