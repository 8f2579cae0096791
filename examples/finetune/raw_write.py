"""The yardstick: every process writes the bytes that it holds to a file of its own, in one go, and makes them durable.

Nothing can save the same state in less: no layout, no digests, no metadata, no shared files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def local_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """What this process holds of the parameters and of the optimizer's state, each tensor once."""
    for parameter in model.parameters():
        yield _local(parameter)
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, torch.Tensor):
                yield _local(value)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def raw_write(tensors: Iterable[torch.Tensor], path: Path) -> int:
    """Write the tensors' bytes one after another, ``fsync``, and put the file in the place of the last one.

    A save deletes the oldest checkpoint, so its yardstick has to delete as many bytes.

    Returns:
        The number of bytes.
    """
    total = 0
    fresh = path.with_suffix(".new")
    handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        for tensor in tensors:
            view = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            done = 0
            while done < len(view):
                done += os.write(handle, view[done:])
            total += done
        os.fsync(handle)
    finally:
        os.close(handle)
    fresh.replace(path)
    return total
