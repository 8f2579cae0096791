"""The tensors of a model as its files have them, or as the model has them in memory, each with its bytes.

The views between the two were derived on a model without memory; here each is laid over a tensor that was read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TypeAlias

import torch

from shardwise.dtypes import torch_dtype
from shardwise.errors import ConversionError
from shardwise.geometry import TensorSpec
from shardwise.ops.consolidate_input import ModelInput
from shardwise.ops.model_class import ModelClass
from shardwise.plan.deferred import bound
from shardwise.plan.fragments import Fragment, HeldTensor, part_in_box
from shardwise.plan.reads import SourceTensor
from shardwise.sources.tensor_bytes import Computed, ReadBlocks, byte_blocks, read_flat
from shardwise.upstream.torch_tensors import storage_key

#: Number of native tensors kept in memory: those of one layer, which the tensors of a file use in turn.
_MOST_KEPT = 4

#: A tensor's bytes in row-major order, from front to back, in blocks of whole elements.
Blocks: TypeAlias = Callable[[], Iterator[memoryview]]


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor to write, as saved."""

    spec: TensorSpec
    blocks: Blocks


def tensors_to_write(found: ModelInput, files: ReadBlocks) -> dict[str, TensorToWrite]:
    """The tensors of a model under the names of its files; those that its class does not know keep their names.

    Memory: the tensor, and a few of the model's own.
    """
    read, kind, tensors = computing(files, found.computed), found.kind, found.source.tensors
    if not found.native or kind is None:
        return as_saved(tensors, read)
    _refuse_computed(kind)
    natives = {storage_key(tensor.fragments[0].data): tensor.spec.name for tensor in kind.state.native}
    kept = LastFew(_MOST_KEPT)

    def values(view: torch.Tensor) -> torch.Tensor:
        source = tensors[natives[storage_key(view)]]
        return bound(view, kept.get(source.spec.name, lambda: read_flat(source.spec, read(source))))

    made: dict[str, TensorToWrite] = {}
    dropped = set(kind.others)
    for held in kind.state.held:
        names = [natives[storage_key(fragment.data)] for fragment in held.fragments]
        dropped |= set(names)
        first = tensors[names[0]]
        spec = held.spec._replace(dtype=first.spec.dtype)
        same = names == [spec.name] and held.grid == first.spec.shape and len(held.fragments) == 1
        made[spec.name] = TensorToWrite(spec, partial(read, first) if same else partial(assembled, held, spec, values))
    return made | as_saved({name: tensor for name, tensor in tensors.items() if name not in dropped}, read)


def native_tensors_to_write(found: ModelInput, files: ReadBlocks) -> dict[str, TensorToWrite]:
    """The tensors of a model under the names that it has for them in memory, where these are known.

    Memory: the tensor, and one of its files'.
    """
    read, kind, tensors = computing(files, found.computed), found.kind, found.source.tensors
    if kind is None or kind.native.keys() <= tensors.keys() or not kind.hub.keys() <= tensors.keys():
        return as_saved(tensors, read)
    _refuse_computed(kind)
    pieces: dict[int, list[tuple[HeldTensor, Fragment]]] = {}
    for held in kind.state.held:
        for fragment in held.fragments:
            pieces.setdefault(storage_key(fragment.data), []).append((held, fragment))
    made: dict[str, TensorToWrite] = {}
    for native in kind.state.native:
        parts = pieces.get(storage_key(native.fragments[0].data), [])
        if sum(fragment.data.numel() for _, fragment in parts) != native.spec.numel:
            raise ConversionError(
                f"the files of a {kind.name} do not have all of this tensor", path=kind.config, tensor=native.spec.name
            )
        held, fragment = parts[0]
        first = tensors[held.spec.name]
        spec = native.spec._replace(dtype=first.spec.dtype)
        whole = held.grid == held.spec.shape == fragment.data.shape == spec.shape and fragment.data.is_contiguous()
        as_is = whole and len(parts) == 1
        made[spec.name] = TensorToWrite(
            spec, partial(read, first) if as_is else partial(_filled, spec, parts, tensors, read)
        )
    known = kind.hub.keys() | kind.native.keys() | kind.others.keys()
    return made | as_saved({name: tensor for name, tensor in tensors.items() if name not in known}, read)


def as_saved(tensors: Mapping[str, SourceTensor], read: ReadBlocks) -> dict[str, TensorToWrite]:
    """Tensors by name, as they are in their files."""
    return {name: TensorToWrite(tensor.spec, partial(read, tensor)) for name, tensor in tensors.items()}


def computing(read: ReadBlocks, computed: Mapping[str, Computed]) -> ReadBlocks:
    """Reads tensors, and makes those that are ``computed``, by name."""

    def blocks(tensor: SourceTensor) -> Iterator[memoryview]:
        made = computed.get(tensor.spec.name)
        return read(tensor) if made is None else made(read)

    return blocks


class LastFew:
    """Keeps the last few tensors that were made; any thread, which make one at a time."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, Lock()
        self._kept: OrderedDict[object, torch.Tensor] = OrderedDict()

    def get(self, key: object, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor of a key; an old one goes before a new one is made."""
        with self._lock:
            known = self._kept.pop(key, None)
            while len(self._kept) >= self._most:
                self._kept.popitem(last=False)
            self._kept[key] = make() if known is None else known
            return self._kept[key]


def _refuse_computed(kind: ModelClass) -> None:
    if kind.state.groups:
        raise ConversionError(
            f"tensors of the files of a {kind.name} have to be computed from those of the model",
            path=kind.config,
            tensor=kind.state.groups[0].computed.hub[0].name,
            hint="Load the checkpoint into the model, and save it with save_consolidated.",
        )


def assembled(
    held: HeldTensor, spec: TensorSpec, values: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[memoryview]:
    """A tensor of the files, put together from views of the model's, of each of which ``values`` gives the elements."""
    dtype = torch_dtype(spec.dtype)
    if len(held.fragments) == 1 and held.fragments[0].box.sizes == held.grid:
        yield from byte_blocks(values(held.fragments[0].data), dtype)
        return
    whole = torch.empty(held.grid, dtype=dtype)
    for fragment in held.fragments:
        part_in_box(whole, fragment.box).copy_(values(fragment.data))
    yield from byte_blocks(whole, dtype)


def _filled(
    spec: TensorSpec,
    parts: Sequence[tuple[HeldTensor, Fragment]],
    tensors: Mapping[str, SourceTensor],
    read: ReadBlocks,
) -> Iterator[memoryview]:
    """A tensor of the model, whose views are filled from the tensors of the files."""
    whole = torch.empty(max(1, spec.numel), dtype=torch_dtype(spec.dtype))
    for held, fragment in parts:
        source = tensors[held.spec.name]
        saved = read_flat(source.spec, read(source))[: held.spec.numel].view(held.grid)
        bound(fragment.data, whole).copy_(part_in_box(saved, fragment.box))
    yield from byte_blocks(whole[: spec.numel], whole.dtype)
