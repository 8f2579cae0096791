"""Models that are bags of tensors, each spread over the ranks in its own way, with random bits for values."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from tests.support.simulate import Spread, local_tensor, raw, values
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from shardwise.geometry import TensorSpec
from shardwise.plan.placement import Placement, Replicated, Sharded, Strided


def _torch(placement: Placement) -> TorchPlacement:
    match placement:
        case Replicated():
            return Replicate()
        case Sharded(dim):
            return Shard(dim)
        case Strided(dim, factor):
            return _StridedShard(dim, split_factor=factor)


#: Every dtype; uneven and empty shards; columns that are short runs and many of them; packed weights.
LINE = (
    Spread(TensorSpec("wide", (70, 1000), "F32"), (Sharded(1),)),
    Spread(TensorSpec("deep", (9, 11, 40), "BF16"), (Sharded(2),)),
    Spread(TensorSpec("narrow", (100, 2), "BF16"), (Sharded(1),)),
    Spread(TensorSpec("tiny", (2, 5), "F8_E4M3"), (Sharded(0),)),
    Spread(TensorSpec("fused", (24, 7), "F32"), (Strided(0, 3),)),
    Spread(TensorSpec("fused_columns", (80, 26), "F16"), (Strided(1, 2),)),
    Spread(TensorSpec("ints", (13,), "I64"), (Sharded(0),)),
    Spread(TensorSpec("flags", (17, 3), "BOOL"), (Sharded(0),)),
    Spread(TensorSpec("scalar", (), "F64"), (Replicated(),)),
    Spread(TensorSpec("small", (5,), "F8_E5M2"), (Replicated(),)),
    Spread(TensorSpec("bytes", (3, 3, 3), "U8"), None),
    Spread(TensorSpec("signed", (31,), "I8"), (Sharded(0),)),
    Spread(TensorSpec("complex", (7, 2), "C64"), (Sharded(0),)),
    Spread(TensorSpec("nothing", (0, 4), "F32"), (Sharded(0),)),
    Spread(TensorSpec("large", (3000, 700), "BF16"), None),
)
#: The same tensors on a mesh of two dimensions.
_GRID_PLACEMENTS = {
    "wide": (Replicated(), Sharded(1)),
    "deep": (Sharded(0), Sharded(2)),
    "narrow": (Sharded(1), Sharded(1)),
    "tiny": (Sharded(0), Sharded(0)),
    "fused": (Strided(0, 2), Sharded(0)),
    "fused_columns": (Sharded(0), Strided(1, 2)),
    "ints": (Strided(0, 2), Sharded(0)),
    "flags": (Replicated(), Replicated()),
    "scalar": (Replicated(), Replicated()),
    "small": (Sharded(0), Replicated()),
    "signed": (Sharded(0), Sharded(0)),
    "complex": (Sharded(1), Sharded(0)),
    "nothing": (Sharded(1), Sharded(0)),
    "large": (Sharded(0), Sharded(1)),
}
GRID = tuple(Spread(spread.spec, _GRID_PLACEMENTS.get(spread.spec.name)) for spread in LINE)


def mesh_of(spreads: tuple[Spread, ...]) -> DeviceMesh:
    """All ranks in a line, or in two rows."""
    world = dist.get_world_size()
    line = max((len(s.placements) for s in spreads if s.placements), default=1) == 1
    return init_device_mesh("cpu", (world,) if line else (2, world // 2))


#: Made once: millions of random bits take longer than everything that is done with them.
_values = functools.cache(values)


class Bag(nn.Module):
    """The tensors as parameters (floats) and buffers (the rest)."""

    def __init__(self, spreads: tuple[Spread, ...], *, filled: bool) -> None:
        super().__init__()
        self.spreads = spreads
        self.mesh = mesh_of(spreads)
        for number, spread in enumerate(spreads):
            tensor: torch.Tensor = self.local(number)
            if not filled:
                tensor = torch.zeros_like(tensor)
            if spread.placements is not None:
                whole = torch.empty(spread.spec.shape, device="meta")
                tensor = DTensor.from_local(
                    tensor,
                    self.mesh,
                    [_torch(p) for p in spread.placements],
                    run_check=False,
                    shape=whole.shape,
                    stride=whole.stride(),
                )
            if tensor.is_floating_point() and number % 2:
                self.register_parameter(spread.spec.name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(spread.spec.name, tensor)

    def local(self, number: int) -> torch.Tensor:
        """What this rank should have of a tensor."""
        spread = self.spreads[number]
        whole = _values(spread.spec, number)
        if spread.placements is None:
            return whole.clone()
        coordinate = self.mesh.get_coordinate()
        assert coordinate is not None
        return local_tensor(whole, tuple(self.mesh.shape), spread.placements, tuple(coordinate))

    def wrong(self) -> list[str]:
        """Names of the tensors that differ from what they should be, in any bit."""
        out = []
        for number, spread in enumerate(self.spreads):
            have = getattr(self, spread.spec.name)
            local = have.to_local() if isinstance(have, DTensor) else have
            if raw(local.data) != raw(self.local(number)):
                out.append(spread.spec.name)
        return out


def spreads_for(world: int) -> list[tuple[Spread, ...]]:
    """The ways of spreading the tensors over a number of ranks."""
    return [LINE, GRID] if world == 4 else [LINE]
