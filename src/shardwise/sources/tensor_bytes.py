"""Tensors as bytes, in pieces of bounded size."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from functools import cache

import torch

from shardwise.plan.deferred import resolve

#: Bytes that are converted, handed to the file system and digested at a time: they stay in a core's second-level cache
#: between the copy into the page cache and the digest (measured: 512 KiB was best, 256 KiB within noise of it).
BLOCK_BYTES = 2**19

_HUGE_PAGE = 2 * 2**20


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable, without a copy."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return flat_bytes(tensor).numpy().data.cast("B")


def bytes_in_place(tensor: torch.Tensor, dtype: torch.dtype) -> memoryview | None:
    """A tensor's memory, where that is the row-major bytes of its elements in ``dtype``; else ``None``."""
    if tensor.device.type != "cpu" or tensor.dtype != dtype or not tensor.is_contiguous():
        return None
    return as_bytes(tensor) if is_as_stored(tensor) else None


def is_as_stored(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements are what its memory holds: it is not a conjugate or negative view."""
    return not (tensor.is_conj() or tensor.is_neg())


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor whose memory holds the elements; the tensor itself where it is one."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory as a one-dimensional ``uint8`` tensor, without a copy."""
    # A dimension of size 1 may have any stride and the tensor still be contiguous; view() alone refuses such a one.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def prefer_huge_pages(tensor: torch.Tensor) -> None:
    """Ask for huge pages behind a large CPU tensor whose memory has not been touched: its first touch costs a fraction.

    A hint only: a system without free huge pages gives small ones.
    """
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if tensor.device.type == "cpu" and end - start >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def blocks(tensor: torch.Tensor, max_elements: int) -> Iterator[torch.Tensor]:
    """Cut a tensor into views of at most ``max_elements`` elements whose row-major concatenation is the tensor."""
    if tensor.numel() <= max_elements:
        if tensor.numel():
            yield tensor
        return
    rows = tensor.shape[0]
    per_row = tensor.numel() // rows
    step = max_elements // per_row
    if step:
        for start in range(0, rows, step):
            yield tensor[start : start + step]
    else:
        for start in range(rows):
            yield from blocks(tensor[start], max_elements)


def cut_bytes(data: memoryview, block_bytes: int = BLOCK_BYTES) -> Iterator[memoryview]:
    """Memory, block by block."""
    for start in range(0, len(data), block_bytes):
        yield data[start : start + block_bytes]


def byte_blocks(tensor: torch.Tensor, dtype: torch.dtype, block_bytes: int = BLOCK_BYTES) -> Iterator[memoryview]:
    """The row-major bytes of a tensor after a cast to ``dtype``, block by block.

    Nothing is copied where the tensor lies contiguous in CPU memory in that dtype; otherwise one block at a time is.
    The values behind a stand-in are made.

    Args:
        tensor: Any strides, any device.
        dtype: The dtype in the file.
        block_bytes: Largest block.
    """
    data = bytes_in_place(tensor, dtype)
    if data is not None:
        yield from cut_bytes(data, block_bytes)
        return
    tensor = resolve(tensor).detach().resolve_conj().resolve_neg()
    for block in blocks(tensor, max(1, block_bytes // max(tensor.element_size(), dtype.itemsize))):
        yield as_bytes(block.to(device="cpu", dtype=dtype).contiguous())
