"""The references: what the machine does for the same bytes when nothing but the bytes counts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

#: One call of the operating system for up to this many bytes; larger ones were not faster.
LARGEST_CALL = 64 * 2**20


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def raw_write(tensors: Sequence[torch.Tensor], path: Path) -> None:
    """Write the tensors' memory one after another into a fresh file of this rank's own, and sync it."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        offset = 0
        for tensor in tensors:
            data = _bytes_of(tensor)
            done = 0
            while done < len(data):
                done += os.pwrite(handle, data[done : done + LARGEST_CALL], offset + done)
            offset += done
        os.fsync(handle)
    finally:
        os.close(handle)


def raw_read(tensors: Sequence[torch.Tensor], path: Path, offset: int = 0) -> None:
    """Read consecutive bytes of a file, from ``offset`` on, into the tensors' memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        for tensor in tensors:
            data = _bytes_of(tensor)
            done = 0
            while done < len(data):
                got = os.preadv(handle, [data[done : done + LARGEST_CALL]], offset + done)
                if not got:
                    raise RuntimeError(f"{path} is too short")
                done += got
            offset += done
    finally:
        os.close(handle)


def copy(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Copy in memory."""
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
