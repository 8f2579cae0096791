"""The tensors of a model as its files have them, each with its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from shardwise.geometry import TensorSpec
from shardwise.ops.computed_tensors import BlockReader, ComputingReader
from shardwise.ops.consolidate_input import ModelInput
from shardwise.ops.hub_blocks import hub_tensors, native_tensors
from shardwise.plan.reads import SourceTensor

Blocks: TypeAlias = Callable[[], Iterator[memoryview]]


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor to write.

    Attributes:
        spec: What it is as saved.
        blocks: Its bytes in row-major order, in blocks of whole elements.
    """

    spec: TensorSpec
    blocks: Blocks


def tensors_to_write(found: ModelInput, files: BlockReader) -> dict[str, TensorToWrite]:
    """The tensors of a model under the names of its files.

    Raises:
        ConversionError: A tensor of the files has to be computed from several.
    """
    reader = ComputingReader(files, found.computed)
    if found.native and found.kind is not None:
        return _by_name(hub_tensors(found.kind, found.source.tensors, reader))
    return as_saved(found.source.tensors, reader)


def native_tensors_to_write(found: ModelInput, files: BlockReader) -> dict[str, TensorToWrite]:
    """The tensors of a model under the names that it has for them in memory, where these are known.

    Raises:
        ConversionError: A tensor of the files is computed from several.
    """
    reader, kind = ComputingReader(files, found.computed), found.kind
    names = found.source.tensors.keys()
    if kind is None or kind.native.keys() <= names or not kind.hub.keys() <= names:
        return as_saved(found.source.tensors, reader)
    made = _by_name(native_tensors(kind, found.source.tensors, reader))
    known = kind.hub.keys() | kind.native.keys() | kind.others.keys()
    return made | {name: each for name, each in as_saved(found.source.tensors, reader).items() if name not in known}


def _by_name(found: Iterable[tuple[TensorSpec, Blocks]]) -> dict[str, TensorToWrite]:
    return {spec.name: TensorToWrite(spec, blocks) for spec, blocks in found}


def as_saved(tensors: Mapping[str, SourceTensor], reader: BlockReader) -> dict[str, TensorToWrite]:
    """Tensors by name, as they are in their files."""

    def one(tensor: SourceTensor) -> Blocks:
        return lambda: reader.blocks(tensor)

    return {name: TensorToWrite(tensor.spec, one(tensor)) for name, tensor in tensors.items()}
