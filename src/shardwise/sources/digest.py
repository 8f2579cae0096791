"""Digests of pieces that are not consecutive in their tensor."""

from __future__ import annotations

import math

import numpy as np
import torch

from shardwise.disk.crc import crc32c, shift
from shardwise.geometry import Box, flat_offset, stride_of
from shardwise.plan.deferred import resolve
from shardwise.sources.tensor_bytes import as_bytes, blocks, stored

_POLYNOMIAL = np.uint32(0x82F63B78)
_ROWS_AT_ONCE = 2**22


def contribution(
    box: Box, shape: tuple[int, ...], data: torch.Tensor, piece_crc: int, dtype: torch.dtype | None = None
) -> int:
    """The contribution of a piece to the CRC-32C of its whole tensor.

    Args:
        box: The piece's region.
        shape: The tensor's shape.
        data: The piece's elements; row-major order is the box's. Converted only if they have to be looked at.
        piece_crc: CRC-32C of their bytes in the file, in that order.
        dtype: The file's dtype; that of ``data`` if not given.
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
    period = inner
    rows = box.sizes[how.outer - 1]
    found = 0
    crcs = _row_crcs(resolve(data).detach().to("cpu", dtype), how.run, how.count).reshape(-1, rows)
    leads = Box(box.offsets[: how.outer - 1], box.sizes[: how.outer - 1])
    tail = flat_offset(box.offsets[how.outer :], shape[how.outer :]) * itemsize + how.run * itemsize
    for number, row in enumerate(crcs):
        index = np.unravel_index(number, leads.sizes) if leads.sizes else ()
        lead = flat_offset(tuple(int(i) + o for i, o in zip(index, leads.offsets, strict=True)), shape[: how.outer - 1])
        last = lead * shape[how.outer - 1] + box.offsets[how.outer - 1] + rows - 1
        found ^= shift(_combine_regular(row, period), total - (last * inner + tail))
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
