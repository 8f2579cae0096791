"""Private names of ``torch.distributed``; a group's own collectives are called in `shardwise.comm.collectives`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


def default_store() -> Store:
    """The key-value store with which the ranks of the default group met.

    Raises:
        ValueError: There is no default group.
    """
    return dist.distributed_c10d._get_default_store()
