"""Restoring an optimizer in two steps: plan, which changes nothing, and apply."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, cast

import torch
from torch.optim import Optimizer

from shardwise.errors import (
    CheckpointNotFoundError,
    MissingTensorError,
    MisuseError,
    ShapeMismatchError,
    StateFormatError,
)
from shardwise.plan.fragments import HeldTensor
from shardwise.stateful_wrappers.inner_optimizers import (
    Options,
    Path,
    StateHolder,
    StateView,
    cloned,
    makes_or_loads_custom,
    members,
)
from shardwise.stateful_wrappers.optimizer import Entry, OptimizerRecord, OptimizerState, SavedGroup, label_of
from shardwise.stateful_wrappers.state_trees import Place, SavedTensor, TreeReader, equal, make
from shardwise.stateful_wrappers.tensors import MeshRegister, held_tensors
from shardwise.upstream.torch_tensors import local_part

#: The state that torch's optimizers keep of a parameter. All have its shape, except `_OF_NO_SHAPE`.
#: Source: the `step` methods in `torch.optim`. A class that is not listed here is judged by its options alone.
_STATE_KEYS = {
    "ASGD": {"ax", "eta", "mu"},
    "Adadelta": {"square_avg", "acc_delta"},
    "Adagrad": {"sum"},
    "Adam": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "AdamW": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "Adamax": {"exp_avg", "exp_inf"},
    "NAdam": {"exp_avg", "exp_avg_sq", "mu_product"},
    "RAdam": {"exp_avg", "exp_avg_sq"},
    "RMSprop": {"square_avg", "momentum_buffer", "grad_avg"},
    "Rprop": {"prev", "step_size"},
    "SGD": {"momentum_buffer"},
}
_OF_NO_SHAPE = {"eta", "mu", "mu_product"}
#: Counts steps in nearly every class, and so identifies none.
_COMMON = {"step"}
#: Options that choose the implementation, not the result; a release of torch may add some.
_FLAGS = {"foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"}

Undo = Callable[[], None]
Rest = list[tuple[Path, object]]


class _Param(NamedTuple):
    """A parameter, and the state that it gets; ``None`` for none. Its tensors are there, the values come later."""

    optimizer: Optimizer
    param: torch.Tensor
    name: str
    state: dict[object, object] | None
    label: str = ""  #: What the files call the state.
    tensors: tuple[str, ...] = ()  #: Names of its tensors in the files.


class _Own(NamedTuple):
    """An optimizer with its own ``state_dict``, and the entries of it beside its holders' state."""

    view: Callable[[], StateView]
    kind: str
    rest: Rest


@dataclass(slots=True)
class OptimizerRestore:
    """A plan for optimizers."""

    #: Every group that takes options, and these.
    groups: list[tuple[Options, Mapping[str, object]]] = field(default_factory=list)
    params: list[_Param] = field(default_factory=list)
    #: An optimizer, and its state under keys that are no parameters.
    keyed: list[tuple[Optimizer, Mapping[object, object]]] = field(default_factory=list)
    own: list[_Own] = field(default_factory=list)  #: Optimizers that load their state by their own code.
    #: Tensors to fill, under the names of the checkpoint.
    targets: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    #: Names of parameters that the saved optimizer did not update, which start without state.
    fresh: list[str] = field(default_factory=list)
    params_of: dict[str, str] = field(default_factory=dict)  #: Name of a saved tensor -> whose state it is.

    def keep(self, names: Collection[str], parameters: Collection[str]) -> None:
        """Drop state tensors of ``parameters`` that are not among ``names``: this rank saved none."""
        dropped = {name for name, _ in self.targets if self.params_of.get(name) in parameters and name not in names}
        for number, each in enumerate(self.params):
            lost = dropped.intersection(each.tensors)
            if each.state is not None and lost:
                rest = {key: v for key, v in each.state.items() if f"state.{each.label}.{key}" not in lost}
                self.params[number] = each._replace(state=rest if len(lost) < len(each.tensors) else None)
        self.targets = [(name, tensor) for name, tensor in self.targets if name not in dropped]

    def held_as_saved(self) -> list[HeldTensor]:
        """This rank's parts of the state tensors, under the names of the checkpoint.

        A pipeline stage's own copy of a tied tensor takes the state that the single tensor had, where nothing was
        saved under its own name; so does each of two parameters that were one when the checkpoint was saved.
        """
        return held_tensors(((name, tensor.detach()) for name, tensor in self.targets), MeshRegister())

    def apply(self) -> Undo:
        """Set the options and put the state's tensors in place, unless an optimizer's own code refuses its state.

        Values may still have to be filled in, unless an optimizer has its own ``load_state_dict``. The function that is
        returned restores the former state; it is valid until the first tensor that existed before is filled.
        """
        undo = self._undo()
        try:
            with torch.no_grad():
                for group, options in self.groups:
                    _set_options(group, options)
            for each in self.params:
                state: object = _ABSENT if each.state is None else each.state
                if each.state is not None and each.state.keys() == {""}:  # a state that is no dictionary
                    state = each.state[""]
                _set_state(each.optimizer, each.param, state)
            for optimizer, states in self.keyed:
                for key, state in states.items():
                    _set_state(optimizer, key, state)
            for own in self.own:
                self._hand_over(own)
        except BaseException:
            undo()
            raise
        return undo

    def _undo(self) -> Undo:
        """A function that restores the current state."""
        groups = [(group, dict(group), _tensor_options(group)) for group, _ in self.groups]
        places: list[tuple[Optimizer, object]] = [(each.optimizer, each.param) for each in self.params]
        places += [(optimizer, key) for optimizer, states in self.keyed for key in states]
        had = [(optimizer, key, _had(optimizer, key)) for optimizer, key in places]
        rests = [(own, [(path, cloned(value)) for path, value in own.view().rest()]) for own in self.own]
        # torch's own class makes new groups as it takes a state dict in.
        owners = {id(each.optimizer): (each.optimizer, each.optimizer.param_groups) for each in self.params}

        @torch.no_grad()
        def undo() -> None:
            for optimizer, own_groups in owners.values():
                if "param_groups" in vars(optimizer):
                    optimizer.param_groups = own_groups
            for group, options, tensors in groups:
                group.clear()
                group.update(options)
                for name, value in tensors.items():
                    cast(torch.Tensor, group[name]).copy_(value)
            for optimizer, key, state in had:
                _set_state(optimizer, key, state)
            for own, rest in rests:
                own.view().take(rest)

        return undo

    def _hand_over(self, own: _Own) -> None:
        try:
            own.view().take(own.rest)
        except Exception as error:
            raise MisuseError(
                f"the saved state does not fit the optimizer: {own.kind}.load_state_dict refuses it with "
                f"{type(error).__name__}: {error}",
                hint="Build the optimizer as it was when the checkpoint was saved, or restore without it.",
            ) from error
        # torch's own class casts state to its parameter's dtype as it takes it in; what was saved was not cast.
        for each in self.params:
            have = cast("dict[object, object] | None", each.optimizer.state.get(each.param))
            if each.state is None or not isinstance(have, dict):
                continue
            for key, value in each.state.items():
                now = have.get(key)
                both = isinstance(now, torch.Tensor) and isinstance(value, torch.Tensor)
                if both and _is_cast(cast(torch.Tensor, now), cast(torch.Tensor, value), each.param):
                    have[key] = value


#: Stands for a key that was not there.
_ABSENT = object()


def plan_restore(
    state: OptimizerState, record: OptimizerRecord, *, allow_new: bool = False, aside: bool = False
) -> OptimizerRestore:
    """Compare optimizers with a saved one, and make the memory that they lack. Nothing of theirs is changed. Local.

    With ``allow_new`` parameters that the saved optimizer did not update start without state. With ``aside`` state is
    read into new memory instead of the optimizers' tensors. What does not fit raises.
    """
    return _Planner(state, record, allow_new, aside).plan()


class _Planner:
    def __init__(self, state: OptimizerState, record: OptimizerRecord, allow_new: bool, aside: bool) -> None:
        self.state, self.record, self.allow_new, self.aside = state, record, allow_new, aside
        self.group_of = {(g.slot, name): n for n, g in enumerate(record.groups) for name in g.params}
        self.other = {**record.aliases, **state.saved_under}
        self.found = OptimizerRestore()
        self.have = {entry.label: entry for entry in state.entries()}
        self.params = {state.name(p): p for _, group in state.groups() for p in members(group)}

    def plan(self) -> OptimizerRestore:
        record, state = self.record, self.state
        if not record.groups and self.params:
            raise CheckpointNotFoundError(
                "the checkpoint was saved without an optimizer",
                hint="Restore without an optimizer, or choose a checkpoint that has one.",
            )
        for label, found in record.tensors.items():
            name = label.rpartition(">")[2] or label[1:-1].partition(".")[0]
            self.found.params_of |= {f"state.{record.file_label(label)}.{key}": name for key in found}
        # Outer optimizers may keep no state, as containers do.
        kept = {label.partition(">")[0][1:] for label in {**record.tensors, **record.values} if label.startswith("<")}
        slots = {group.slot for group in record.groups if group.slot}
        counts: dict[str, int] = {}
        for holder in state.state_holders if self.params and not record.is_old else ():
            if holder.slot and holder.slot not in slots:
                raise MisuseError(
                    f"the checkpoint's optimizer had no {holder.slot} around it, and the one to be restored has",
                    hint="Restore the optimizer inside of it, or build the optimizer that the checkpoint was saved "
                    "with.",
                )
        for holder, group in state.groups():
            position = counts[holder.slot] = counts.get(holder.slot, -1) + 1
            if holder.slot in ("", *slots):
                self._plan_group(holder, group, position)
        for slot in sorted((slots & kept) - {holder.slot for holder in state.state_holders}) if self.params else ():
            raise MisuseError(
                f"the checkpoint has the state of a {slot} around the optimizer, and the optimizer to restore has none",
                hint=f"Build the {slot} that the checkpoint was saved with, or restore without the optimizer.",
            )
        self._plan_loose()
        return self.found

    # --- groups -----------------------------------------------------------------------------------------------------

    def _plan_group(self, holder: StateHolder, group: Options, position: int) -> None:
        names = self.state.names(group)
        saved_as = [self._saved_name(holder, name) for name in names]
        absent = [name for name in saved_as if (holder.slot, name) not in self.group_of]
        if absent and not self.allow_new:
            raise MissingTensorError(
                f"the saved optimizer did not update {len(absent)} of these parameters: {', '.join(absent[:5])}",
                tensor=absent[0],
                hint="Build the optimizer over the same parameters as when the checkpoint was saved; or, where they "
                "are meant to start without state, as layers that were unfrozen since, pass "
                "allow_new_parameters=True.",
            )
        known = [name for name in saved_as if name not in absent]
        saved = self._saved_group(holder, group, known, position if not absent else None)
        if saved is not None and (names or saved.kind in ("", holder.kind)):
            _check_kind(holder.optimizer, saved, self.record, [label_of(holder.slot, n) for n in known], members(group))
            self.found.groups.append((group, saved.options))
        self._mirror(holder, group, saved)
        options = {**group, **(saved.options if saved is not None else {})}
        for param, name, saved_name in zip(members(group), names, saved_as, strict=True):
            if saved_name in absent:
                self.found.fresh.append(name)
                self.found.params.append(_Param(holder.optimizer, param, saved_name, None))
            elif saved is not None:
                entry = Entry(holder, param, name, {})
                label, first = label_of(holder.slot, saved_name), len(self.found.targets)
                planned = self._planned(entry, label, options)
                own = tuple(target for target, _ in self.found.targets[first:])
                in_files = self.record.file_label(label)
                self.found.params.append(_Param(holder.optimizer, param, saved_name, planned, in_files, own))

    def _mirror(self, holder: StateHolder, group: Options, saved: SavedGroup | None) -> None:
        """The outer group takes the same options; those of a rank without parameters of the group come from it."""
        number = next(n for n, each in enumerate(holder.groups()) if each is group)
        if number >= len(holder.mirrors):
            return
        outer = holder.mirrors[number]
        names = [self._saved_name(holder, name) for name in self.state.names(outer)]
        names = [name for name in names if (holder.slot, name) in self.group_of]
        chosen = saved if members(group) else self._saved_group(holder, outer, names, None)
        if chosen is not None:
            self.found.groups.append((outer, chosen.options))
            if not members(group):
                self.found.groups.append((group, chosen.options))

    def _saved_name(self, holder: StateHolder, name: str) -> str:
        return name if (holder.slot, name) in self.group_of else self.other.get(name, name)

    def _saved_group(
        self, holder: StateHolder, group: Options, names: Sequence[str], position: int | None
    ) -> SavedGroup | None:
        record = self.record
        chosen = sorted({self.group_of[holder.slot, name] for name in names})
        if not chosen:
            alike = [g for g in record.groups if g.slot == holder.slot]
            by_number = position is not None and not members(group) and position < len(alike)
            return alike[cast(int, position)] if by_number else None
        first = record.groups[chosen[0]]
        for number in chosen[1:]:
            other = record.groups[number]
            if first.kind != other.kind or not equal(first.options, other.options):
                raise MisuseError(
                    f"{names[0]} and a parameter of the same group were saved in groups with different options "
                    f"({_difference(first, other)})",
                    tensor=names[0],
                    hint="Build the optimizer with the same parameter groups as when the checkpoint was saved.",
                )
        return first

    # --- states -----------------------------------------------------------------------------------------------------

    def _planned(self, entry: Entry, saved_label: str, options: Options) -> dict[object, object] | None:
        """The planned state of one parameter."""
        record, param, optimizer = self.record, entry.param, entry.holder.optimizer
        shape = record.shapes.get(saved_label)
        if shape is not None and shape != tuple(param.shape):
            raise _misfit(saved_label, param, shape)
        if saved_label not in record.tensors:
            return None
        have: Mapping[str, torch.Tensor] = {}
        known = self.have.get(entry.label)
        if known is not None:
            have = known.split(self.state.name).tensors
        saved_tensors, is_torchs = record.tensors[saved_label], is_torchs_own(optimizer)

        def tensor(key: str) -> torch.Tensor:
            saved = saved_tensors[key]
            if saved.shape != tuple(param.shape) and is_like_parameter(optimizer, key):
                raise _misfit(f"state.{saved_label}.{key}", param, saved.shape)
            place = Place(
                f"state.{saved_label}.{key}",
                param,
                have.get(key),
                # A state of a parameter without dimensions is like it, unless it counts steps.
                is_like_parameter(optimizer, key) if is_torchs else key.rpartition(".")[2] != "step",
                is_torchs,
                bool(options.get("capturable")) or bool(options.get("fused")),
                owned="@" not in key,
                fresh=self.aside,
            )
            return self._made(saved, place, saved_label, key)

        if saved_label in record.trees:
            return cast(dict[object, object], self._read_tree(saved_label, param, tensor))
        found: dict[object, object] = {key: tensor(key) for key in saved_tensors}
        found.update(record.values.get(saved_label, {}))
        return found

    def _made(self, saved: SavedTensor, place: Place, label: str, key: str) -> torch.Tensor:
        tensor, target = make(saved, place)
        self.found.targets.append((f"state.{self.record.file_label(label)}.{key}", target))
        return tensor

    def _read_tree(self, label: str, param: torch.Tensor | None, tensor: Callable[[str], torch.Tensor]) -> object:
        def known(key: str) -> torch.Tensor:
            if key not in self.record.tensors.get(label, {}):
                raise StateFormatError(
                    f"the optimizer's state refers to a tensor {key!r} that it does not describe",
                    tensor=label,
                    hint="Restore the file or choose another checkpoint.",
                )
            return tensor(key)

        def parameter(name: str) -> torch.Tensor:
            found = self.params.get(self.record.renamed.get(name, name))
            if found is None:
                raise MissingTensorError(
                    f"the optimizer's state has the parameter {name} as a key, which this rank does not have",
                    tensor=label,
                    hint="Restore on the topology that saved.",
                )
            return found

        return TreeReader(label, param, known, parameter).put_together(self.record.trees[label])

    def _plan_loose(self) -> None:
        """State that belongs to no parameter, of each optimizer that has any."""
        for holder, label in self.state.labels():
            found = self._loose(label, holder)
            if isinstance(found, dict):
                self.found.keyed.append((holder.optimizer, found))
        for number, label in self.state.passed_labels():
            passed = self.state.passed[number]
            if not makes_or_loads_custom(passed):
                continue
            holder_of = next((holder for holder in self.state.state_holders if holder.passed == number), None)
            rest = cast("list[tuple[list[tuple[str, object]], object]]", self._loose(label, holder_of) or [])
            renamed = [(_renamed([*path], self.record.renamed), value) for path, value in rest]
            self.found.own.append(_Own(partial(self.state.view, number), type(passed).__name__, renamed))

    def _loose(self, label: str, holder: StateHolder | None) -> object:
        trees = self.record.trees
        if label not in trees:
            kind, _, rest = label[1:-1].partition(".")
            end, dots = rest[rest.find(".") :], label.count(".")
            alike = [each for each in trees if each[1:-1].partition(".")[0] == kind and each.endswith(end)]
            same = [each for each in alike if each.count(".") == dots]
            if len(same) != 1:
                return None
            label = same[0]
        every = [] if holder is None else [p for group in holder.groups() for p in members(group)]
        params = every or list(self.params.values()) or [torch.empty(0)]

        def tensor(key: str) -> torch.Tensor:
            saved = self.record.tensors[label][key]
            fitting = next((p for p in params if hasattr(p, "device_mesh")), params[0])
            place = Place(f"{label} {key}", fitting, None, None, False, False, owned=False, fresh=True)
            return self._made(saved, place, label, key)

        return self._read_tree(label, None, tensor)


def _renamed(path: Sequence[tuple[str, object]], names: Mapping[str, str]) -> Path:
    return tuple((kind, names.get(str(step), step) if kind == "parameter" else step) for kind, step in path)


def is_torchs_own(optimizer: Optimizer) -> bool:
    """Whether the optimizer's class is one of torch's."""
    return type(optimizer) is getattr(torch.optim, type(optimizer).__name__, None)


def is_foreign(optimizer: Optimizer, options: Collection[str], keys: Collection[str], own: Collection[str]) -> bool:
    """Whether saved options and keys provably belong to another class than this optimizer, whose keys are ``own``."""
    name, is_torchs = type(optimizer).__name__, is_torchs_own(optimizer)
    known = {*own} | (_STATE_KEYS.get(name, set()) if is_torchs else set())
    has, expects = {*keys} - _COMMON, known - _COMMON
    if has and expects and not has & expects:
        return True
    return is_torchs and bool(set(optimizer.defaults) - _FLAGS - {*options})


def is_like_parameter(optimizer: Optimizer, key: str) -> bool:
    """Whether the state ``key`` is known to have its parameter's shape."""
    return is_torchs_own(optimizer) and key in _STATE_KEYS.get(type(optimizer).__name__, set()) - _OF_NO_SHAPE


def _difference(a: SavedGroup, b: SavedGroup) -> str:
    if a.kind != b.kind:
        return f"of {a.kind} and {b.kind}"
    keys = [k for k in {**a.options, **b.options} if not equal(a.options.get(k), b.options.get(k))]
    return ", ".join(f"{key} {a.options.get(key)!r} and {b.options.get(key)!r}" for key in sorted(keys)[:5])


def _check_kind(
    optimizer: Optimizer,
    saved: SavedGroup,
    record: OptimizerRecord,
    names: Sequence[str],
    group: Sequence[torch.Tensor],
) -> None:
    own, problem = type(optimizer).__name__, ""
    if saved.kind and saved.kind != own:
        problem = f"is {saved.kind} and the one to be restored is {own}"
    elif not saved.kind:
        keys = {key for name in names for found in (record.tensors, record.values) for key in found.get(name, {})}
        have = {str(key) for param in group for key in optimizer.state.get(param, {})}
        if is_foreign(optimizer, saved.options, keys, have):
            problem = f"is no {own}: it has the state {sorted(keys)} and the options {sorted(saved.options)}"
    if problem and names:
        raise MisuseError(
            f"the checkpoint's optimizer {problem}",
            tensor=names[0],
            hint="Build the optimizer that the checkpoint was saved with; or, to go on with another one, leave the "
            "optimizer (and its scheduler) out of what is restored and let it start afresh.",
        )


def _misfit(name: str, param: torch.Tensor, saved: tuple[int, ...]) -> ShapeMismatchError:
    return ShapeMismatchError(
        f"the parameter's shape is {list(param.shape)}, the saved optimizer's {list(saved)}",
        tensor=name,
        hint="Build the model from the checkpoint's own config.json.",
    )


def _is_cast(now: torch.Tensor, value: torch.Tensor, param: torch.Tensor) -> bool:
    """Whether ``now`` is exactly ``value`` cast to the dtype of its parameter."""
    if now is value or now.dtype == value.dtype or now.dtype != param.dtype or now.shape != value.shape:
        return False
    mine, saved = (local_part(each) for each in (now, value))
    return bool(torch.equal(mine, saved.to(mine.dtype).to(mine.device)))


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


def _had(optimizer: Optimizer, key: object) -> object:
    state = cast(dict[object, object], optimizer.state).get(key, _ABSENT)
    return copy.copy(state) if isinstance(state, dict) else state


def _set_state(optimizer: Optimizer, key: object, state: object) -> None:
    """Put a state in its place; a dictionary into the one that is there, which may be held on to elsewhere."""
    states = cast(dict[object, object], optimizer.state)
    kept = states.get(key)
    if state is _ABSENT:
        states.pop(key, None)
    elif isinstance(state, dict) and isinstance(kept, dict):
        kept.clear()
        kept.update(state)
    else:
        states[key] = copy.copy(state) if isinstance(state, dict) else state
