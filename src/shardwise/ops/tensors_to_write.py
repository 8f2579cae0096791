"""The tensors of a model as its files have them, or as the model has them in memory, each with its bytes.

The views between the two were derived on a model without memory; here each is laid over a tensor that was read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TypeAlias

import torch

from shardwise.dtypes import torch_dtype
from shardwise.errors import ConversionError
from shardwise.geometry import TensorSpec
from shardwise.ops.computed_tensors import BlockReader, ComputingReader, read_flat
from shardwise.ops.consolidate_input import ModelInput
from shardwise.ops.model_class import ModelClass
from shardwise.plan.fragments import Fragment, HeldTensor, part_in_box
from shardwise.plan.reads import SourceTensor
from shardwise.sources.tensor_bytes import byte_blocks
from shardwise.upstream.torch_tensors import storage_key

#: Number of native tensors kept in memory: those of one layer, which the tensors of a file use in turn.
_MOST_KEPT = 4

Blocks: TypeAlias = Callable[[], Iterator[memoryview]]


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor to write, as saved: its bytes in row-major order, in blocks of whole elements."""

    spec: TensorSpec
    blocks: Blocks


def tensors_to_write(found: ModelInput, files: BlockReader) -> dict[str, TensorToWrite]:
    """The tensors of a model under the names of its files; those that its class does not know keep their names.

    Memory: the tensor, and a few of the model's own.
    """
    reader, kind, tensors = ComputingReader(files, found.computed), found.kind, found.source.tensors
    if not found.native or kind is None:
        return as_saved(tensors, reader)
    _refuse_computed(kind)
    natives = {_memory(tensor): tensor.spec.name for tensor in kind.state.native}
    whole = _Natives(tensors, reader)
    made: dict[str, TensorToWrite] = {}
    dropped = set(kind.others)
    for held in kind.state.held:
        names = [natives[storage_key(fragment.data)] for fragment in held.fragments]
        dropped |= set(names)
        first = tensors[names[0]]
        spec = held.spec._replace(dtype=first.spec.dtype)
        same = names == [spec.name] and held.grid == first.spec.shape and len(held.fragments) == 1
        made[spec.name] = TensorToWrite(spec, _read(first, reader) if same else _viewed(held, names, spec, whole))
    return made | as_saved({name: tensor for name, tensor in tensors.items() if name not in dropped}, reader)


def native_tensors_to_write(found: ModelInput, files: BlockReader) -> dict[str, TensorToWrite]:
    """The tensors of a model under the names that it has for them in memory, where these are known.

    Memory: the tensor, and one of its files'.
    """
    reader, kind, tensors = ComputingReader(files, found.computed), found.kind, found.source.tensors
    if kind is None or kind.native.keys() <= tensors.keys() or not kind.hub.keys() <= tensors.keys():
        return as_saved(tensors, reader)
    _refuse_computed(kind)
    pieces: dict[int, list[tuple[HeldTensor, Fragment]]] = {}
    for held in kind.state.held:
        for fragment in held.fragments:
            pieces.setdefault(storage_key(fragment.data), []).append((held, fragment))
    made: dict[str, TensorToWrite] = {}
    for native in kind.state.native:
        parts = pieces.get(_memory(native), [])
        if sum(fragment.data.numel() for _, fragment in parts) != native.spec.numel:
            raise ConversionError(
                f"the files of a {kind.name} do not have all of this tensor", path=kind.config, tensor=native.spec.name
            )
        first = tensors[parts[0][0].spec.name]
        spec = native.spec._replace(dtype=first.spec.dtype)
        same = len(parts) == 1 and parts[0][0].spec.shape == spec.shape and _is_whole(*parts[0])
        made[spec.name] = TensorToWrite(
            spec, _read(first, reader) if same else _assembled(spec, parts, tensors, reader)
        )
    known = kind.hub.keys() | kind.native.keys() | kind.others.keys()
    return made | as_saved({name: tensor for name, tensor in tensors.items() if name not in known}, reader)


def as_saved(tensors: Mapping[str, SourceTensor], reader: BlockReader) -> dict[str, TensorToWrite]:
    """Tensors by name, as they are in their files."""
    return {name: TensorToWrite(tensor.spec, _read(tensor, reader)) for name, tensor in tensors.items()}


def _read(tensor: SourceTensor, reader: BlockReader) -> Blocks:
    return lambda: reader.blocks(tensor)


def _refuse_computed(kind: ModelClass) -> None:
    if kind.state.groups:
        raise ConversionError(
            f"tensors of the files of a {kind.name} have to be computed from those of the model",
            path=kind.config,
            tensor=kind.state.groups[0].computed.hub[0].name,
            hint="Load the checkpoint into the model, and save it with save_consolidated.",
        )


def _memory(tensor: HeldTensor) -> int:
    return storage_key(tensor.fragments[0].data)


def _is_whole(held: HeldTensor, fragment: Fragment) -> bool:
    return held.grid == held.spec.shape and fragment.data.shape == held.spec.shape and fragment.data.is_contiguous()


def _viewed(held: HeldTensor, names: Sequence[str], spec: TensorSpec, natives: _Natives) -> Blocks:
    """A tensor of the files, put together from views of the model's."""

    def blocks() -> Iterator[memoryview]:
        whole = torch.empty(held.grid, dtype=torch_dtype(spec.dtype))
        for fragment, name in zip(held.fragments, names, strict=True):
            part_in_box(whole, fragment.box).copy_(_as(fragment.data, natives.get(name)))
        yield from byte_blocks(whole, whole.dtype)

    return blocks


def _assembled(
    spec: TensorSpec,
    parts: Sequence[tuple[HeldTensor, Fragment]],
    tensors: Mapping[str, SourceTensor],
    reader: BlockReader,
) -> Blocks:
    """A tensor of the model, whose views are filled from the tensors of the files."""

    def blocks() -> Iterator[memoryview]:
        whole = torch.empty(max(1, spec.numel), dtype=torch_dtype(spec.dtype))
        for held, fragment in parts:
            source = tensors[held.spec.name]
            saved = read_flat(source.spec, reader.blocks(source))[: held.spec.numel].view(held.grid)
            _as(fragment.data, whole).copy_(part_in_box(saved, fragment.box))
        yield from byte_blocks(whole[: spec.numel], whole.dtype)

    return blocks


def _as(view: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """The view of a tensor without memory, laid over memory."""
    return memory.as_strided(view.shape, view.stride(), view.storage_offset())


@dataclass
class _Natives:
    """Caches the last few native tensors that were read whole; any thread."""

    tensors: Mapping[str, SourceTensor]
    reader: BlockReader
    _kept: OrderedDict[str, torch.Tensor] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def get(self, name: str) -> torch.Tensor:
        with self._lock:
            known = self._kept.pop(name, None)
            while len(self._kept) >= _MOST_KEPT:
                self._kept.popitem(last=False)
            source = self.tensors[name]
            self._kept[name] = read_flat(source.spec, self.reader.blocks(source)) if known is None else known
            return self._kept[name]
