"""The optimizers that hold state: those that were passed, and the optimizers inside of them; and what else they give.

Containers, wrappers (Lookahead, SAM, accelerate's) and torch's ``ZeroRedundancyOptimizer`` have optimizers inside,
which own moments that `Optimizer.state` of the outer one does not show. Optimizers with methods or hooks of their own
may put anything into their state dict. What a `StateHolder` shows of it (its state or options) is saved as such; the
rest is kept under its path, and handed back through the optimizer's own ``load_state_dict``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast, runtime_checkable

import torch
from torch.optim import Optimizer

from shardwise.errors import MisuseError
from shardwise.stateful_wrappers.state_trees import alike, equal
from shardwise.upstream.torch_modules import STATE_HOOKS
from shardwise.upstream.torch_tensors import local_part

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
    state, groups = getattr(value, "state", None), getattr(value, "param_groups", None)
    if isinstance(value, Optimizer) or (isinstance(state, Mapping) and isinstance(groups, list)):
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


# --- what a state dict has beside the holders' state ------------------------------------------------------------------


#: A step into a state dict: ``("key", key)``, ``("item", number)``, or ``("parameter", name)`` for a packed number.
Step = tuple[str, object]
Path = tuple[Step, ...]
NameOf = Callable[[torch.Tensor], str]


def makes_or_loads_custom(
    optimizer: AnyOptimizer,
    methods: Sequence[str] = ("state_dict", "load_state_dict"),
    hooks: Sequence[str] = STATE_HOOKS,
) -> bool:
    """Whether an optimizer makes or loads its state dict in another way than torch's class does."""
    if is_zero(optimizer) or is_shell(optimizer):
        return False
    if not isinstance(optimizer, Optimizer):
        return True
    own = vars(optimizer)
    # torch.compile and torch's own profiling wrap the methods of its class.
    overridden = (m in own or getattr(type(optimizer), m) is not getattr(Optimizer, m) for m in methods)
    return any(overridden) or any(own.get(name) for name in hooks)


class StateView:
    """The state dict of an optimizer as it was passed, beside the holders that keep state in it."""

    def __init__(self, optimizer: AnyOptimizer, holders: Sequence[StateHolder], name_of: NameOf) -> None:
        self.optimizer = optimizer
        self._holders, self._name_of = holders, name_of
        self._shown: set[int] = set()  # identities of containers and tensors that holders show
        self._entries: dict[int, StateHolder] = {}
        self._named: dict[str, tuple[StateHolder, torch.Tensor]] = {}
        for holder in holders:
            self._shown.add(id(holder.optimizer.state))
            for state in holder.optimizer.state.values():
                self._shown.add(id(state))
                self._entries[id(state)] = holder
                self._shown.update(map(id, _tensors(state)))
            for group in holder.groups():
                for param in members(group):
                    self._named.setdefault(name_of(param), (holder, param))

    def rest(self) -> list[tuple[Path, object]]:
        """The largest parts of the state dict that no holder shows, with their paths."""
        return list(self._rest(self._given(), ()))

    def _given(self) -> object:
        try:
            return self.optimizer.state_dict()
        except Exception as error:
            raise MisuseError(
                f"{type(self.optimizer).__name__}.state_dict() fails with {type(error).__name__}: {error}",
                hint="A wrapper of optimizers has to give its state, or pass the optimizer inside of it.",
            ) from error

    def _rest(self, value: object, path: Path) -> Iterator[tuple[Path, object]]:
        if id(value) in self._shown or (isinstance(value, (Mapping, list, tuple)) and not value):
            return
        if isinstance(value, Mapping):
            holder = self._packed_by(value)
            if holder is not None:
                yield from self._rest_of_packed(value, holder, path)
                return
            entries: list[tuple[Step, object]] = [
                (("parameter", self._name_of(key)) if isinstance(key, torch.Tensor) else ("key", key), each)
                for key, each in value.items()
                if not self._is_flat(key, each)
            ]
            yield from self._largest(value, entries, path)
        elif isinstance(value, (list, tuple)):
            yield from self._largest(value, [(("item", n), each) for n, each in enumerate(value)], path)
        else:
            yield path, value

    def _largest(
        self, value: Mapping[object, object] | Sequence[object], entries: list[tuple[Step, object]], path: Path
    ) -> Iterator[tuple[Path, object]]:
        """The parts of a container that are not shown; the container itself where nothing in it is."""
        parts = [(step, list(self._rest(each, (*path, step)))) for step, each in entries]
        by_itself = all(found == [((*path, step), found[0][1])] if found else False for step, found in parts)
        whole = by_itself and len(parts) == len(value) and all(step[0] != "parameter" for step, _ in parts)
        if whole and path:
            yield path, value
            return
        for _, found in parts:
            yield from found

    def _is_flat(self, key: object, value: object) -> bool:
        """Whether an entry of a flattened state dict (torch.distributed.checkpoint.state_dict) is a holder's."""
        if not isinstance(key, str):
            return False
        for prefix in ("state.", "param_groups."):
            if not key.startswith(prefix):
                continue
            name, _, option = key.removeprefix(prefix).rpartition(".")
            found = self._named.get(name)
            if found is None:
                return False
            holder, param = found
            if prefix == "state.":
                state = holder.optimizer.state.get(param, {})
                return option in state and _is_same(state[option], value)
            group = next(g for g in holder.groups() if any(p is param for p in members(g)))
            return option in group and equal(group[option], value)
        return False

    def _packed_by(self, value: Mapping[object, object]) -> StateHolder | None:
        """The holder whose packed state dict this is, as torch's class makes it."""
        groups = value.get("param_groups")
        if not isinstance(groups, list) or not isinstance(value.get("state"), Mapping):
            return None
        if not all(isinstance(group, Mapping) and "params" in group for group in groups):
            return None
        sizes = [len(cast(Sequence[object], group["params"])) for group in groups]
        fitting = [k for k in self._holders if [len(members(group)) for group in k.groups()] == sizes]
        state = cast(Mapping[object, object], value["state"])
        owners = [self._entries[id(each)] for each in state.values() if id(each) in self._entries]
        given = set(map(id, _tensors(state)))
        owners += [k for k in fitting if any(id(t) in given for t in _tensors(k.optimizer.state))]
        for holder in [*owners, *fitting]:
            pairs = zip(groups, holder.groups(), strict=True) if holder in fitting else ()
            alike = (equal(v, own.get(k)) for group, own in pairs for k, v in group.items() if k != "params")
            if holder in fitting and (owners or all(alike)):
                return holder
        return fitting[0] if len(fitting) == 1 else None

    def _rest_of_packed(
        self, value: Mapping[object, object], holder: StateHolder, path: Path
    ) -> Iterator[tuple[Path, object]]:
        numbers = self._numbers(value, holder)
        states = cast(Mapping[object, object], holder.optimizer.state)
        for key, each in value.items():
            if key == "state":
                for number, state in cast(Mapping[object, object], each).items():
                    param = numbers.get(number) if isinstance(number, int) else None
                    step: Step = ("key", number) if param is None else ("parameter", self._name_of(param))
                    own = states.get(number if param is None else param, {})
                    yield from self._rest_of_entry(state, own, (*path, ("key", key), step))
            elif key == "param_groups":
                pairs = zip(cast(Sequence[Mapping[str, object]], each), holder.groups(), strict=True)
                for n, (group, own_group) in enumerate(pairs):
                    for option, given in group.items():
                        is_own = option in own_group and equal(own_group[option], given)
                        if not is_own and option not in ("params", "param_names"):
                            yield (*path, ("key", key), ("item", n), ("key", option)), given
            else:
                yield from self._rest(each, (*path, ("key", key)))

    def _rest_of_entry(self, state: object, own: object, path: Path) -> Iterator[tuple[Path, object]]:
        if id(state) in self._shown or _is_same(state, own):
            return
        if not isinstance(state, Mapping) or not isinstance(own, Mapping):
            yield path, state
            return
        for key, each in state.items():
            if key not in own or not _is_same(own[key], each):
                yield (*path, ("key", key)), each

    def _numbers(self, value: Mapping[object, object], holder: StateHolder) -> dict[int, torch.Tensor]:
        groups = cast(Sequence[Mapping[str, Sequence[int]]], value["param_groups"])
        pairs = zip(groups, holder.groups(), strict=True)
        return {
            number: param
            for group, own in pairs
            for number, param in zip(group["params"], members(own), strict=True)
            if isinstance(number, int)
        }

    def take(self, rest: Sequence[tuple[Path, object]]) -> None:
        """Hand the rest back, with what the holders have by now around it. The optimizer's own code may raise."""
        if not rest and not makes_or_loads_custom(self.optimizer, ("load_state_dict",), STATE_HOOKS[2:]):
            return
        found = copied(self._given())
        for path, value in rest:
            self._put(found, path, value)
        self.optimizer.load_state_dict(cast(dict[str, object], found))

    def _put(self, found: object, path: Path, value: object) -> None:
        place = found
        numbers: dict[str, object] = {}
        for position, (kind, step) in enumerate(path):
            is_last = position == len(path) - 1
            if isinstance(place, Mapping):
                holder = self._packed_by(place)
                if holder is not None:
                    packed = self._numbers(place, holder)
                    numbers = {self._name_of(param): number for number, param in packed.items()}
            at: object = step
            if kind == "parameter":
                keys = [key for key in cast(Mapping[object, object], place) if isinstance(key, torch.Tensor)]
                at = next((key for key in keys if self._name_of(key) == step), numbers.get(str(step), step))
            if isinstance(place, list) and isinstance(at, int):
                if at > len(place):
                    raise _refused(self.optimizer, path)
                place.extend([{}] * (at == len(place)))
                place[at] = value if is_last else place[at]
                place = place[at]
            elif isinstance(place, dict):
                place[at] = value if is_last else place.get(at, {})
                place = place[at]
            else:
                raise _refused(self.optimizer, path)


def _refused(optimizer: AnyOptimizer, path: Path) -> MisuseError:
    text = ".".join(str(step) for _, step in path)
    return MisuseError(
        f"the saved {type(optimizer).__name__} has {text!r}, for which the one to be restored has no place",
        hint="Build the optimizer as it was when the checkpoint was saved.",
    )


def copied(value: object, leaf: Callable[[object], object] = lambda each: each) -> object:
    """New containers, with what ``leaf`` makes of everything that is none."""
    if isinstance(value, dict):
        new = {key: copied(each, leaf) for key, each in value.items()}
        if type(value) is dict:
            return new
        other = value.copy()
        other.update(new)
        return other
    if type(value) is list:
        return [copied(each, leaf) for each in value]
    return tuple(copied(each, leaf) for each in value) if type(value) is tuple else leaf(value)


def cloned(value: object) -> object:
    """As `copied`, with cloned tensors."""
    return copied(value, lambda each: each.detach().clone() if isinstance(each, torch.Tensor) else each)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _is_same(a: object, b: object) -> bool:
    """Whether two are the same tensor, or equal values of one type; containers of such."""
    return alike(a, b, _is_same_tensor, lambda x, y: type(x) is type(y) and bool(x == y))


def _is_same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b:
        return True
    x, y = local_part(a), local_part(b)
    if not x.layout == y.layout == torch.strided:  # a sparse one has no strides, and no one address
        return False
    same_form = (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
    return same_form and x.data_ptr() == y.data_ptr()
