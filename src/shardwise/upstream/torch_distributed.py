"""Private names of ``torch.distributed``; a group's own collectives are called in `shardwise.comm.collectives`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


def default_store() -> Store:
    """The key-value store with which the ranks of the default group met.

    Raises:
        ValueError: There is no default group.
    """
    return dist.distributed_c10d._get_default_store()


def owner_count(tensor: torch.Tensor) -> int:
    """How many owners below Python a tensor has; 0 where this release of torch does not say so."""
    count = getattr(tensor, "_use_count", None)
    return 0 if count is None else int(count())
