"""What one rank's file says of a distributed tensor: the whole of it, and which regions this rank holds.

Source: what torch pickles of a ``DTensor`` (``torch.distributed.tensor``) and of a ``ShardedTensor``
(``torch.distributed._shard``, FSDP1), today and, by the names of their modules and attributes, back to torch 2.1.
Classes are names here, compared with a list; none is imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from shardwise.errors import FormatError, TensorError
from shardwise.format.pickle_tree import PickledCall, PickledGlobal
from shardwise.format.torch_archive import TorchArchive
from shardwise.geometry import Box, flat_offset
from shardwise.plan.placement import Placement, Region, Replicated, Sharded, Strided, regions
from shardwise.sources.others.stored import (
    PLAIN_NAMES,
    TYPED,
    StoredTensor,
    counts,
    dtype_of,
    fail,
    is_call,
    is_tensor,
    refuse_unread,
    stored_tensor,
    without_parameter,
)
from shardwise.upstream.torch_distributed import (
    DTENSOR_LOCAL,
    DTENSOR_SPEC,
    LEGACY_MEMORY_FORMATS,
    MEMORY_FORMATS,
    STRIDED_SHARD,
)


def _names(modules: Iterable[str], *names: str) -> frozenset[PickledGlobal]:
    return frozenset(PickledGlobal(module, name) for module in modules for name in names)


_DT, _OLD_DT = "torch.distributed.tensor", "torch.distributed._tensor"
_TYPED = frozenset({TYPED})
_WRAPPER = _names(["torch._utils"], "_rebuild_wrapper_subclass")
_DTENSOR = _names([_DT, f"{_DT}._api", _OLD_DT, f"{_OLD_DT}.api"], "DTensor")
_SPEC_MODULES = (f"{_DT}._dtensor_spec", f"{_OLD_DT}._dtensor_spec", f"{_OLD_DT}.placement_types")
_SPEC = _names(_SPEC_MODULES, "DTensorSpec")
_META = _names(_SPEC_MODULES, "TensorMeta")
_ORDER = _names(_SPEC_MODULES, "ShardOrderEntry")
_PLACEMENTS = (f"{_DT}.placement_types", f"{_OLD_DT}.placement_types")
_SHARD = _names(_PLACEMENTS, "Shard")
_STRIDED = _names(_PLACEMENTS, STRIDED_SHARD)
_REPLICATE = _names(_PLACEMENTS, "Replicate")
_PARTIAL = _names(_PLACEMENTS, "Partial", "_Partial")
_MESH = _names(["torch.distributed.device_mesh", f"{_OLD_DT}.device_mesh"], "DeviceMesh")
_MESH_LAYOUT = _names(["torch.distributed._mesh_layout"], "_MeshLayout", "_FlatLayout")
_SHARDED = _names([f"torch.distributed._shard.sharded_tensor{m}" for m in (".api", "")], "ShardedTensor")
_GROUP_STATE = _names(
    ["torch.distributed._shard.sharded_tensor.api"], "ShardedTensor.ProcessGroupState", "ProcessGroupState"
)
_LOCAL_SHARD = _names(["torch.distributed._shard.sharded_tensor.shard"], "Shard")
_SHARD_META = _names(["torch.distributed._shard.metadata"], "ShardMetadata")
_SHARDED_META = _names(["torch.distributed._shard.sharded_tensor.metadata"], "ShardedTensorMetadata")
_PROPERTIES = _names(["torch.distributed._shard.sharded_tensor.metadata"], "TensorProperties")
_INERT = (
    _names(["torch.distributed.remote_device"], "_remote_device")
    | _names(["torch.distributed._shard.sharding_spec.chunk_sharding_spec"], "ChunkShardingSpec")
    | _names(["torch.distributed._shard.sharding_spec.api"], "EnumerableShardingSpec")
    | _names(["torch.distributed._shard.sharding_spec._internals"], "EnumerableShardingSpec")
)
#: Enumerations that such files name.
RANK_ENUMS = frozenset({PickledGlobal(*MEMORY_FORMATS), PickledGlobal(*LEGACY_MEMORY_FORMATS)})
#: What files of one rank's tensors name.
RANK_NAMES = (
    PLAIN_NAMES
    | (_TYPED | _WRAPPER | _DTENSOR | _SPEC | _META | _ORDER | _SHARD | _STRIDED | _REPLICATE | _PARTIAL | _MESH)
    | (_MESH_LAYOUT | _SHARDED | _GROUP_STATE | _LOCAL_SHARD | _SHARD_META | _SHARDED_META | _PROPERTIES | _INERT)
    | RANK_ENUMS
)


_MOST_GROUPS = 65536


class Part(NamedTuple):
    """A region of a tensor, and the local tensor that it lies in."""

    region: Region
    stored: StoredTensor


@dataclass(frozen=True, slots=True)
class RankTensor:
    """What one rank's file has of a tensor."""

    shape: tuple[int, ...]  #: Of the whole tensor.
    dtype: str
    kind: str  #: Its class: ``Tensor``, ``DTensor`` or ``ShardedTensor``.
    spread: object  #: How it is spread over the ranks; equal in every rank's file.
    parts: tuple[Part, ...]  #: The regions that are in this file.
    rank: int | None = None  #: The rank that the file says to be of, where it says so.
    world: int | None = None  #: The number of ranks, likewise.


def rank_tensor(archive: TorchArchive, value: object, name: str) -> RankTensor | None:
    """Describe a value of a state dict; ``None`` where it is no tensor.

    A tensor of another class, or not of the form that its class has, is a `FormatError`; a sum that was not made yet,
    and what is spread in a way that is not known, a `TensorError`.
    """
    value = without_parameter(value)
    if is_tensor(value):
        stored = stored_tensor(archive, value, name)
        origin = (0,) * len(stored.shape)
        return RankTensor(
            stored.shape, stored.dtype, "Tensor", None, (Part(Region(Box.whole(stored.shape), origin), stored),)
        )
    if not isinstance(value, PickledCall) or value.function not in _TYPED:
        refuse_unread(archive, value, name)
        return None
    kind = value.args[1] if len(value.args) == 4 else None
    inner = value.args[2] if len(value.args) == 4 else None
    function = value.args[0] if value.args else None
    if not isinstance(kind, PickledGlobal) or not isinstance(inner, tuple) or function not in tuple(_WRAPPER):
        fail(archive, name, "has a malformed tensor of a class of its own")
    if kind in _DTENSOR:
        found = _dtensor(archive, _slots(archive, value.args[3], name), name)
    elif kind in _SHARDED:
        found = _sharded_tensor(archive, value.args[3], name)
    else:
        raise FormatError(
            f"the tensor is of the class {kind}, which is not read",
            path=archive.path,
            tensor=name,
            hint="Save the model's full state dict with the tool that wrote it.",
        )
    outer = counts(archive, inner[2], name, "a shape's sizes") if len(inner) > 2 else None
    if outer != found.shape:
        fail(archive, name, f"says to be of {outer} and of {found.shape}")
    return found


def _slots(archive: TorchArchive, state: object, name: str) -> dict[object, object]:
    """The attributes of an object: a dict, or the pair of a dict and one of its slots."""
    if isinstance(state, tuple) and len(state) == 2:
        return {key: value for each in state if isinstance(each, dict) for key, value in each.items()}
    if not isinstance(state, dict):
        fail(archive, name, "has an object without attributes")
    return state


def _object(archive: TorchArchive, value: object, kinds: frozenset[PickledGlobal], name: str) -> dict[object, object]:
    """The attributes of an object of one of these classes."""
    if not isinstance(value, PickledCall) or value.function not in kinds:
        fail(archive, name, f"has something else where a {min(kind.name for kind in kinds)} belongs")
    return _slots(archive, value.state if value.state is not None else {}, name)


# --- DTensor ---------------------------------------------------------------------------------------------------------


def _dtensor(archive: TorchArchive, state: dict[object, object], name: str) -> RankTensor:
    local = stored_tensor(archive, state.get(DTENSOR_LOCAL), name)
    spec = _object(archive, state.get(DTENSOR_SPEC), _SPEC, name)
    meta = spec.get("tensor_meta")
    if not is_call(meta, _META) or not isinstance(meta, PickledCall) or len(meta.args) != 3:
        fail(archive, name, "does not say what the whole tensor is")
    shape = counts(archive, meta.args[0], name, "a shape's sizes")
    if dtype_of(archive, meta.args[2], name) != local.dtype:
        fail(archive, name, "has a local tensor of another dtype than the whole one")
    mesh = _mesh(archive, spec.get("mesh"), name)
    found = spec.get("placements")
    if not isinstance(found, (tuple, list)) or len(found) != len(mesh.shape):
        fail(archive, name, "has not one placement for each dimension of its mesh")
    placements = tuple(_placement(archive, each, len(shape), name) for each in found)
    _refuse_order(archive, spec, placements, name)
    held = regions(shape, mesh.shape, placements, mesh.coordinate)
    _compare(archive, local, held, name)
    parts = tuple(Part(region, local) for region in held)
    return RankTensor(shape, local.dtype, "DTensor", (mesh.shape, placements), parts, mesh.rank)


class _Mesh(NamedTuple):
    shape: tuple[int, ...]
    coordinate: tuple[int, ...]
    rank: int | None


def _mesh(archive: TorchArchive, value: object, name: str) -> _Mesh:
    fields = _object(archive, value, _MESH, name)
    shape = _mesh_shape(archive, fields, name)
    at = fields.get("_coordinate_on_dim")
    if at is None:
        raise TensorError(
            "the rank that saved this file is not part of the tensor's mesh",
            path=archive.path,
            tensor=name,
            hint="Save each tensor from the ranks that hold it.",
        )
    coordinate = counts(archive, at, name, "coordinates")
    if len(coordinate) != len(shape) or any(i >= n for i, n in zip(coordinate, shape, strict=True)):
        fail(archive, name, f"has the coordinate {list(coordinate)} in a mesh of {list(shape)}")
    rank = fields.get("_rank")
    # torch 2.4 to 2.8 keep the ranks of the mesh in order, from which the own rank follows.
    ranks = fields.get("_flatten_mesh_list")
    if rank is None and isinstance(ranks, (tuple, list)) and len(ranks) == math.prod(shape):
        rank = ranks[flat_offset(coordinate, shape)]
    return _Mesh(shape, coordinate, rank if type(rank) is int else None)


def _mesh_shape(archive: TorchArchive, fields: dict[object, object], name: str) -> tuple[int, ...]:
    """The size of each dimension of a mesh: of its layout, or, before torch 2.9, of the tensor of its ranks."""
    if "_layout" not in fields:
        mesh = fields.get("mesh")
        if not is_tensor(mesh):
            fail(archive, name, "has a mesh that does not say how large it is")
        return stored_tensor(archive, mesh, name).shape
    layout = _object(archive, fields["_layout"], _MESH_LAYOUT, name)
    if "axes" in layout:
        axes = layout["axes"]
        if not isinstance(axes, (tuple, list)):
            fail(archive, name, "has a malformed mesh")
        sizes = [_object(archive, axis, _MESH_LAYOUT, name).get("shape") for axis in axes]
    else:
        found = layout.get("shape")
        sizes = list(found) if isinstance(found, (tuple, list)) else [found]
    # A dimension of a mesh may be made of several.
    several = [size if isinstance(size, (tuple, list)) else (size,) for size in sizes]
    return tuple(math.prod(counts(archive, each, name, "a mesh's sizes")) for each in several)


def _placement(archive: TorchArchive, value: object, dims: int, name: str) -> Placement:
    if is_call(value, _REPLICATE):
        return Replicated()
    if is_call(value, _PARTIAL):
        raise TensorError(
            "a partial tensor is a sum that has not been made yet",
            path=archive.path,
            tensor=name,
            hint="Redistribute it (Replicate or Shard) before saving.",
        )
    fields = _object(archive, value, _SHARD | _STRIDED, name)
    dim = fields.get("dim")
    if type(dim) is not int or not -dims <= dim < dims:
        fail(archive, name, "is cut along a dimension that it does not have")
    if not is_call(value, _STRIDED):
        return Sharded(dim % dims)
    factor = fields.get("split_factor")
    if type(factor) is not int or not 1 <= factor <= _MOST_GROUPS:
        fail(archive, name, f"has a strided shard whose split factor is not from 1 to {_MOST_GROUPS}")
    return Strided(dim % dims, factor)


def _refuse_order(
    archive: TorchArchive, spec: dict[object, object], placements: tuple[Placement, ...], name: str
) -> None:
    """Refuse a tensor whose mesh dimensions do not apply from left to right, as `regions` takes them."""
    order = spec.get("shard_order")
    if order is None:
        return
    if not isinstance(order, (tuple, list)):
        fail(archive, name, "has a malformed order of its shards")
    for entry in order:
        if not isinstance(entry, PickledCall) or entry.function not in _ORDER or len(entry.args) != 2:
            fail(archive, name, "has a malformed order of its shards")
        dims = counts(archive, entry.args[1], name, "mesh dimensions")
        if list(dims) != sorted(set(dims)):
            raise TensorError(
                f"the tensor's dimension {entry.args[0]} is cut by the mesh's dimensions in the order {list(dims)}",
                path=archive.path,
                tensor=name,
                hint="Only the order from left to right is read: redistribute the tensor before saving.",
            )


def _compare(archive: TorchArchive, local: StoredTensor, held: tuple[Region, ...], name: str) -> None:
    """Compare a local tensor with the regions that its rank has to hold."""
    ends = zip(*([a + n for a, n in zip(r.local, r.box.sizes, strict=True)] for r in held), strict=True)
    expected = tuple(max(each) for each in ends) if held else (0,)
    if (local.shape != expected) if held else local.numel:
        fail(archive, name, f"has a local tensor of {list(local.shape)}, where its rank holds {list(expected)}")


# --- ShardedTensor ---------------------------------------------------------------------------------------------------


def _sharded_tensor(archive: TorchArchive, state: object, name: str) -> RankTensor:
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[0], list):
        fail(archive, name, "has a malformed ShardedTensor")
    meta = _object(archive, state[1], _SHARDED_META, name)
    group = _object(archive, state[2], _GROUP_STATE, name)
    shape = counts(archive, meta.get("size"), name, "a shape's sizes")
    properties = meta.get("tensor_properties")
    listed = meta.get("shards_metadata")
    if not isinstance(properties, PickledCall) or properties.function not in _PROPERTIES:
        fail(archive, name, "has a malformed ShardedTensor")
    if not isinstance(listed, list):
        fail(archive, name, "has a ShardedTensor that does not list its shards")
    fields_of = properties.state
    dtype = fields_of[0] if isinstance(fields_of, tuple) and fields_of else None
    if isinstance(fields_of, dict):
        dtype = fields_of.get("dtype")
    code = dtype_of(archive, dtype, name)
    boxes = tuple(_shard_box(archive, each, shape, name) for each in listed)
    parts = []
    for shard in state[0]:
        fields = _object(archive, shard, _LOCAL_SHARD, name)
        box = _shard_box(archive, fields.get("metadata"), shape, name)
        stored = stored_tensor(archive, fields.get("tensor"), name)
        if box not in boxes or stored.shape != box.sizes or stored.dtype != code:
            fail(archive, name, f"has a shard of {list(stored.shape)} {stored.dtype} that its metadata do not list")
        parts.append(Part(Region(box, (0,) * len(shape)), stored))
    said = [group.get(key) for key in ("global_rank", "global_world_size")]
    rank, world = (value if type(value) is int else None for value in said)
    return RankTensor(shape, code, "ShardedTensor", boxes, tuple(parts), rank, world)


def _shard_box(archive: TorchArchive, value: object, shape: tuple[int, ...], name: str) -> Box:
    fields = _object(archive, value, _SHARD_META, name)
    box = Box(
        counts(archive, fields.get("shard_offsets"), name, "offsets"),
        counts(archive, fields.get("shard_sizes"), name, "sizes"),
    )
    if len(box.offsets) != len(shape) or len(box.sizes) != len(shape):
        fail(archive, name, "has a shard with another number of dimensions than its tensor")
    if box.numel and any(end > size for end, size in zip(box.ends, shape, strict=True)):
        fail(archive, name, "has a shard that reaches outside of its tensor")
    return box
