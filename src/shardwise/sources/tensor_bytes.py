"""Tensors as bytes, in pieces of bounded size, and digests of pieces that are not consecutive in their tensor."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TypeAlias

import numpy as np
import torch

from shardwise.disk.crc import crc32c, shift
from shardwise.dtypes import torch_dtype
from shardwise.geometry import Box, TensorSpec, flat_offset, stride_of
from shardwise.plan.deferred import resolve
from shardwise.plan.reads import SourceTensor

#: Bytes that are converted, handed to the file system and digested at a time: they stay in a core's second-level cache
#: between the copy into the page cache and the digest (measured: 512 KiB was best, 256 KiB within noise of it).
BLOCK_BYTES = 2**19

#: Gives the bytes of a saved tensor in row-major order, from front to back, in blocks of whole elements.
ReadBlocks: TypeAlias = Callable[[SourceTensor], Iterator[memoryview]]
#: Makes those of a tensor that is not in the files as it is wanted, with what reads the tensors that it is made of.
Computed: TypeAlias = Callable[[ReadBlocks], Iterator[memoryview]]

_HUGE_PAGE = 2 * 2**20
_libc = cache(lambda: ctypes.CDLL(None))


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
    """The row-major bytes of a tensor of any strides, on any device, after a cast to ``dtype``, block by block.

    Nothing is copied where the tensor lies contiguous in CPU memory in that dtype; otherwise one block at a time is.
    The values behind a stand-in are made.
    """
    data = bytes_in_place(tensor, dtype)
    if data is not None:
        yield from cut_bytes(data, block_bytes)
        return
    tensor = resolve(tensor).detach().resolve_conj().resolve_neg()
    for block in blocks(tensor, max(1, block_bytes // max(tensor.element_size(), dtype.itemsize))):
        yield as_bytes(block.to(device="cpu", dtype=dtype).contiguous())


# --- digests ---------------------------------------------------------------------------------------------------------


_POLYNOMIAL = np.uint32(0x82F63B78)
_ROWS_AT_ONCE = 2**22


def contribution(
    box: Box, shape: tuple[int, ...], data: torch.Tensor, piece_crc: int, dtype: torch.dtype | None = None
) -> int:
    """The contribution of a piece, the region ``box``, to the CRC-32C of its whole tensor of ``shape``.

    ``data`` are the piece's elements, converted to ``dtype``, the file's (by default their own), only if they have to
    be looked at; ``piece_crc`` is the CRC-32C of their bytes in the file. Both are in the row-major order of the box.
    """
    dtype = dtype or data.dtype
    itemsize = dtype.itemsize
    total = math.prod(shape) * itemsize
    how = stride_of(box, shape)
    if box.numel == 0:
        return 0
    if how.count == 1:
        end = (flat_offset(box.offsets, shape) + how.run) * itemsize
        return shift(piece_crc, total - end)
    inner = math.prod(shape[how.outer :]) * itemsize
    rows = box.sizes[how.outer - 1]
    found = 0
    crcs = _row_crcs(resolve(data).detach().to("cpu", dtype), how.run, how.count).reshape(-1, rows)
    leads = Box(box.offsets[: how.outer - 1], box.sizes[: how.outer - 1])
    tail = flat_offset(box.offsets[how.outer :], shape[how.outer :]) * itemsize + how.run * itemsize
    for number, row in enumerate(crcs):
        index = np.unravel_index(number, leads.sizes) if leads.sizes else ()
        lead = flat_offset(tuple(int(i) + o for i, o in zip(index, leads.offsets, strict=True)), shape[: how.outer - 1])
        last = lead * shape[how.outer - 1] + box.offsets[how.outer - 1] + rows - 1
        found ^= shift(_combine_regular(row, inner), total - (last * inner + tail))
    return found


def _row_crcs(data: torch.Tensor, run: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    crcs = np.empty(count, dtype=np.uint32)
    width = run * data.element_size()
    at = 0
    for block in blocks(data.reshape(count, run), max(run, _ROWS_AT_ONCE // data.element_size() // run * run)):
        view = as_bytes(stored(block))
        for start in range(0, len(view), width):
            crcs[at] = crc32c(view[start : start + width])
            at += 1
    return crcs


def _times(
    crcs: np.ndarray[tuple[int], np.dtype[np.uint32]], factor: int
) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """Multiply every polynomial by ``factor`` modulo the generator (reflected bit order)."""
    product = np.zeros_like(crcs)
    power = crcs.copy()
    while factor:
        if factor & 0x80000000:
            product ^= power
        factor = (factor << 1) & 0xFFFFFFFF
        power = (power >> np.uint32(1)) ^ np.where(power & np.uint32(1), _POLYNOMIAL, np.uint32(0))
    return product


def _combine_regular(crcs: np.ndarray[tuple[int], np.dtype[np.uint32]], period: int) -> int:
    """The exclusive or of the CRCs of rows ``period`` bytes apart, each shifted to the end of the last."""
    while len(crcs) > 1:
        if len(crcs) % 2:
            crcs = np.concatenate([np.zeros(1, dtype=np.uint32), crcs])
        # shift() of the polynomial 1 is the factor x**(8 * period) itself.
        crcs = _times(crcs[0::2], shift(0x80000000, period)) ^ crcs[1::2]
        period *= 2
    return int(crcs[0])


def read_flat(spec: TensorSpec, blocks: Iterable[memoryview]) -> torch.Tensor:
    """All elements of a tensor, in row-major order; one more than there are where it has none."""
    flat = torch.empty(max(1, spec.numel), dtype=torch_dtype(spec.dtype))
    into, at = as_bytes(flat), 0
    for block in blocks:
        into[at : at + len(block)] = block
        at += len(block)
    return flat
