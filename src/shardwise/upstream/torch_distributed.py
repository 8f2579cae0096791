"""Private names of ``torch.distributed``, and those that files of torch and of its checkpoints have.

A group's own collectives are called in `shardwise.comm.collectives`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo

    __all__ = ["StorageInfo"]

#: Where DCP's own file system storage keeps the class of a place in a file, and the name of that class.
STORAGE_INFO = ("torch.distributed.checkpoint.filesystem", "_StorageInfo")

#: The enumeration of memory formats: its module and name today, and those of earlier releases.
MEMORY_FORMATS = ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")
LEGACY_MEMORY_FORMATS = ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING")

#: The function by which a pickled layout is made.
LAYOUT = ("torch.serialization", "_get_layout")

#: What a pickled DTensor calls its tensor on the rank and how it is spread, and the class of a strided placement.
DTENSOR_LOCAL, DTENSOR_SPEC, STRIDED_SHARD = "_local_tensor", "_spec", "_StridedShard"


def storage_info(relative_path: str, offset: int, length: int, transforms: Sequence[str] | None) -> StorageInfo:
    """A place in a file of a DCP directory, as DCP's readers want it."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(relative_path, offset, length, transforms)


def default_store() -> Store:
    """The key-value store with which the ranks of the default group met; ``ValueError`` without such a group."""
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()
