"""The optimizers that hold state: those that were passed, and the optimizers inside of them.

Containers, wrappers (Lookahead, SAM, accelerate's) and torch's ``ZeroRedundancyOptimizer`` have optimizers inside,
which own moments that `Optimizer.state` of the outer one does not show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast, runtime_checkable

import torch
from torch.optim import Optimizer

from shardwise.errors import MisuseError

Options = dict[str, object]
_DEPTH = 4


@runtime_checkable
class StatefulOptimizer(Protocol):
    """An optimizer that is not a `torch.optim.Optimizer` but has its two methods."""

    def state_dict(self) -> dict[str, object]:
        """The state."""

    def load_state_dict(self, state_dict: dict[str, object]) -> object:
        """Take the state in."""


AnyOptimizer = Optimizer | StatefulOptimizer


@dataclass(frozen=True, slots=True)
class StateHolder:
    """An optimizer that holds state by parameter, and parameter groups."""

    optimizer: Optimizer  #: A `torch.optim.Optimizer`, or what has ``state`` and ``param_groups`` as one.
    slot: str  #: Empty; the class's name where it is around another holder of the same parameters.
    #: An outer optimizer's groups with the same options (those of ``ZeroRedundancyOptimizer``, whose inner one has this
    #: rank's parameters alone).
    mirrors: tuple[Options, ...]
    passed: int  #: Number of the argument that it is, or is inside of.
    ancestors: frozenset[int] = frozenset()  #: The optimizers that it is inside of, by identity.

    @property
    def kind(self) -> str:
        """Name of its class."""
        return type(self.optimizer).__name__

    def groups(self) -> list[Options]:
        """Its groups."""
        return self.optimizer.param_groups


def members(group: Options) -> list[torch.Tensor]:
    """A group's parameters."""
    return cast(list[torch.Tensor], group["params"])


def find_state_holders(passed: Sequence[AnyOptimizer], names: Mapping[int, str]) -> list[StateHolder]:
    """All state holders in the optimizers that were passed, the innermost first.

    ``names`` are the parameters', by identity. Two optimizers, neither of which is inside the other, may not update one
    parameter.
    """
    found: list[StateHolder] = []
    for number, each in enumerate(passed):
        found += _state_holders(each, number, frozenset(), set(), 0)
    return _with_slots(found, names)


def _state_holders(
    value: object, number: int, around: frozenset[int], seen: set[int], depth: int
) -> Iterator[StateHolder]:
    if id(value) in seen or depth > _DEPTH:
        return
    seen.add(id(value))
    if is_zero(value):
        inner = getattr(value, "optim", None)
        if not isinstance(inner, Optimizer):
            raise MisuseError(
                "a ZeroRedundancyOptimizer has no inner optimizer yet, which keeps its state",
                hint="With overlap_with_ddp=True it is built in the first iterations: save and restore after them.",
            )
        mirrors = tuple(cast(Optimizer, value).param_groups)
        yield StateHolder(inner, "", mirrors, number, around | {id(value)})
        return
    if is_shell(value):
        yield from _state_holders(vars(value)["optimizer"], number, around, seen, depth)
        return
    inside = around | {id(value)}
    own = vars(value) if hasattr(value, "__dict__") else {}
    # Not in what has an entry for each parameter.
    for each in _inside({key: kept for key, kept in own.items() if key not in ("state", "param_groups")}, 0):
        yield from _state_holders(each, number, inside, seen, depth + 1)
    if _keeps_state(value):
        yield StateHolder(cast(Optimizer, value), "", (), number, around)


def _inside(value: object, depth: int) -> Iterator[object]:
    """Optimizers in an object's attributes, or in lists and dictionaries there."""
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    for each in values:
        if _is_optimizer(each):
            yield each
        elif depth < 2 and isinstance(each, (dict, list, tuple)):
            yield from _inside(each, depth + 1)


def _is_optimizer(value: object) -> bool:
    if isinstance(value, Optimizer):
        return True
    if isinstance(value, (torch.nn.Module, torch.Tensor, type)) or not hasattr(value, "__dict__"):
        return False
    has_state = hasattr(type(value), "state_dict") and hasattr(type(value), "load_state_dict")
    return has_state and (hasattr(value, "param_groups") or any(True for _ in _inside(vars(value), 1)))


def _keeps_state(value: object) -> bool:
    if isinstance(value, Optimizer):
        return True
    state, groups = getattr(value, "state", None), getattr(value, "param_groups", None)
    return isinstance(state, Mapping) and isinstance(groups, list)


def is_zero(value: object) -> bool:
    """Whether an optimizer is torch's ``ZeroRedundancyOptimizer``, whose inner one has the states of this rank."""
    return isinstance(value, Optimizer) and any(
        base.__name__ == "ZeroRedundancyOptimizer" and base.__module__.startswith("torch.distributed.optim")
        for base in type(value).__mro__
    )


def is_shell(value: object) -> bool:
    """Whether an optimizer passes everything on to the one inside, as accelerate's and transformers' wrappers do."""
    inner = vars(value).get("optimizer") if hasattr(value, "__dict__") else None
    return isinstance(inner, Optimizer) and type(value).__module__.partition(".")[0] == "accelerate"


def _with_slots(holders: Sequence[StateHolder], names: Mapping[int, str]) -> list[StateHolder]:
    """Give each holder of the same parameters its own slot, where one is inside the other."""
    owner: dict[int, list[StateHolder]] = {}
    found: list[StateHolder] = []
    for holder in holders:
        params = [id(param) for group in holder.groups() for param in members(group)]
        others = {id(k): k for param in params for k in owner.get(param, ())}
        for other in others.values():
            if id(holder.optimizer) not in other.ancestors:
                first, second = other.kind, holder.kind
                which = f"two optimizers ({first} and {second})" if first != second else f"two {first} optimizers"
                raise MisuseError(
                    f"{which} update one parameter, which has one state in a checkpoint",
                    tensor=names.get(next(p for p in params if any(k is other for k in owner.get(p, ())))),
                    hint="Give each parameter to one optimizer; pass each optimizer once.",
                )
        slot = ""
        if others:
            used = {other.slot for other in others.values()}
            slot = holder.kind if holder.kind not in used else f"{holder.kind}.{len(used)}"
        new = replace(holder, slot=slot)
        found.append(new)
        for param in params:
            owner.setdefault(param, []).append(new)
    return found
