"""Local tensors as held tensors: reading a DTensor's mesh and placements into the engine's terms."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial, Replicate, Shard

from shardwise.dtypes import dtype_code
from shardwise.errors import MisuseError, TensorError
from shardwise.geometry import Box, TensorSpec
from shardwise.plan.fragments import Fragment, HeldPart, HeldTensor, Part, hold
from shardwise.plan.placement import MeshKey, Placement, Replicated, Sharded, Strided
from shardwise.stateful_wrappers.memory import plain_memory
from shardwise.upstream.torch_tensors import StridedShard, global_shape, local_part, mesh_of, placements_of


@dataclass(frozen=True, slots=True)
class Spread:
    """How tensors of one shape and one spread lie on this rank."""

    part: Part  #: Their spread over the mesh.
    coordinate: tuple[int, ...]  #: This rank's mesh coordinate; ``()`` for plain tensors.
    numel: int  #: Elements that this rank holds of each.
    #: The one region that this rank holds of each, which its local tensor is; ``None`` where it is not so simple.
    box: Box | None

    @staticmethod
    def of(part: Part, coordinate: tuple[int, ...]) -> Spread:
        """The spread of tensors that are ``part`` on the rank at ``coordinate``."""
        boxes = [region.box for region in part.regions(coordinate)]
        return Spread(part, coordinate, sum(box.numel for box in boxes), boxes[0] if len(boxes) == 1 else None)


class MeshRegister:
    """Gives each mesh of this rank a key that means the same on every rank: names and shape, and an ordinal.

    Args:
        differing: Names of the tensors whose replicas may have different values (`Part.may_differ`).
    """

    def __init__(self, differing: Container[str] = frozenset()) -> None:
        self._differing = differing
        self._known: dict[tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]], MeshKey] = {}
        self._used: dict[tuple[tuple[str, ...], tuple[int, ...]], int] = {}
        # Listing a mesh's ranks takes longer than the rest of a tensor's description, and most tensors share a mesh
        # object, which is kept alive here so that its id stays unique.
        self._seen: dict[int, tuple[DeviceMesh, MeshKey, Sequence[int] | None]] = {}
        self._spreads: dict[tuple[object, ...], Spread] = {}

    def spread(self, name: str, tensor: torch.Tensor) -> Spread:
        """How ``tensor`` is spread; the same object for all tensors of its shape and spread."""
        if not isinstance(tensor, DTensor):
            alike = (tensor.shape, name in self._differing)
            plain = self._spreads.get(alike)
            if plain is None:
                plain = self._spreads[alike] = Spread.of(Part(tuple(alike[0]), may_differ=alike[1]), ())
            return plain
        mesh, placements, shape = mesh_of(tensor), placements_of(tensor), global_shape(tensor)
        # The types belong to the key: to torch a strided shard may equal a plain one of the same dimension.
        may_differ = name in self._differing
        key = (id(mesh), shape, placements, may_differ, *map(type, placements))
        known = self._spreads.get(key)
        if known is None:
            if id(mesh) not in self._seen:
                self._seen[id(mesh)] = (mesh, self.key(mesh), mesh.get_coordinate())
            _, mesh_key, coordinate = self._seen[id(mesh)]
            if coordinate is None:
                raise MisuseError(
                    "this rank is not part of the tensor's mesh",
                    tensor=name,
                    hint="Leave the tensor out of this rank's model.",
                )
            kinds = tuple(_placement(p, name) for p in placements)
            part = Part(tuple(shape), mesh_key, kinds, may_differ=may_differ)
            known = self._spreads[key] = Spread.of(part, tuple(coordinate))
        return known

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
        case StridedShard():
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
    """Describe what this rank holds of ``tensor``, as views of its memory, under its ``name`` in the file.

    A meta tensor is described too, but holds nothing that could be written. What cannot be saved (partial, of an
    unknown placement or class, sparse, nested, without a shape yet) is an error.
    """
    local = plain_memory(name, local_part(tensor))
    spread = meshes.spread(name, tensor)
    spec = TensorSpec(name, spread.part.native_shape, dtype_code(local.dtype, name))
    box = spread.box
    if box is not None and box.sizes == local.shape:
        held = HeldPart(spread.part, spread.coordinate, (Fragment(box, local),))
        return HeldTensor(spec, spec.shape, (held,))
    if spread.numel != local.numel():
        assert isinstance(tensor, DTensor)
        raise TensorError(
            f"this rank's memory of it, {list(local.shape)}, is not what {tensor.placements} of {list(tensor.shape)} "
            f"over {list(tensor.device_mesh.shape)} ranks gives",
            tensor=name,
            hint="Redistribute it to plain shards before saving.",
        )
    return hold(spec, spread.part, spread.coordinate, local)


def held_tensors(named: Iterable[tuple[str, torch.Tensor]], meshes: MeshRegister) -> list[HeldTensor]:
    """As `held_tensor`, for pairs of a name and a tensor."""
    return [held_tensor(name, tensor, meshes) for name, tensor in named]
