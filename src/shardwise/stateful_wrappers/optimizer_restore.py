"""Restoring an optimizer in two steps: find out what it would become, which changes nothing, and make it so."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from shardwise.errors import CheckpointNotFoundError, MissingTensorError, MisuseError, ShapeMismatchError
from shardwise.format.dtypes import torch_dtype
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers.kinds import is_foreign, is_like_parameter, kind_of
from shardwise.stateful_wrappers.optimizer import (
    OptimizerRecord,
    OptimizerState,
    Options,
    SavedGroup,
    SavedTensor,
    describe,
    equal,
)
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors

Undo = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Group:
    """A group, and the options that it takes."""

    group: Options
    options: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class _Param:
    """A parameter, and the state that it gets; ``None`` for none. Its tensors are there, the values come later."""

    optimizer: Optimizer
    param: torch.Tensor
    name: str
    state: dict[str, object] | None


@dataclass(frozen=True, slots=True)
class OptimizerRestore:
    """What optimizers are about to become.

    Attributes:
        groups: Every group that takes options.
        params: Every parameter.
        saved_under: Under which other names a parameter's state may be saved.
    """

    groups: tuple[_Group, ...]
    params: tuple[_Param, ...]
    saved_under: Mapping[str, str]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state tensors to be filled, by name."""
        found: dict[str, torch.Tensor] = {}
        for each in self.params:
            for key, value in (each.state or {}).items():
                if isinstance(value, torch.Tensor):
                    found[f"state.{each.name}.{key}"] = value.detach()
        return found

    def keeping(self, names: Collection[str], parameters: Collection[str]) -> OptimizerRestore:
        """The same without state tensors of ``parameters`` that are not among ``names``: this rank saved none."""

        def kept(each: _Param) -> _Param:
            if each.name not in parameters or each.state is None:
                return each
            state = {
                key: value
                for key, value in each.state.items()
                if not isinstance(value, torch.Tensor) or f"state.{each.name}.{key}" in names
            }
            has_any = any(isinstance(value, torch.Tensor) for value in state.values())
            return replace(each, state=state if has_any else None)

        return replace(self, params=tuple(map(kept, self.params)))

    def held_as_saved(self, names: Collection[str]) -> list[HeldTensor]:
        """What this rank holds of the state tensors, under the names of a checkpoint.

        A pipeline stage's own copy of a tied tensor takes the state that the single tensor had, where nothing was
        saved under its own name; so does each of two parameters that were one when the checkpoint was saved.

        Args:
            names: What the checkpoint has.
        """
        keys = {key for each in self.params for key in each.state or ()}
        other = {
            f"state.{name}.{key}": f"state.{tied}.{key}"
            for name, tied in self.saved_under.items()
            for key in sorted(keys)
        }
        return [
            tensor._replace(spec=tensor.spec._replace(name=other[tensor.spec.name]))
            if tensor.spec.name not in names and other.get(tensor.spec.name) in names
            else tensor
            for tensor in held_tensors(self.tensors().items(), MeshRegister())
        ]

    def apply(self) -> Undo:
        """Set the options and put the state's tensors in place, whose values are still to be filled in.

        Returns:
            Puts everything back as it was; possible until the first tensor is filled.
        """
        groups = [(each.group, dict(each.group), _tensor_options(each.group)) for each in self.groups]
        states = [(each, _copy(each.optimizer.state.get(each.param))) for each in self.params]

        @torch.no_grad()
        def undo() -> None:
            for group, options, tensors in groups:
                group.clear()
                group.update(options)
                for key, value in tensors.items():
                    cast(torch.Tensor, group[key]).copy_(value)
            for each, state in states:
                _set_state(each.optimizer, each.param, state)

        try:
            with torch.no_grad():
                for each in self.groups:
                    _set_options(each.group, each.options)
            for param in self.params:
                _set_state(param.optimizer, param.param, param.state)
        except BaseException:
            undo()
            raise
        return undo


def plan_restore(state: OptimizerState, record: OptimizerRecord) -> OptimizerRestore:
    """Compare optimizers with a saved one, and make the memory that they lack. Nothing of theirs is changed. Local.

    Raises:
        CheckpointNotFoundError: A scheduler was saved and no optimizer.
        MissingTensorError: A parameter that was in no group of the saved optimizer.
        MisuseError: The saved optimizer is of another class, or one group's parameters were saved in groups with
            different options.
        ShapeMismatchError: A parameter, or its state, has another shape.
    """
    if not record.groups and any(group["params"] for _, group in state.groups()):
        raise CheckpointNotFoundError(
            "the checkpoint was saved without an optimizer",
            hint="Restore without an optimizer, or choose a checkpoint that has one.",
        )
    group_of = {name: index for index, group in enumerate(record.groups) for name in group.params}
    other = {**record.aliases, **state.saved_under}
    groups: list[_Group] = []
    params: list[_Param] = []
    for position, (optimizer, group) in enumerate(state.groups()):
        names = state.names(group)
        saved_as = [name if name in group_of else other.get(name, name) for name in names]
        saved = _saved_group(record, group_of, saved_as, position)
        if saved is None:
            continue
        members = cast(list[torch.Tensor], group["params"])
        if not members and saved.kind not in ("", kind_of(optimizer)):
            continue  # by the group's number alone, and another optimizer's
        _check_kind(optimizer, saved, record, saved_as, members)
        groups.append(_Group(group, saved.options))
        for param, name, saved_name in zip(members, names, saved_as, strict=True):
            planned = _planned(optimizer, {**group, **saved.options}, param, record, saved_name)
            params.append(_Param(optimizer, param, name, planned))
    return OptimizerRestore(tuple(groups), tuple(params), other)


def _saved_group(
    record: OptimizerRecord, group_of: Mapping[str, int], names: Sequence[str], position: int
) -> SavedGroup | None:
    absent = [name for name in names if name not in group_of]
    if absent:
        raise MissingTensorError(
            f"the saved optimizer did not update {len(absent)} of these parameters: {', '.join(absent[:5])}",
            tensor=absent[0],
            hint="Build the optimizer over the same parameters as when the checkpoint was saved.",
        )
    chosen = sorted({group_of[name] for name in names})
    if not chosen:
        return record.groups[position] if position < len(record.groups) else None
    first = record.groups[chosen[0]]
    for number in chosen[1:]:
        other = record.groups[number]
        if first.kind != other.kind or not equal(first.options, other.options):
            raise MisuseError(
                f"{names[0]} and a parameter of the same group were saved in groups with different options",
                tensor=names[0],
                hint="Build the optimizer with the same parameter groups as when the checkpoint was saved.",
            )
    return first


def _check_kind(
    optimizer: Optimizer,
    saved: SavedGroup,
    record: OptimizerRecord,
    names: Sequence[str],
    members: Sequence[torch.Tensor],
) -> None:
    own = kind_of(optimizer)
    hint = (
        "Build the optimizer that the checkpoint was saved with; or, to go on with another one, leave the optimizer "
        "(and its scheduler) out of what is restored and let it start afresh."
    )
    if saved.kind and names and saved.kind != own:
        raise MisuseError(
            f"the checkpoint's optimizer is {saved.kind} and the one to be restored is {own}",
            tensor=names[0],
            hint=hint,
        )
    if saved.kind or not names:
        return
    keys = {key for name in names for found in (record.tensors, record.values) for key in found.get(name, {})}
    have = {key for param in members for key in optimizer.state.get(param, {})}
    if is_foreign(optimizer, saved.options, keys, have):
        raise MisuseError(
            f"the checkpoint's optimizer is no {own}: it has the state {sorted(keys)} and the options "
            f"{sorted(saved.options)}",
            tensor=names[0],
            hint=hint,
        )


def _planned(
    optimizer: Optimizer, options: Options, param: torch.Tensor, record: OptimizerRecord, name: str
) -> dict[str, object] | None:
    """The state of one parameter as it is to be."""
    shape = record.shapes.get(name)
    if shape is not None and shape != tuple(param.shape):
        raise _misfit(name, param, shape)
    if name not in record.tensors:
        return None
    tensors, values = record.tensors[name], record.values.get(name, {})
    have = optimizer.state.get(param, {})
    state: dict[str, object] = {key: value for key, value in have.items() if key in tensors or key in values}
    for key, saved in tensors.items():
        if saved.shape != tuple(param.shape) and is_like_parameter(optimizer, key):
            raise _misfit(f"state.{name}.{key}", param, saved.shape)
        found = state.get(key)
        if not isinstance(found, torch.Tensor) or describe(found) != saved:
            state[key] = _empty_state(param, saved, options)
    return {**state, **values}


def _misfit(name: str, param: torch.Tensor, saved: tuple[int, ...]) -> ShapeMismatchError:
    return ShapeMismatchError(
        f"the parameter's shape is {list(param.shape)}, the saved optimizer's {list(saved)}",
        tensor=name,
        hint="Build the model from the checkpoint's own config.json.",
    )


def _empty_state(param: torch.Tensor, saved: SavedTensor, group: Options) -> torch.Tensor:
    dtype = torch_dtype(saved.dtype)
    if saved.shape == tuple(param.shape) and saved.shape != ():
        return torch.zeros_like(param.detach(), dtype=dtype, requires_grad=False)
    on_device = bool(group.get("capturable")) or bool(group.get("fused")) or saved.shape != ()
    local = param.to_local() if isinstance(param, DTensor) else param
    return torch.zeros(saved.shape, dtype=dtype, device=local.device if on_device else "cpu")


def _set_options(group: Options, options: Mapping[str, object]) -> None:
    for key, value in options.items():
        have = group.get(key)
        if isinstance(have, torch.Tensor) and isinstance(value, torch.Tensor):
            # A compiled step holds on to a tensor learning rate: keep the object, replace the value.
            have.copy_(value)
        else:
            group[key] = value


def _tensor_options(group: Options) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in group.items() if isinstance(v, torch.Tensor)}


def _copy(state: Mapping[str, object] | None) -> dict[str, object] | None:
    return None if state is None else dict(state)


def _set_state(optimizer: Optimizer, param: torch.Tensor, state: Mapping[str, object] | None) -> None:
    if state is None:
        optimizer.state.pop(param, None)
        return
    kept = optimizer.state[param]
    kept.clear()
    kept.update(state)
