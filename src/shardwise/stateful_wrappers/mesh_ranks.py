"""This rank's data-, tensor- and pipeline-parallel coordinates, read from the meshes of a model's tensors.

Only its name shows what a mesh dimension is for. Those below are the ones that torch's documentation, torchtitan,
accelerate, transformers and NeMo AutoModel give; a dimension of another name says nothing, and nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from shardwise.upstream.torch_tensors import root_mesh

#: What dimensions are for. Ranks along "context" read the same samples, each another part of the sequence. Those of
#: experts ("ep", "efsdp", ...) are as good as unknown: they borrow ranks in a way that their names do not show.
_ROLES = {
    **dict.fromkeys(("dp", "ddp", "fsdp", "hsdp", "data", "data_parallel", "replicate", "shard"), "data"),
    **dict.fromkeys(("dp_replicate", "dp_shard", "dp_shard_mod_ep", "dp_shard_in_ep", "batch"), "data"),
    **dict.fromkeys(("tp", "tensor", "tensor_parallel"), "tensor"),
    **dict.fromkeys(("pp", "pipe", "pipeline", "pipeline_parallel"), "pipeline"),
    **dict.fromkeys(("cp", "sp", "context", "context_parallel"), "context"),
}


@dataclass(frozen=True, slots=True)
class MeshRanks:
    """This rank's coordinates; ``None`` where the meshes do not determine one."""

    dp: int | None = None  #: Index over the data-parallel dimensions, the last one varying fastest.
    tp: int | None = None  #: Coordinate in the tensor-parallel dimension.
    pp: int | None = None  #: Coordinate in the pipeline dimension.
    cp: int | None = None  #: Coordinate in the context-parallel dimension.
    #: Why the data-parallel index cannot be determined, nor whether ranks differ in it; empty where it can be.
    unclear: str = ""


def mesh_ranks(parts: Sequence[nn.Module], tensors: Iterable[torch.Tensor]) -> MeshRanks:
    """Read this rank's coordinates from the meshes of the tensors of a model's parts. Local."""
    meshes = {id(tensor.device_mesh): tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}
    is_fsdp = any(isinstance(module, FSDPModule) for part in parts for module in part.modules())
    found: dict[str, set[int]] = {}
    reasons = []
    for mesh in meshes.values():
        # FSDP2's own mesh has no names; over another parallelism it demands some.
        names = mesh.mesh_dim_names or (("dp",) * mesh.ndim if is_fsdp else ())
        coordinates_by_role, reason = _read(mesh, names)
        reasons.append(reason)
        for role, coordinate in coordinates_by_role.items():
            found.setdefault(role, set()).add(coordinate)
    one = {role: next(iter(each)) for role, each in found.items() if len(each) == 1}
    # One mesh is enough, such as that of the dense layers; those of experts may leave the index open.
    unclear = "" if "data" in one else next(filter(None, reasons), "")
    for role, coordinates in found.items():
        if len(coordinates) > 1:
            unclear = f"the meshes of its tensors disagree about its {role}-parallel coordinate"
    dp = None if unclear else one.get("data")
    return MeshRanks(dp, one.get("tensor"), one.get("pipeline"), one.get("context"), unclear)


def _read(mesh: DeviceMesh, names: Sequence[str]) -> tuple[dict[str, int], str]:
    """The coordinates in a mesh and the one around it; and why these leave the data-parallel index open, if they do."""
    if not names:
        return {}, "the mesh of its tensors has no names of dimensions" if mesh.size() > 1 else ""
    root = root_mesh(mesh)
    # A flat mesh around others is all ranks in a row, without a known structure.
    outer = () if root is mesh or root.ndim == 1 else root.mesh_dim_names or ()
    around, strange = _by_role(root, outer)
    inner, odd = _by_role(mesh, names)
    found = {**inner, **around}
    # The mesh itself may be several of the dimensions around it in one.
    strange = strange + odd if strange or "data" not in around else ()
    if not strange:
        return found, ""
    found.pop("data", None)
    return found, f"its tensors' mesh has the dimensions {', '.join(dict.fromkeys(strange))}, whose use is unknown"


def _by_role(mesh: DeviceMesh, names: Sequence[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """This rank's coordinate in each role, and the names that leave open which ranks share data."""
    coordinate = mesh.get_coordinate()
    found: dict[str, int] = {}
    strange = []
    if coordinate is None or not names:
        return found, ()
    for name, size, index in zip(names, mesh.shape, coordinate, strict=True):
        role = _ROLES.get(name)
        if role is not None:
            found[role] = found.get(role, 0) * size + index
        elif size > 1:  # one of a single rank leaves nothing open, whatever it is called
            strange.append(name)
    return found, tuple(strange)
