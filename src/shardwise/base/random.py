"""Random initial values that depend on the seed and the tensor's name, and not on how the tensor is spread."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from shardwise.peft.tensors import seed_of
from shardwise.plan.fragments import Fragment, part_in_box
from shardwise.stateful_wrappers.memory import PLAIN, plain_memory, stands_for_memory
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensor
from shardwise.upstream.torch_dispatch import OpOverload, TorchDispatchMode, operation_name
from shardwise.upstream.torch_tensors import local_part

_RANDOM = frozenset({"normal_", "uniform_", "bernoulli_", "random_", "exponential_", "cauchy_", "log_normal_"})
#: Elements drawn at a time; a rank draws only the blocks that contain its own rows of a tensor.
BLOCK_ELEMENTS = 2**20


class SeededInit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, in-place random functions on known tensors draw the same values on every topology.

    Each draw is cut into blocks of rows of the whole tensor, and each block has a generator seeded from the seed, the
    tensor's name, how often it has been drawn, and the block's number. Draws are made on the CPU, so devices agree too.
    Tensors whose names are to be kept are left as they are: what is about to be loaded.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], seed: int, keep: Collection[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._keep = frozenset(keep)
        self._names = {place: name for name, tensor in tensors.items() if (place := _place(tensor)) is not None}
        self._drawn: dict[str, int] = {}
        self._padding: dict[int, int] = {}

    def with_padding(self, module: nn.Module) -> SeededInit:
        """Let embeddings' padding rows be zeroed in place though the embedding is spread over ranks."""
        for inner in module.modules():
            index = getattr(inner, "padding_idx", None)
            if isinstance(inner, nn.Embedding) and isinstance(index, int) and isinstance(inner.weight, DTensor):
                self._padding[id(local_part(inner.weight))] = index
        return self

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        tensor = args[0] if args else None
        if not isinstance(tensor, torch.Tensor):
            return func(*args, **kwargs)
        operation = operation_name(func)
        if operation in _RANDOM and kwargs.get("generator") is None:
            name = self._names.get(_place(tensor) or ("", 0))
            if name is not None:
                if name not in self._keep:
                    self._draw(name, tensor, func, args[1:], kwargs)
                return tensor
        if operation == "select" and isinstance(tensor, DTensor) and args[1] == 0:
            index = self._padding.get(id(local_part(tensor)))
            if index is not None and args[2] == index:
                return _own_row(tensor, index)
        return func(*args, **kwargs)

    def _draw(
        self, name: str, tensor: torch.Tensor, func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> None:
        count = self._drawn[name] = self._drawn.get(name, 0) + 1
        where = "" if isinstance(tensor, DTensor) else f"{tensor.storage_offset()}"
        key = f"{self._seed}/{name}/{where if where != '0' else ''}/{count}"
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        rest = {k: v for k, v in kwargs.items() if k != "generator"}
        for fragment in held_tensor(name, tensor, MeshRegister()).fragments:
            for block_key, shape, part in _blocks(key, tuple(tensor.shape), fragment):
                drawn = torch.empty(shape, dtype=dtype)
                func(drawn, *args, **rest, generator=torch.Generator().manual_seed(seed_of(block_key)))
                part.data.copy_(part_in_box(drawn, part.box))


def _place(tensor: torch.Tensor) -> tuple[str, int] | None:
    """Where a tensor's storage is; ``None`` for one without memory."""
    local = local_part(tensor)
    if local.numel() == 0 or local.device.type == "meta":
        return None
    if type(local) not in PLAIN:  # a wrapper's own storage is nowhere
        if not stands_for_memory(local):
            return None
        local = plain_memory("", local)
    return (str(local.device), local.untyped_storage().data_ptr())


def _blocks(key: str, shape: tuple[int, ...], part: Fragment) -> Iterator[tuple[str, tuple[int, ...], Fragment]]:
    """Cut a fragment at the borders of blocks: key and shape of each block, and the part of the fragment in it."""
    if part.box.numel == 0:
        return
    if not shape:
        yield key, shape, part
        return
    low, high = part.box.offsets[0], part.box.ends[0]
    row = 1
    for n in shape[1:]:
        row *= n
    if row > BLOCK_ELEMENTS and len(shape) > 2:
        for index in range(low, high):
            inner = type(part.box)(part.box.offsets[1:], part.box.sizes[1:])
            yield from _blocks(f"{key}/{index}", shape[1:], Fragment(inner, part.data[index - low]))
        return
    rows = max(1, BLOCK_ELEMENTS // max(row, 1))
    for first in range(low // rows * rows, high, rows):
        begin, end = max(low, first), min(high, first + rows)
        box = type(part.box)((begin - first, *part.box.offsets[1:]), (end - begin, *part.box.sizes[1:]))
        size = min(rows, shape[0] - first)
        yield f"{key}:{first}", (size, *shape[1:]), Fragment(box, part.data[begin - low : end - low])


def _own_row(tensor: DTensor, index: int) -> torch.Tensor:
    """This rank's part of a row, in place; where the row is another rank's, memory that nobody reads."""
    for fragment in held_tensor("row", tensor, MeshRegister()).fragments:
        low = fragment.box.offsets[0]
        if low <= index < fragment.box.ends[0]:
            return fragment.data[index - low]
    return local_part(tensor).new_empty(tensor.shape[1:])
