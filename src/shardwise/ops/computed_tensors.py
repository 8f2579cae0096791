"""Tensors whose bytes are not those of a file as they lie there, read in the same way as the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch

from shardwise.dtypes import torch_dtype
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
    """Reads tensors, and computes those that are not in the files as they are wanted.

    Attributes:
        reader: Reads the files.
        computed: Name of such a tensor -> its bytes.
    """

    reader: BlockReader
    computed: Mapping[str, Computed] = field(default_factory=dict)

    def blocks(self, tensor: SourceTensor) -> Iterator[memoryview]:
        """As `BlockReader.blocks`."""
        made = self.computed.get(tensor.spec.name)
        return self.reader.blocks(tensor) if made is None else made(self.reader)


def read_flat(tensor: SourceTensor, reader: BlockReader) -> torch.Tensor:
    """All elements of a tensor, in row-major order; one more than there are where it has none."""
    flat = torch.empty(max(1, tensor.spec.numel), dtype=torch_dtype(tensor.spec.dtype))
    fill(flat, reader.blocks(tensor))
    return flat


def fill(whole: torch.Tensor, blocks: Iterable[memoryview]) -> None:
    """Put bytes in row-major order into the memory of a contiguous tensor."""
    into, at = as_bytes(whole), 0
    for block in blocks:
        into[at : at + len(block)] = block
        at += len(block)
