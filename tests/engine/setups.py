"""One small model with everything that is awkward to checkpoint, spread over ranks in every usual way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tests.support.simulate import raw
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.stateful_wrappers import ModelState, OptimizerState

#: Full tensors as (dtype, shape, digest of the bytes).
Digest = tuple[str, tuple[int, ...], str]
Digests = dict[str, Digest]


class Net(nn.Module):
    """Tied embeddings, prime sizes, a bfloat16 layer, tiny and unused parameters, buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(53, 24)
        self.up = nn.Linear(24, 48)
        self.down = nn.Linear(48, 24)
        self.low = nn.Linear(24, 24, dtype=torch.bfloat16)
        self.norm = nn.LayerNorm(24)
        self.odd = nn.Linear(24, 13)
        self.pair = nn.Parameter(torch.ones(2))
        self.unused = nn.Linear(12, 3)
        self.head = nn.Linear(24, 53, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("ratio", torch.tensor(0.1, dtype=torch.float64))
        self.register_buffer("mask", torch.rand(11) > 0.5)
        self.register_buffer("packed", torch.randn(6, 5).to(torch.float8_e4m3fn))
        self.register_buffer("table", torch.randint(-100, 100, (3, 4), dtype=torch.int8))
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.relu(self.up(x)))
        x = x + self.low(x.to(torch.bfloat16)).float()
        x = self.norm(x) * self.pair.sum()
        return self.head(x).logsumexp(-1).mean() + self.odd(x).square().mean()


Spreader = Callable[[Net], nn.Module]


def _mesh(*shape: int, names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _fsdp(net: Net, mesh: DeviceMesh, dim: int = 0) -> nn.Module:
    def where(param: nn.Parameter) -> Shard | None:
        # FSDP2 cuts other dimensions than the first evenly only.
        even = param.dim() > 1 and param.shape[1] % mesh.size() == 0
        return Shard(1) if dim == 1 and even else None

    for part in (net.low, net.up, net.down):
        fully_shard(part, mesh=mesh, shard_placement_fn=where)
    fully_shard(net, mesh=mesh, shard_placement_fn=where)
    return net


def _tp(net: Net, mesh: DeviceMesh) -> nn.Module:
    parallelize_module(net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return net


def _split(world: int) -> tuple[int, int]:
    return (world // 2, 2) if world % 2 == 0 else (world, 1)


def fsdp(net: Net) -> nn.Module:
    """FSDP2, Shard(0)."""
    return _fsdp(net, _mesh(dist.get_world_size(), names=("dp",)))


def fsdp_columns(net: Net) -> nn.Module:
    """FSDP2, Shard(1) where that is even."""
    return _fsdp(net, _mesh(dist.get_world_size(), names=("dp",)), dim=1)


def hsdp(net: Net) -> nn.Module:
    """FSDP2 within groups of ranks that are replicas of each other."""
    shard, replicate = _split(dist.get_world_size())
    return _fsdp(net, _mesh(replicate, shard, names=("replicate", "shard")))


def ddp(net: Net) -> nn.Module:
    """DistributedDataParallel, which cannot broadcast 8-bit floats itself."""
    return nn.parallel.DistributedDataParallel(
        net, find_unused_parameters=True, init_sync=False, broadcast_buffers=False
    )


def plain(net: Net) -> nn.Module:
    """Every rank has everything and tells nobody."""
    return net


def tensor_parallel(net: Net) -> nn.Module:
    """Column and row parallel linear layers."""
    return _tp(net, _mesh(dist.get_world_size(), names=("tp",)))


def fsdp_over_tp(net: Net) -> nn.Module:
    """FSDP2 over tensor parallelism, which gives strided shards."""
    mesh = _mesh(*_split(dist.get_world_size()), names=("dp", "tp"))
    return _fsdp(_tp(net, mesh["tp"]), mesh["dp"])  # type: ignore[arg-type]


SETUPS: tuple[Spreader, ...] = (fsdp, fsdp_columns, hsdp, ddp, plain, tensor_parallel, fsdp_over_tp)


@dataclass
class Run:
    """A model in training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    def step(self) -> float:
        """Train on the same batch on every rank."""
        ids = torch.arange(20).view(2, 10) * 3 % 53
        loss = self.model(ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return float(loss)

    def digests(self) -> Digests:
        """Every tensor of model and optimizer, whole. All ranks call."""
        tensors = ModelState(self.model).state_dict()
        tensors |= OptimizerState(self.optimizer, self.model).state_dict()
        return {name: digest(tensor) for name, tensor in tensors.items()}

    def options(self) -> list[tuple[float, float]]:
        """What tells the parameter groups apart, and the scheduler's position."""
        groups = self.optimizer.param_groups
        return [(g["lr"], g["weight_decay"]) for g in groups] + [(float(self.scheduler.last_epoch), 0.0)]


def digest(tensor: torch.Tensor) -> Digest:
    """What identifies a tensor; all ranks of a DTensor's mesh call."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return str(whole.dtype), tuple(whole.shape), hashlib.sha256(raw(whole)).hexdigest()[:16]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with two groups."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 3e-3}]
    return torch.optim.AdamW(groups, lr=1e-2)


def build(spread: Spreader, seed: int, optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw) -> Run:
    """A fresh model with the weights of ``seed``, spread."""
    torch.manual_seed(seed)
    model = spread(Net())
    made = optimizer(model)
    return Run(model, made, torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step)))


def checkpointer(directory: Path, **settings: object) -> Checkpointer:
    """The engine for a directory; the ranks are all of the world."""
    config = CheckpointingConfig(checkpoint_dir=directory, **settings)  # type: ignore[arg-type]
    return config.build()
