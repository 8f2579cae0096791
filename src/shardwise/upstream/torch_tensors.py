"""Private attributes of tensors, DTensors and wrapper subclasses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, methodcaller
from typing import Any, TypeVar, cast

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec as DTensorSpec  # noqa: PLC0414
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.nn.parameter import is_lazy as is_lazy  # noqa: PLC0414
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_Made = TypeVar("_Made", bound=torch.Tensor)

#: From a DTensor: the tensor that it has on this rank.
local_in = attrgetter("_local_tensor")

#: From a DTensor: how it is spread (mesh, placements and shape, without its memory); and its mesh and placements, in a
#: tenth of the time that the public attributes take.
spread_of: Callable[[DTensor], DTensorSpec] = attrgetter("_spec")
mesh_of: Callable[[DTensor], DeviceMesh] = attrgetter("_spec.mesh")
placements_of: Callable[[DTensor], tuple[Placement, ...]] = attrgetter("_spec.placements")

#: The mesh that a mesh was cut out of; itself where it was made by itself.
root_mesh: Callable[[DeviceMesh], DeviceMesh] = methodcaller("_get_root_mesh")

#: Whether a tensor's class consists of other tensors, which ``__tensor_flatten__`` names.
is_wrapper: Callable[[torch.Tensor], bool] = is_traceable_wrapper_subclass

#: While active, subclasses' ``__torch_function__`` is not asked.
as_plain_tensors = torch._C.DisableTorchFunctionSubclass

#: The same memory, read with the opposite sign.
negated_view: Callable[[torch.Tensor], torch.Tensor] = torch._neg_view

#: A collective's result that may not have come yet.
PendingTensor = AsyncCollectiveTensor

#: The placement of a dimension that several mesh dimensions cut, not in the mesh's order.
StridedShard = _StridedShard


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, without a copy: a DTensor's local tensor, any other tensor itself.

    ``to_local()`` would record a step for a gradient, and wait for a collective.
    """
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def around(local: torch.Tensor, spread: DTensorSpec) -> DTensor:
    """A DTensor of a known spread around a local tensor, wherever that lies.

    ``from_local()`` would move the memory to the mesh's device.
    """
    return DTensor(local, spread, requires_grad=False)  # type: ignore[no-untyped-call]


def global_shape(tensor: DTensor) -> torch.Size:
    """A DTensor's shape, as its description has it, which is faster than to ask the tensor."""
    meta = tensor._spec.tensor_meta
    return tensor.shape if meta is None else meta.shape


def local_region(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and offsets of the one region that DCP would record of a DTensor on this rank."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(sizes), tuple(offsets)


def arrived(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, once the collective that makes it is over."""
    return tensor.trigger_wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor  # type: ignore[no-untyped-call]


def make_wrapper(
    cls: type[_Made], shape: Sequence[int], dtype: torch.dtype, device: torch.device | str | None
) -> _Made:
    """A tensor of a subclass that has a shape and no memory of its own; it seems contiguous."""
    return torch.Tensor._make_wrapper_subclass(cls, cast(Any, shape), dtype=dtype, device=cast(Any, device))


def quantized_per_tensor(integers: torch.Tensor, scale: float, zero: int) -> torch.Tensor:
    """Torch's quantized tensor of integers with one scale and zero point."""
    # Looked up when it is needed, as below: a release without it has everything else.
    return torch._make_per_tensor_quantized_tensor(integers, scale, zero)


def quantized_per_channel(integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, axis: int) -> torch.Tensor:
    """Torch's quantized tensor of integers with a scale and zero point for each index of an axis."""
    return torch._make_per_channel_quantized_tensor(integers, scales, zeros, axis)


def storage_key(tensor: torch.Tensor) -> int:
    """A number that tensors have in common which share a storage, also one without memory, as long as it is alive."""
    return int(tensor.untyped_storage()._cdata)
