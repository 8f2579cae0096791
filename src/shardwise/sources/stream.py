"""A saved tensor as a stream of bytes, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from shardwise.dtypes import torch_dtype
from shardwise.geometry import Box
from shardwise.plan.fragments import Fragment, HeldTensor
from shardwise.plan.reads import SourceTensor, plan_reads
from shardwise.plan.views import refine_range
from shardwise.sources.reader import Reader
from shardwise.sources.tensor_bytes import as_bytes

STREAM_BYTES = 8 * 2**20


def tensor_blocks(source: SourceTensor, reader: Reader, elements: int | None = None) -> Iterator[memoryview]:
    """A saved tensor's bytes in row-major order, in bounded memory; ``elements`` in each block, by default 8 MiB."""
    spec = source.spec
    dtype = torch_dtype(spec.dtype)
    per_block = elements or max(1, STREAM_BYTES // spec.itemsize)
    start, total = 0, math.prod(spec.shape)
    while start < total:
        count = min(per_block, total - start)
        buffer = torch.empty(count, dtype=dtype)
        fragments, used = [], 0
        for box in refine_range(start, count, spec.shape) if spec.shape else (Box((), ()),):
            fragments.append(Fragment(box, buffer[used : used + box.numel].view(box.sizes)))
            used += box.numel
        reader.execute(list(plan_reads(source, HeldTensor.alone(spec, fragments))))
        yield as_bytes(buffer)
        start += count
