"""Whether a model still consists of the same tensors, without listing them again.

Listing a model's state takes torch and this library several microseconds for each tensor, at every save. A snapshot
compares the dictionaries in which modules keep their tensors, which is faster by an order of magnitude, and gives up
where a module overrides how its state is made. It is compared at every save, so it is kept in flat lists that the
interpreter walks by itself. For 40,000 modules of one parameter each listing took 0.37 s
and the look 0.05 s, of the 0.3 s that planning a later save may take (`benchmarks/run.py plan`, on a busy machine).
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from itertools import chain, compress, filterfalse
from operator import attrgetter, is_, itemgetter
from typing import NoReturn, TypeAlias

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from shardwise.stateful_wrappers.memory import PLAIN, identity
from shardwise.stateful_wrappers.wrapping import unwrap
from shardwise.upstream.torch_modules import other_stores_in, own_buffers, parameters_in, unsaved_buffers
from shardwise.upstream.torch_tensors import local_in, local_part

_Kept: TypeAlias = dict[str, object]

_SHAPE = attrgetter("shape")
_DTYPE = attrgetter("dtype")
_BUFFERS = itemgetter(1)


class _DifferentTensorsError(Exception):
    """Dictionaries that are compared have different tensors under one key."""


class _ByIdentity(TorchFunctionMode):
    """Dictionaries are compared by what they hold, but tensors are never compared by their values.

    Python asks for equality only where two values are not the same object.
    """

    def __torch_function__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> NoReturn:
        raise _DifferentTensorsError


class Memory:
    """Remembers tensors, which it keeps alive, where they lie on this rank, and how their memory is read."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        self._plain: list[torch.Tensor] = []
        self._sharded: list[torch.Tensor] = []
        wrappers: list[torch.Tensor] = []
        for tensor in tensors:
            local = local_part(tensor) if isinstance(tensor, DTensor) else None
            if local is not None:
                self._sharded.append(tensor)
            if type(local if local is not None else tensor) not in PLAIN:
                wrappers.append(tensor)
            elif local is None:
                self._plain.append(tensor)
        # A wrapper's inner tensors may be replaced. Keeping the current ones alive keeps their addresses taken.
        self._wrappers = [(tensor, tensor.detach(), identity(tensor)) for tensor in wrappers]
        # A DTensor's local tensor is a separate object, whose dtype and layout are never changed in place.
        self._locals = list(map(local_in, self._sharded))
        # Reading strides takes as long as all the rest; those of a contiguous tensor follow from its shape.
        self._strided = [tensor for tensor in self._plain if not tensor.is_contiguous()]
        # A real tensor is never a conjugate.
        self._complex = [tensor for tensor in (*self._plain, *self._locals) if tensor.is_complex()]
        self._places = self._now()

    def _now(self) -> tuple[object, ...]:
        """All addresses, and for tensors whose memory may be replaced in place, how it is read."""
        return (
            list(map(torch.Tensor.data_ptr, self._plain)),
            list(map(torch.Tensor.data_ptr, self._locals)),
            list(map(_DTYPE, self._plain)),
            list(map(torch.Tensor.is_contiguous, self._plain)),
            list(map(_SHAPE, self._plain)),
            list(map(torch.Tensor.stride, self._strided)),
            list(map(torch.Tensor.is_neg, self._plain)),
            list(map(torch.Tensor.is_conj, self._complex)),
        )

    @property
    def unmoved(self) -> bool:
        """Whether the tensors still have the memory, the dtypes, the shapes and the strides that they had."""
        return (
            all(map(is_, map(local_in, self._sharded), self._locals))
            and self._now() == self._places
            and all(identity(tensor) == known for tensor, _, known in self._wrappers)
        )

    def is_of(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether ``tensors`` are these, at their addresses."""
        return len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors)) and self.unmoved


class Snapshot:
    """Remembers a model's modules, which keep their state in torch's own way, and the memory of their tensors.

    ``is_plain`` says whether dictionaries show all that may change; otherwise the snapshot never holds.
    """

    def __init__(self, parts: Sequence[nn.Module], memory: Memory, modules: Sequence[nn.Module]) -> None:
        self._parts = [unwrap(part) for part in parts]
        self._memory = memory
        self._forgotten: list[Sized] = []
        self.is_plain = True
        self._modules = list(map(vars, modules))
        self._parameters = list(map(dict, map(parameters_in, self._modules)))
        each: list[tuple[_Kept, ...]] = list(map(other_stores_in, self._modules))
        kept = list(chain.from_iterable(each))
        self._full, self._empty = list(filter(None, kept)), list(filterfalse(None, kept))
        # Without buffers it does not matter which of them would be kept.
        for module in compress(modules, map(_BUFFERS, each)):
            if not unsaved_buffers(module):
                self._forgotten.append(unsaved_buffers(module))
            elif own_buffers(module).keys() - unsaved_buffers(module):
                self.is_plain = False
        values = chain.from_iterable(map(dict.values, chain(self._parameters, self._full)))
        if any(map(_defines_equality, {*map(type, modules), *map(type, values)})):
            self.is_plain = False
        # Equal if they have the same keys with the very same values.
        self._known = list(map(dict, self._full))
        self._ordered = [(kept, list(kept)) for kept in self._full if len(kept) > 1]
        self._several = [
            (own, list(of)) for own, of in zip(self._modules, self._parameters, strict=True) if len(of) > 1
        ]

    def holds(self, parts: Sequence[nn.Module]) -> bool:
        """Whether ``parts`` are the same, with the same modules and tensors at the same addresses."""
        if not self.is_plain or len(parts) != len(self._parts):
            return False
        return (
            all(unwrap(part) is known for part, known in zip(parts, self._parts, strict=True))
            and not any(self._empty)
            and not any(self._forgotten)
            and self._has_the_same()
            and all(list(kept) == keys for kept, keys in self._ordered)
            and all(list(parameters_in(own)) == keys for own, keys in self._several)
            and self._memory.unmoved
        )

    def _has_the_same(self) -> bool:
        """Whether the dictionaries have the very same under the same keys.

        Those of parameters are looked up again: libraries that manage parameters put dictionaries of their own there.
        """
        try:
            with _ByIdentity():
                return list(map(parameters_in, self._modules)) == self._parameters and self._full == self._known
        except _DifferentTensorsError:
            return False


def _defines_equality(cls: type) -> bool:
    """Whether modules or tensors of a class may be equal without being the same."""
    return issubclass(cls, nn.Module | torch.Tensor) and cls.__eq__ not in (object.__eq__, torch.Tensor.__eq__)
