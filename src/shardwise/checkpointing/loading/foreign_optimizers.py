"""Optimizers, schedulers and extra state that other tools saved in DCP directories.

Optimizers, in torch's own layouts, torchtitan's or NeMo AutoModel's, are converted to our own `OptimizerRecord` and a
source under our names; comparing, reshaping and reading are then the same as in every restore. Rank 0 reads everything
that is not a sharded tensor, through unpicklers with an allow-list, and broadcasts it.

DCP flattens a state dict and loses its empty containers, and its loading fills the state dict that an object has. The
same is done here: empty dictionaries, which DCP cannot express, stay as the object has them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from shardwise.checkpointing.loading.restoring import Stateful
from shardwise.checkpointing.run_state.schedulers import FoundSchedules, check_rates, no_scheduler, other_number
from shardwise.checkpointing.session import Session
from shardwise.comm import Group
from shardwise.convert.mapping import rename
from shardwise.disk.names import is_directory, is_file, names_in
from shardwise.engine.name_suggestions import listed
from shardwise.errors import CheckpointNotFoundError, MissingTensorError, MisuseError, ShardwiseError, StateFormatError
from shardwise.sources.dcp_states import (
    DcpOptimizer,
    components,
    place_called,
    read_optimizers,
    scheduler_places,
    state_at,
)
from shardwise.sources.dcp_values import DcpValues, is_dcp
from shardwise.sources.sources import Source, open_source
from shardwise.sources.state_files import has_state, joined, pack_state, split, unpack_state
from shardwise.stateful_wrappers import OptimizerState
from shardwise.stateful_wrappers.optimizer import OptimizerRecord, SavedGroup
from shardwise.stateful_wrappers.optimizer_restore import OptimizerRestore, plan_restore
from shardwise.stateful_wrappers.state_trees import SavedTensor
from shardwise.stateful_wrappers.wrapping import plain_name

_NO_SCHEDULER = "Or restore without it, and it starts afresh."
_NO_OPTIMIZER = "Or restore without an optimizer (and its scheduler), which then starts afresh."


def foreign_schedules(
    schedulers: Sequence[Stateful], states: Mapping[str, object], is_list: bool, path: Path
) -> list[tuple[Stateful, dict[str, object]]]:
    """Each scheduler with its state of those in a DCP directory, by place; ``is_list`` where they were a list there.

    `MisuseError` unless they match without doubt. Local; nothing is changed.
    """
    if not states:
        raise no_scheduler(path)
    if len(states) != len(schedulers) or (len(schedulers) > 1 and not is_list):
        unclear = "" if len(states) != len(schedulers) else ": which is which is not known"
        raise other_number(len(states), len(schedulers), path, unclear, f" ({listed([*states])})")
    return [
        (scheduler, _fitting(scheduler, place, state, path))
        for scheduler, (place, state) in zip(schedulers, states.items(), strict=True)
    ]


def _fitting(scheduler: Stateful, place: str, saved: object, path: Path) -> dict[str, object]:
    own = scheduler.state_dict()
    state = filled(own, saved)
    if not isinstance(state, dict):
        raise StateFormatError(f"what is saved as {place!r} is no scheduler's state", path=path, hint=_NO_SCHEDULER)
    may_lack = {"verbose"}  # some releases' schedulers have it
    lacking = sorted({str(key) for key in own} - {str(key) for key in state} - may_lack)
    if isinstance(getattr(scheduler, "scheduler", scheduler), LRScheduler):
        # Attributes with a leading underscore differ between releases of torch.
        lacking = [key for key in lacking if not key.startswith("_")]
        beyond = sorted(key for key in {*state} - {*own} - may_lack if not str(key).startswith("_"))
    else:
        beyond = []
    if lacking or beyond:
        raise MisuseError(
            f"the checkpoint's scheduler {place!r} is no {type(scheduler).__name__}: it has {beyond} and "
            f"lacks {lacking}",
            path=path,
            hint=f"Build the scheduler that the checkpoint was saved with. {_NO_SCHEDULER}",
        )
    check_rates(f" {place!r}", own, state, path)
    return state


def filled(own: object, saved: object) -> object:
    """The saved state, completed with the object's own empty containers and numeric keys."""
    if isinstance(own, Mapping) and isinstance(saved, Mapping):
        made = dict(saved)
        for key, value in own.items():
            known = key if key in made else str(key)
            if known in made:
                made[key] = filled(value, made.pop(known))
            elif _vanishes(value):
                made[key] = value
        return made
    if isinstance(own, list) and isinstance(saved, list) and len(own) == len(saved):
        return [filled(one, other) for one, other in zip(own, saved, strict=True)]
    return saved


def _vanishes(value: object) -> bool:
    """Whether DCP's flattening leaves nothing of a value."""
    if isinstance(value, Mapping):
        return all(_vanishes(each) for each in value.values())
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) and _vanishes(v) for v in value)


def read_states(directory: Path, wanted: Iterable[str], group: Group, legacy: bool) -> dict[str, object]:
    """Extra state in a DCP directory: name -> state, of all names that any rank wants. All ranks call.

    A name is the path of a part of the state dict, joined by dots. Empty where the checkpoint is not a DCP directory.
    What cannot be read otherwise is unpickled without restrictions if ``legacy`` is true.
    """
    gathered = group.gather(
        lambda: (sorted(wanted), group.is_main and is_dcp(directory)), "comparing what is to be restored"
    )
    names = sorted({name for theirs, _ in gathered for name in theirs})
    if not gathered[0][1] or not names:
        return {}

    def read() -> dict[str, object]:
        values = DcpValues(directory, legacy)
        return {name: state_at(values, place_called(values, name)) for name in names}

    return cast("dict[str, object]", broadcast_state(read, group, f"reading extra state of {directory}"))


def foreign_components(directory: Path, model_place: str | None = None) -> list[str]:
    """Names of what a DCP directory has beside a model, whose names begin with ``model_place``. Local."""
    return components(DcpValues(directory), model_place) if is_dcp(directory) else []


def torch_leftovers(directory: Path) -> list[str]:
    """Files of ``torch.save`` beside model and optimizer, and directories of them, which are not read. Local."""
    found = []
    for entry in (directory / name for name in names_in(directory)):
        if entry.suffix in (".pt", ".pth") and is_file(entry):
            found.append(entry.stem)
        elif is_directory(entry) and entry.name not in ("model", "optim"):
            found += [entry.name] * any(name.endswith(".pt") for name in names_in(entry))
    return found


def broadcast_state(read: Callable[[], object], group: Group, what: str) -> object:
    """Call ``read`` on rank 0 and broadcast its result, which may hold tensors. All ranks call."""
    packed = group.attempt(lambda: joined(pack_state(read())) if group.is_main else b"", what)
    return unpack_state(split(group.broadcast_bytes(packed, 0, what)))


@dataclass(frozen=True, slots=True)
class ForeignOptimizers:
    """Optimizers in a DCP directory, with all its tensors under DCP's names, on every rank alike.

    ``schedules`` are the schedulers' states by place, a list there with ``lists_schedules``. What is not to be restored
    is not read.
    """

    directory: Path
    found: tuple[DcpOptimizer, ...]
    source: Source
    schedules: Mapping[str, object] = field(default_factory=dict)
    lists_schedules: bool = False

    def compared(
        self, state: OptimizerState, schedulers: Sequence[Stateful], changes: Changes, is_buffered: bool
    ) -> tuple[OptimizerRestore, FoundSchedules, dict[str, str]]:
        """What this rank's optimizers and schedulers will get, and DCP's name of each tensor. Local."""
        record, names = self._matched(state, changes.key_mapping)
        try:
            plan = plan_restore(state, record, allow_new=changes.allow_new, aside=is_buffered)
        except ShardwiseError as error:
            error.path = error.path or str(self.directory)
            if isinstance(error, MissingTensorError):  # the names are another tool's
                there = listed([param for group in record.groups for param in group.params])
                mapping = "If these are the same parameters under other names, pass key_mapping."
                error.hint = f"It has {there}. {mapping} {error.hint or ''}".strip()
            raise
        own = foreign_schedules(schedulers, self.schedules, self.lists_schedules, self.directory) if schedulers else []
        return plan, FoundSchedules(tuple(own)), names

    def _matched(
        self, state: OptimizerState, key_mapping: Mapping[str, str] | None
    ) -> tuple[OptimizerRecord, dict[str, str]]:
        if not state.optimizers:
            return OptimizerRecord((), {}, {}), {}
        named: list[DcpOptimizer] = []
        for each in (each for each in self.found if not each.numbered):
            names = [param for group in each.groups for param in group.params]
            plain = [plain_name(name) for name in names]
            renamed = rename(plain, key_mapping) if key_mapping else plain
            named.append(each.renamed(dict(zip(names, renamed, strict=True))))
        numbered = [each for each in self.found if each.numbered]
        if numbered and named:
            raise MisuseError(
                f"of the checkpoint's optimizers {_places(numbered)} knows its parameters by number and "
                f"{_places(named)} by name",
                path=self.directory,
                hint=f"Save them in one way. {_NO_OPTIMIZER}",
            )
        if numbered:
            self._check_order(numbered, state.optimizers)
            pairs = zip(numbered, state.optimizers, strict=True)
            named = [self._by_position(each, optimizer, state) for each, optimizer in pairs]
        return self.described(named)

    def described(self, named: Sequence[DcpOptimizer]) -> tuple[OptimizerRecord, dict[str, str]]:
        """Optimizers whose parameters have names as one record, and DCP's name of each tensor. Local."""
        self._refuse_shared(named)
        groups = [SavedGroup(group.options, group.params) for each in named for group in each.groups]
        tensors: dict[str, dict[str, SavedTensor]] = {}
        values: dict[str, Mapping[str, object]] = {}
        dcp_names: dict[str, str] = {}
        for each in named:
            values |= each.values
            for param, keys in each.tensors.items():
                specs = {key: self.source.tensors[name].spec for key, name in keys.items()}
                tensors[param] = {key: SavedTensor(spec.dtype, spec.shape) for key, spec in specs.items()}
                dcp_names |= {f"state.{param}.{key}": name for key, name in keys.items()}
            for param in each.values:
                tensors.setdefault(param, {})
        return OptimizerRecord(tuple(groups), tensors, values, is_old=True), dcp_names

    def _refuse_shared(self, named: Sequence[DcpOptimizer]) -> None:
        owner: dict[str, DcpOptimizer] = {}
        for each in named:
            for group in each.groups:
                for param in group.params:
                    if owner.setdefault(param, each) is not each:
                        raise MisuseError(
                            f"two of the checkpoint's optimizers, {_places([owner[param], each])}, have this parameter",
                            path=self.directory,
                            tensor=param,
                            hint=f"Save each model with its optimizer in a directory of its own. {_NO_OPTIMIZER}",
                        )

    def _check_order(self, numbered: Sequence[DcpOptimizer], optimizers: Sequence[Optimizer]) -> None:
        if len(numbered) != len(optimizers) or (len(numbered) > 1 and not all(each.listed for each in numbered)):
            raise MisuseError(
                f"the checkpoint has {len(numbered)} optimizers ({_places(numbered)}), whose parameters are known by "
                f"number alone, and {len(optimizers)} are to be restored: which is which is not known",
                path=self.directory,
                hint="Save a list of optimizers' states and pass as many, in the same order; or save them by "
                "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict, which names parameters. "
                f"{_NO_OPTIMIZER}",
            )

    def _by_position(self, saved: DcpOptimizer, optimizer: Optimizer, state: OptimizerState) -> DcpOptimizer:
        """The saved optimizer with names for numbers, where counts of parameters and groups and all shapes agree."""
        own = [(state.names(group), group["params"]) for group in optimizer.param_groups]
        sizes, saved_sizes = [len(names) for names, _ in own], [len(group.params) for group in saved.groups]
        if sizes != saved_sizes:
            ours, theirs = (listed([*map(str, counts)]) for counts in (sizes, saved_sizes))
            raise self._no_match(saved, f"it has groups of {theirs} parameters, the one to be restored {ours}")
        names: dict[str, str] = {}
        for group, (group_names, params) in zip(saved.groups, own, strict=True):
            for number, name, param in zip(group.params, group_names, params, strict=True):
                names[number] = name
                for key, dcp_name in saved.tensors.get(number, {}).items():
                    shape = self.source.tensors[dcp_name].spec.shape
                    if shape not in ((), (1,)) and shape != tuple(param.shape):
                        raise self._no_match(
                            saved,
                            f"{key!r} of its parameter {number} has the shape {list(shape)}, and the parameter in that "
                            f"place, {name}, {list(param.shape)}",
                            name,
                        )
        return saved.renamed(names)

    def _no_match(self, saved: DcpOptimizer, why: str, tensor: str | None = None) -> MisuseError:
        return MisuseError(
            f"the checkpoint's optimizer {saved.place!r} knows its parameters by number alone, and these do not match: "
            f"{why}",
            path=self.directory,
            tensor=tensor,
            hint="Build the optimizer over the same parameters in the same order and groups; or save by torch."
            f"distributed.checkpoint.state_dict.get_optimizer_state_dict, which names parameters. {_NO_OPTIMIZER}",
        )

    def agreed(self, dcp_names: Mapping[str, str], group: Group) -> Source:
        """The optimizers' tensors under our names, if all ranks matched them alike. All ranks call."""
        if any(each.numbered for each in self.found):
            # Each rank named numbered entries by its own parameters.
            own = hashlib.blake2b(json.dumps(sorted(dcp_names.items())).encode(), digest_size=16).hexdigest()
            if len(set(group.gather_json(own, "comparing parameters of optimizers"))) > 1:
                raise MisuseError(
                    "the checkpoint's optimizer knows its parameters by number alone, and the ranks' optimizers have "
                    "different parameters",
                    path=self.directory,
                    hint="Save it by torch.distributed.checkpoint.state_dict.get_optimizer_state_dict, which names "
                    f"parameters. {_NO_OPTIMIZER}",
                )
        tensors = {name: self.source.tensors[known].renamed(name) for name, known in dcp_names.items()}
        return replace(self.source, tensors=tensors)


@dataclass(frozen=True, slots=True)
class Changes:
    """Intended differences from the saved optimizer, the same on every rank; see `Checkpointer.load_optimizer`."""

    key_mapping: Mapping[str, str] | None
    allow_new: bool

    def given(self) -> dict[str, bool]:
        """As `check_same_call` compares them."""
        named = f"key_mapping={self.key_mapping}"
        return {named: bool(self.key_mapping), "allow_new_parameters=True": self.allow_new}


def find_foreign(
    session: Session, directory: Path, state: OptimizerState, schedulers: Sequence[Stateful]
) -> ForeignOptimizers | None:
    """Read what another tool saved of optimizers and schedulers, where ours is not in ``directory``. All ranks call."""
    group, legacy = session.group, session.config.allow_legacy_pickle_restore

    def look() -> str:
        # ``optim`` itself, or the checkpoint around it.
        places = () if has_state(directory / "optimizer") else (directory, directory.parent)
        return str(next((place for place in places if is_dcp(place)), ""))

    found_place = group.broadcast_result(look, f"looking for an optimizer at {directory}")
    if not found_place:
        return None
    place = Path(found_place)
    steers = group.any(bool(state.optimizers), "asking which ranks have optimizers")

    def read() -> list[object]:
        return [each.to_state() for each in _read(place, legacy)] if steers else []

    def read_schedules() -> list[object]:
        values = DcpValues(place, legacy)
        paths = scheduler_places(values)
        is_list = all(isinstance(path[-1], int) for path in paths if path)
        return [{".".join(map(str, path)): state_at(values, path) for path in paths}, is_list]

    states = cast("list[object]", broadcast_state(read, group, f"reading the optimizers of {place}"))
    schedules: dict[str, object] = {}
    lists_schedules = False
    if group.any(bool(schedulers), "comparing schedulers"):
        schedules, lists_schedules = cast(
            "tuple[dict[str, object], bool]",
            broadcast_state(read_schedules, group, f"reading the schedulers of {place}"),
        )
    found = tuple(map(DcpOptimizer.from_state, states))
    return ForeignOptimizers(place, found, open_source(place, group, spread=True), schedules, lists_schedules)


def count_in_tensors(plan: OptimizerRestore) -> None:
    """Make tensors of steps that were counted in numbers, as the ``__setstate__`` of torch's own optimizers does."""
    options = {id(p): {**group, **new} for group, new in plan.groups for p in cast("list[object]", group["params"])}
    for each in plan.params:
        step = (each.state or {}).get("step")
        kind = type(each.optimizer)
        if (
            each.state is None
            or type(step) not in (int, float)
            or kind is not getattr(torch.optim, kind.__name__, None)
        ):
            continue
        group = options[id(each.param)]
        on_device = bool(group.get("capturable")) or bool(group.get("fused"))
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        device = each.param.device if on_device else "cpu"
        each.state["step"] = torch.tensor(float(cast(float, step)), dtype=dtype, device=device)


def _read(place: Path, legacy: bool) -> list[DcpOptimizer]:
    values = DcpValues(place, legacy)
    found = read_optimizers(values)
    if not found:
        tops = dict.fromkeys(str(path[0]) for path in values.paths.values())
        raise CheckpointNotFoundError(
            f"the checkpoint was saved without an optimizer: nothing in it has param_groups; at its top it has "
            f"{listed([*tops])}",
            path=place,
            hint="Restore without an optimizer, or choose a checkpoint that has one.",
        )
    return found


def _places(found: Sequence[DcpOptimizer]) -> str:
    return ", ".join(repr(each.place) for each in found)
