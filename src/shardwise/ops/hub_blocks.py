"""Converts tensors from the model's own names to those of its files, through the views of the model's conversion.

The views were derived on a model without memory; here each is laid over a tensor that was read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch

from shardwise.dtypes import torch_dtype
from shardwise.errors import ConversionError
from shardwise.geometry import TensorSpec
from shardwise.ops.computed_tensors import BlockReader, read_flat
from shardwise.ops.model_class import ModelClass
from shardwise.plan.fragments import Fragment, HeldTensor
from shardwise.plan.reads import SourceTensor
from shardwise.sources.tensor_bytes import as_bytes
from shardwise.sources.verifying_reader import BLOCK_BYTES
from shardwise.upstream.torch_tensors import storage_key

#: Number of native tensors kept in memory: those of one layer, which the tensors of a file use in turn.
_MOST_KEPT = 4


def hub_tensors(
    kind: ModelClass, tensors: Mapping[str, SourceTensor], reader: BlockReader
) -> list[tuple[TensorSpec, Callable[[], Iterator[memoryview]]]]:
    """The tensors of a model's files, each with its bytes in row-major order.

    Tensors that the class does not know keep their names. Memory: the tensor, and a few of its native tensors.

    Args:
        kind: The model's class.
        tensors: Under the model's own names; all that the class has.
        reader: Reads them.

    Raises:
        ConversionError: A tensor of the files has to be computed.
    """
    _refuse_computed(kind)
    natives = {_memory(tensor): tensor.spec.name for tensor in kind.state.native}
    whole = _Natives(tensors, reader)
    found: list[tuple[TensorSpec, Callable[[], Iterator[memoryview]]]] = []
    used: set[str] = set()
    for held in kind.state.held:
        names = [natives[storage_key(fragment.data)] for fragment in held.fragments]
        used |= set(names)
        dtype = tensors[names[0]].spec.dtype
        spec = held.spec._replace(dtype=dtype)
        if names == [held.spec.name] and held.grid == tensors[names[0]].spec.shape and len(held.fragments) == 1:
            found.append((spec, _plain(tensors[names[0]], reader)))
        else:
            found.append((spec, _viewed(held, names, spec, whole)))
    dropped = set(kind.others) | used
    found += [(t.spec, _plain(t, reader)) for name, t in tensors.items() if name not in dropped]
    return found


def native_tensors(
    kind: ModelClass, tensors: Mapping[str, SourceTensor], reader: BlockReader
) -> list[tuple[TensorSpec, Callable[[], Iterator[memoryview]]]]:
    """The inverse of `hub_tensors`: the tensors that a model has in memory, each with its bytes in row-major order.

    Memory: the tensor, and one of its files'.

    Args:
        kind: The model's class.
        tensors: Under the names of the model's files; all that the class has.
        reader: Reads them.

    Raises:
        ConversionError: A tensor of the files is computed from several of the model, or one of the model is in none.
    """
    _refuse_computed(kind)
    pieces: dict[int, list[tuple[HeldTensor, Fragment]]] = {}
    for held in kind.state.held:
        for fragment in held.fragments:
            pieces.setdefault(storage_key(fragment.data), []).append((held, fragment))
    found: list[tuple[TensorSpec, Callable[[], Iterator[memoryview]]]] = []
    for native in kind.state.native:
        parts = pieces.get(_memory(native), [])
        shape = native.spec.shape
        if sum(fragment.data.numel() for _, fragment in parts) != native.spec.numel:
            raise ConversionError(
                f"the files of a {kind.name} do not have all of this tensor", path=kind.config, tensor=native.spec.name
            )
        first = tensors[parts[0][0].spec.name]
        if len(parts) == 1 and parts[0][0].spec.shape == shape and _is_whole(parts[0]):
            found.append((first.spec._replace(name=native.spec.name), _plain(first, reader)))
        else:
            spec = TensorSpec(native.spec.name, shape, first.spec.dtype)
            found.append((spec, _assembled(spec, parts, tensors, reader)))
    return found


def _is_whole(part: tuple[HeldTensor, Fragment]) -> bool:
    held, fragment = part
    return held.grid == held.spec.shape and fragment.data.shape == held.spec.shape and fragment.data.is_contiguous()


def _assembled(
    spec: TensorSpec,
    parts: Sequence[tuple[HeldTensor, Fragment]],
    tensors: Mapping[str, SourceTensor],
    reader: BlockReader,
) -> Callable[[], Iterator[memoryview]]:
    def blocks() -> Iterator[memoryview]:
        whole = torch.empty(max(1, spec.numel), dtype=torch_dtype(spec.dtype))
        for held, fragment in parts:
            view, box = fragment.data, fragment.box
            source = tensors[held.spec.name]
            saved = read_flat(source.spec, reader.blocks(source))[: held.spec.numel].view(held.grid)
            for dim, (low, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
                saved = saved.narrow(dim, low, size)
            whole.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(saved)
        content = as_bytes(whole[: spec.numel])
        for start in range(0, len(content), BLOCK_BYTES):
            yield content[start : start + BLOCK_BYTES]

    return blocks


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


def _plain(tensor: SourceTensor, reader: BlockReader) -> Callable[[], Iterator[memoryview]]:
    return lambda: reader.blocks(tensor)


def _viewed(
    held: HeldTensor, names: list[str], spec: TensorSpec, natives: _Natives
) -> Callable[[], Iterator[memoryview]]:
    def blocks() -> Iterator[memoryview]:
        whole = torch.empty(held.grid, dtype=torch_dtype(spec.dtype))
        for fragment, name in zip(held.fragments, names, strict=True):
            target = whole
            for dim, (low, size) in enumerate(zip(fragment.box.offsets, fragment.box.sizes, strict=True)):
                target = target.narrow(dim, low, size)
            view = fragment.data
            target.copy_(natives.get(name).as_strided(view.shape, view.stride(), view.storage_offset()))
        content = as_bytes(whole)
        for start in range(0, len(content), BLOCK_BYTES):
            yield content[start : start + BLOCK_BYTES]

    return blocks


@dataclass
class _Natives:
    """Caches the last few native tensors that were read whole; any thread."""

    tensors: Mapping[str, SourceTensor]
    reader: BlockReader
    _kept: OrderedDict[str, torch.Tensor] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def get(self, name: str) -> torch.Tensor:
        with self._lock:
            return self._get(name)

    def _get(self, name: str) -> torch.Tensor:
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        while len(self._kept) >= _MOST_KEPT:
            self._kept.popitem(last=False)
        tensor = self.tensors[name]
        flat = self._kept[name] = read_flat(tensor.spec, self.reader.blocks(tensor))
        return flat
