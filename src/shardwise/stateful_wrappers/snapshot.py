"""Whether a model still consists of the very tensors that it had, without listing them anew.

Listing a model's state takes torch and this library about 15 microseconds for each tensor, at every save. A snapshot
looks at the dictionaries in which modules keep what they have, which is faster by an order of magnitude, and gives up
where a module makes its state in a way of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
from torch import nn

from shardwise.stateful_wrappers.names import unwrap

_Kept: TypeAlias = "dict[str, object] | dict[int, object]"
#: Address and shape.
Place: TypeAlias = tuple[int, torch.Size]


class _Sized(Protocol):
    def __len__(self) -> int: ...


class Snapshot:
    """Remembers a model's modules and where its tensors lie.

    Args:
        parts: The model's parts.
        tensors: Their tensors.

    Attributes:
        is_plain: Whether all modules keep their state in torch's own way; otherwise the snapshot never holds.
    """

    def __init__(self, parts: Sequence[nn.Module], tensors: Sequence[torch.Tensor]) -> None:
        self._parts = [unwrap(part) for part in parts]
        self._tensors = list(tensors)
        self._places = [place_of(tensor) for tensor in self._tensors]
        self._modules = [module for part in self._parts for module in part.modules()]
        self._empty: list[_Sized] = []
        self._full: list[tuple[_Kept, tuple[object, ...], list[int]]] = []
        self.is_plain = all(_is_plain(module) for module in self._modules)
        for module in self._modules if self.is_plain else ():
            for kept in _dictionaries(module):
                if kept:
                    self._full.append((kept, tuple(kept), list(map(id, kept.values()))))
                else:
                    self._empty.append(kept)
            if not module._non_persistent_buffers_set:
                self._empty.append(module._non_persistent_buffers_set)
            else:
                self.is_plain = self.is_plain and not module._buffers.keys() - module._non_persistent_buffers_set

    def holds(self, parts: Sequence[nn.Module]) -> bool:
        """Whether ``parts`` are the same, with the same modules and tensors at the same addresses."""
        if not self.is_plain or len(parts) != len(self._parts):
            return False
        return (
            all(unwrap(part) is known for part, known in zip(parts, self._parts, strict=True))
            and not any(self._empty)
            and all(tuple(kept) == keys and list(map(id, kept.values())) == ids for kept, keys, ids in self._full)
            and [place_of(tensor) for tensor in self._tensors] == self._places
        )


def _dictionaries(module: nn.Module) -> tuple[_Kept, ...]:
    return (
        module._modules,
        module._parameters,
        module._buffers,
        module._state_dict_hooks,
        module._state_dict_pre_hooks,
    )  # type: ignore[return-value]


def _is_plain(module: nn.Module) -> bool:
    """Whether the module's state is its parameters and persistent buffers, by torch's own code."""
    cls = type(module)
    own = ("state_dict", "_save_to_state_dict", "get_extra_state")
    hooks = [*module._state_dict_hooks.values(), *module._state_dict_pre_hooks.values()]
    return (
        all(getattr(cls, name) is getattr(nn.Module, name) for name in own)
        and not any(name in vars(module) for name in own)
        # FSDP2's hook puts sharded parameters back in place, which shows in the modules before it runs.
        and all(getattr(hook, "__module__", "").startswith("torch.distributed.fsdp.") for hook in hooks)
    )


def place_of(tensor: torch.Tensor) -> Place:
    """Where this rank's memory of a tensor lies (0 on the meta device), and its shape."""
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return (0 if local.is_meta else local.data_ptr(), local.shape)
