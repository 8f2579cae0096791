"""Telling DCP what a packed strided shard really is.

DCP asks a DTensor for one chunk. A tensor packed under tensor parallelism (``_StridedShard`` over a fused weight) has
several disjoint regions on a rank; where FSDP2 has cut it once more, they lie elsewhere than DCP computes. `as_regions`
wraps such tensors so that they answer DCP's hooks with all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from shardwise.geometry import Box
from shardwise.plan.fragments import Fragment
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensor
from shardwise.upstream.torch_tensors import StridedShard, local_region, make_wrapper


def is_packed(value: object) -> bool:
    """Whether this rank's part of a DTensor is not one rectangular region at the place that DCP would record."""
    if not isinstance(value, DTensor) or value.device_mesh.get_coordinate() is None:
        return False
    if not any(isinstance(placement, StridedShard) for placement in value.placements):
        return False
    boxes = [fragment.box for fragment in held_tensor("", value, MeshRegister()).fragments]
    sizes, offsets = local_region(value)
    return bool(boxes) and boxes != [Box(offsets, sizes)]


class RegionTensor(torch.Tensor):
    """A tensor of global shape that answers DCP's hooks with every region that this rank holds."""

    _fragments: tuple[Fragment, ...]

    @staticmethod
    def of(value: DTensor) -> RegionTensor:
        """Wrap a DTensor; the regions are views of its local memory."""
        wrapped = make_wrapper(RegionTensor, value.shape, value.dtype, value.device)
        wrapped._fragments = tuple(held_tensor("", value, MeshRegister()).fragments)
        return wrapped

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: object, types: object, args: object = (), kwargs: object = None
    ) -> object:
        """Refuse arithmetic: the object only describes."""
        raise TypeError(f"{func} on a RegionTensor, which only describes what a rank holds")

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """DCP's hook for saving."""
        return [
            WriteItem(
                MetadataIndex(fqn, fragment.box.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=self.dtype), self.size()),
            )
            for fragment, chunk in zip(self._fragments, self.__create_chunk_list__(), strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """DCP's hook for loading."""
        return [
            ChunkStorageMetadata(torch.Size(fragment.box.offsets), torch.Size(fragment.box.sizes))
            for fragment in self._fragments
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        """DCP's hook for the memory of one region."""
        wanted = tuple(index.offset or ())
        return next(fragment.data for fragment in self._fragments if fragment.box.offsets == wanted)


def as_regions(state_dict: Mapping[str, object]) -> dict[str, object]:
    """A state dict whose packed tensors are wrapped, for ``dcp.save`` and ``dcp.load``; the rest is as it was."""
    return {
        name: RegionTensor.of(value) if isinstance(value, DTensor) and is_packed(value) else value
        for name, value in state_dict.items()
    }
