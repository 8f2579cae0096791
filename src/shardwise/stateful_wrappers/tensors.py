"""Local tensors as held tensors: reading a DTensor's mesh and placements into the engine's terms."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard, _StridedShard

from shardwise.errors import MisuseError, TensorError
from shardwise.format.dtypes import dtype_code
from shardwise.plan.fragments import HeldTensor, Part, hold
from shardwise.plan.placement import MeshKey, Placement, Replicated, Sharded, Strided
from shardwise.types import TensorSpec


class MeshRegister:
    """Gives each mesh of this rank a key that means the same on every rank: names and shape, and an ordinal."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]], MeshKey] = {}
        self._used: dict[tuple[tuple[str, ...], tuple[int, ...]], int] = {}
        # Listing a mesh's ranks takes longer than all else that a tensor needs, and most tensors share a mesh object,
        # which is kept alive here so that its identity stays its own.
        self._seen: dict[int, tuple[DeviceMesh, MeshKey, tuple[int, ...] | None]] = {}

    def place(self, mesh: DeviceMesh) -> tuple[MeshKey, tuple[int, ...] | None]:
        """The key of ``mesh``, and this rank's coordinate in it; ``None`` where it is not part of it."""
        known = self._seen.get(id(mesh))
        if known is None:
            coordinate = mesh.get_coordinate()
            known = (mesh, self.key(mesh), tuple(coordinate) if coordinate is not None else None)
            self._seen[id(mesh)] = known
        return known[1], known[2]

    def key(self, mesh: DeviceMesh) -> MeshKey:
        """The key of ``mesh``; equal for meshes of the same ranks in the same order."""
        names = tuple(mesh.mesh_dim_names or ("",) * mesh.ndim)
        shape = tuple(mesh.shape)
        ranks = tuple(int(r) for r in mesh.mesh.flatten().tolist())
        key = self._known.get((names, shape, ranks))
        if key is None:
            ordinal = self._used.get((names, shape), 0)
            self._used[(names, shape)] = ordinal + 1
            key = self._known[(names, shape, ranks)] = MeshKey(names, shape, ordinal)
        return key


def _placement(placement: object, name: str) -> Placement:
    match placement:
        case _StridedShard():
            return Strided(placement.dim, int(placement.split_factor))
        case Shard():
            return Sharded(placement.dim)
        case Replicate():
            return Replicated()
        case Partial():
            raise TensorError(
                "a partial tensor is a sum that has not been made yet",
                tensor=name,
                hint="Redistribute it (Replicate or Shard) before saving.",
            )
    raise TensorError(f"placement {placement!r} is not known", tensor=name, hint="Redistribute it before saving.")


def held_tensor(name: str, tensor: torch.Tensor, meshes: MeshRegister) -> HeldTensor:
    """Describe what this rank holds of ``tensor``, as views of its memory.

    Args:
        name: Name in the file.
        tensor: A plain tensor or a DTensor. A meta tensor is described too, but holds nothing that could be written.
        meshes: Keys of the meshes seen so far on this rank.

    Raises:
        TensorError: A partial or unknown placement.
        MisuseError: A sparse or nested tensor, or one of FSDP1's sharded tensors.
    """
    if tensor.layout != torch.strided or tensor.is_nested:
        raise MisuseError(f"layout {tensor.layout} cannot be saved", tensor=name, hint="Make it a dense tensor.")
    spec = TensorSpec(name, tuple(tensor.shape), dtype_code(tensor.dtype, name))
    if not isinstance(tensor, DTensor):
        return hold(spec, Part(tuple(tensor.shape)), (), tensor.detach())
    mesh, coordinate = meshes.place(tensor.device_mesh)
    if coordinate is None:
        raise MisuseError(
            "this rank is not part of the tensor's mesh",
            tensor=name,
            hint="Leave the tensor out of this rank's model.",
        )
    placements = tuple(_placement(p, name) for p in tensor.placements)
    part = Part(tuple(tensor.shape), mesh, placements)
    local = tensor.to_local().detach()
    if sum(region.box.numel for region in part.regions(coordinate)) != local.numel():
        raise TensorError(
            f"this rank's memory of it, {list(local.shape)}, is not what {tensor.placements} of {list(tensor.shape)} "
            f"over {list(tensor.device_mesh.shape)} ranks gives",
            tensor=name,
            hint="Redistribute it to plain shards before saving.",
        )
    return hold(spec, part, coordinate, local)
