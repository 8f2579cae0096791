"""Looking at torch's operations while they run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch._ops import OpOverload as OpOverload  # noqa: PLC0414
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # noqa: PLC0414
from torch.utils._pytree import tree_map

#: Namespaces of the operations that send messages between ranks.
MESSAGES = frozenset({"c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd"})

#: Operations of torch's own that give the same elements in another shape, and those that give them once more.
RESHAPES = (torch.ops.aten._unsafe_view.default, torch.ops.aten._reshape_alias.default)
COPIES = (torch.ops.aten._to_copy.default,)

#: Containers as a tree has them, with a function applied to everything that is no container.
map_leaves: Callable[[Callable[[Any], object], object], Any] = tree_map


def operation_name(operation: OpOverload) -> str:
    """An operation's name without its namespace and overload: ``normal_``."""
    return str(operation._schema.name).partition("::")[2]


def without_memory() -> AbstractContextManager[object]:
    """While active, tensors that are made or loaded have shapes and no memory, on whatever device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return cast("AbstractContextManager[object]", FakeTensorMode())


def place_in_archive(tensor: torch.Tensor) -> int | None:
    """Offset in bytes at which ``torch.load`` found a tensor's storage, of a tensor loaded inside `without_memory`."""
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    return start if isinstance(start, int) else None
