"""Tensors whose bytes are not those of a file as they lie there, read in the same way as the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch

from shardwise.dtypes import torch_dtype
from shardwise.geometry import TensorSpec
from shardwise.plan.reads import SourceTensor
from shardwise.sources.tensor_bytes import as_bytes


class BlockReader(Protocol):
    """Gives a tensor's bytes in row-major order, from front to back."""

    def blocks(self, tensor: SourceTensor) -> Iterator[memoryview]:
        """The bytes, in blocks of whole elements."""
        ...


#: Makes a tensor's bytes, in row-major order, with what reads the tensors that it is made of.
Computed: TypeAlias = Callable[[BlockReader], Iterator[memoryview]]


@dataclass(frozen=True, slots=True)
class ComputingReader:
    """Reads tensors, and computes those, by name, that are not in the files as they are wanted."""

    reader: BlockReader
    computed: Mapping[str, Computed] = field(default_factory=dict)

    def blocks(self, tensor: SourceTensor) -> Iterator[memoryview]:
        """As `BlockReader.blocks`."""
        made = self.computed.get(tensor.spec.name)
        return self.reader.blocks(tensor) if made is None else made(self.reader)


def read_flat(spec: TensorSpec, blocks: Iterable[memoryview]) -> torch.Tensor:
    """All elements of a tensor, in row-major order; one more than there are where it has none."""
    flat = torch.empty(max(1, spec.numel), dtype=torch_dtype(spec.dtype))
    into, at = as_bytes(flat), 0
    for block in blocks:
        into[at : at + len(block)] = block
        at += len(block)
    return flat
