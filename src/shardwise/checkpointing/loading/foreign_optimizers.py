"""Optimizers that other tools saved in DCP directories: torch's own layouts, torchtitan's, NeMo AutoModel's.

They are converted to our own `OptimizerRecord` and a source under our names; comparing, reshaping and reading are then
the same as in every restore. Rank 0 reads everything that is not a sharded tensor, through unpicklers with an
allow-list, and broadcasts it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.checkpointing.loading.foreign_states import broadcast_state, foreign_schedules, read_schedules
from shardwise.checkpointing.loading.restoring import Stateful
from shardwise.checkpointing.session import Session
from shardwise.comm import Group
from shardwise.convert import rename
from shardwise.engine.load import LoadOptions, OpenedLoad, open_described
from shardwise.engine.name_suggestions import listed
from shardwise.errors import CheckpointNotFoundError, MissingTensorError, MisuseError, ShardwiseError
from shardwise.plan.reads import SourceTensor
from shardwise.sources.dcp_optimizers import DcpOptimizer, read_optimizers
from shardwise.sources.dcp_values import DcpValues, is_dcp
from shardwise.sources.sources import Source, open_source
from shardwise.sources.state_files import has_state
from shardwise.stateful_wrappers import OptimizerState
from shardwise.stateful_wrappers.inner_optimizers import AnyOptimizer
from shardwise.stateful_wrappers.optimizer import OptimizerRecord, SavedGroup
from shardwise.stateful_wrappers.optimizer_restore import OptimizerRestore, plan_restore
from shardwise.stateful_wrappers.state_tensors import SavedTensor
from shardwise.stateful_wrappers.wrapping import plain_name

_FRESH = "Or restore without an optimizer (and its scheduler), which then starts afresh."
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ForeignOptimizers:
    """Optimizers in a DCP directory, on every rank alike.

    Attributes:
        found: The optimizers found; empty where none is to be restored.
        source: All tensors of the directory, under DCP's names.
    """

    directory: Path
    found: tuple[DcpOptimizer, ...]
    source: Source

    def matched(
        self, state: OptimizerState, key_mapping: Mapping[str, str] | None
    ) -> tuple[OptimizerRecord, dict[str, str]]:
        """The state that this rank's optimizers will get, and DCP's name of each tensor. Local.

        Raises:
            MisuseError: Parameters cannot be matched without doubt.
        """
        named = [_in_names(each, key_mapping) for each in self.found if not each.numbered]
        numbered = [each for each in self.found if each.numbered]
        if not state.optimizers:
            return OptimizerRecord((), {}, {}), {}
        if numbered and named:
            raise MisuseError(
                f"of the checkpoint's optimizers {_places(numbered)} knows its parameters by number and "
                f"{_places(named)} by name",
                path=self.directory,
                hint=f"Save them in one way. {_FRESH}",
            )
        if numbered:
            named = [
                self._by_position(each, optimizer, state)
                for each, optimizer in self._paired(numbered, state.optimizers)
            ]
        return self.described(named)

    def described(self, named: Sequence[DcpOptimizer]) -> tuple[OptimizerRecord, dict[str, str]]:
        """Optimizers whose parameters have names as one record, and DCP's name of each tensor. Local.

        Raises:
            MisuseError: Two of them have one parameter.
        """
        self._refuse_shared(named)
        groups = [SavedGroup(group.options, group.params) for each in named for group in each.groups]
        tensors: dict[str, dict[str, SavedTensor]] = {}
        values: dict[str, Mapping[str, object]] = {}
        dcp_names: dict[str, str] = {}
        for each in named:
            values |= each.values
            for param, keys in each.tensors.items():
                tensors[param] = {key: self._saved(name) for key, name in keys.items()}
                dcp_names |= {f"state.{param}.{key}": name for key, name in keys.items()}
            for param in each.values:
                tensors.setdefault(param, {})
        return OptimizerRecord(tuple(groups), tensors, values, is_old=True), dcp_names

    def _saved(self, name: str) -> SavedTensor:
        spec = self.source.tensors[name].spec
        return SavedTensor(spec.dtype, spec.shape)

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
                            hint=f"Save each model with its optimizer in a directory of its own. {_FRESH}",
                        )

    def _paired(
        self, numbered: Sequence[DcpOptimizer], optimizers: Sequence[Optimizer]
    ) -> list[tuple[DcpOptimizer, Optimizer]]:
        if len(numbered) != len(optimizers) or (len(numbered) > 1 and not all(each.listed for each in numbered)):
            raise MisuseError(
                f"the checkpoint has {len(numbered)} optimizers ({_places(numbered)}), whose parameters are known by "
                f"number alone, and {len(optimizers)} are to be restored: which is which is not known",
                path=self.directory,
                hint="Save a list of optimizers' states and pass as many, in the same order; or save them by "
                f"torch.distributed.checkpoint.state_dict.get_optimizer_state_dict, which names parameters. {_FRESH}",
            )
        return list(zip(numbered, optimizers, strict=True))

    def _by_position(self, saved: DcpOptimizer, optimizer: Optimizer, state: OptimizerState) -> DcpOptimizer:
        """The saved optimizer with names for numbers, where counts of parameters and groups and all shapes agree."""
        own = [(state.names(group), group["params"]) for group in optimizer.param_groups]
        sizes, saved_sizes = [len(names) for names, _ in own], [len(group.params) for group in saved.groups]
        if sizes != saved_sizes:
            raise self._no_match(
                saved, f"it has groups of {_counts(saved_sizes)} parameters, the one to be restored {_counts(sizes)}"
            )
        names: dict[str, str] = {}
        for group, (group_names, params) in zip(saved.groups, own, strict=True):
            for number, name, param in zip(group.params, group_names, params, strict=True):
                names[number] = name
                self._compare(saved, number, name, param)
        return saved.renamed(names)

    def _compare(self, saved: DcpOptimizer, number: str, name: str, param: torch.Tensor) -> None:
        for key, dcp_name in saved.tensors.get(number, {}).items():
            shape = self.source.tensors[dcp_name].spec.shape
            if shape not in ((), (1,)) and shape != tuple(param.shape):
                raise self._no_match(
                    saved,
                    f"{key!r} of its parameter {number} has the shape {list(shape)}, and the parameter in that place, "
                    f"{name}, {list(param.shape)}",
                    name,
                )

    def _no_match(self, saved: DcpOptimizer, why: str, tensor: str | None = None) -> MisuseError:
        return MisuseError(
            f"the checkpoint's optimizer {saved.place!r} knows its parameters by number alone, and these do not match: "
            f"{why}",
            path=self.directory,
            tensor=tensor,
            hint="Build the optimizer over the same parameters in the same order and groups; or save by torch."
            f"distributed.checkpoint.state_dict.get_optimizer_state_dict, which names parameters. {_FRESH}",
        )

    def agreed(self, dcp_names: Mapping[str, str], group: Group) -> Source:
        """The optimizers' tensors under our names. All ranks call.

        Raises:
            MisuseError: Ranks that match by position would use one tensor for different parameters.
        """
        if any(each.numbered for each in self.found):
            # Each rank named numbered entries by its own parameters.
            own = hashlib.blake2b(json.dumps(sorted(dcp_names.items())).encode(), digest_size=16).hexdigest()
            gathered = group.gather_json(own, "comparing parameters of optimizers")
            if len(set(cast("list[str]", gathered))) > 1:
                raise MisuseError(
                    "the checkpoint's optimizer knows its parameters by number alone, and the ranks' optimizers have "
                    "different parameters",
                    path=self.directory,
                    hint="Save it by torch.distributed.checkpoint.state_dict.get_optimizer_state_dict, which names "
                    f"parameters. {_FRESH}",
                )
        tensors: dict[str, SourceTensor] = {}
        for name, known in dcp_names.items():
            tensor = self.source.tensors[known]
            tensors[name] = tensor._replace(spec=tensor.spec._replace(name=name))
        return replace(self.source, tensors=tensors)


@dataclass(frozen=True, slots=True)
class Changes:
    """Intended differences from the saved optimizer; the same on every rank.

    Attributes:
        key_mapping: Regular expression -> replacement, applied to the checkpoint's names of parameters; first match.
        allow_new: Parameters that the saved optimizer did not update start without state.
    """

    key_mapping: Mapping[str, str] | None = None
    allow_new: bool = False


@dataclass(frozen=True, slots=True)
class OpenedForeign:
    """Optimizers and schedulers matched with another tool's state, on every rank; see `OpenedOptimizer`."""

    plan: OptimizerRestore
    schedulers: tuple[tuple[Stateful, dict[str, object]], ...]
    tensors: OpenedLoad | None
    is_buffered: bool


def open_foreign(
    session: Session,
    optimizer: AnyOptimizer | Sequence[AnyOptimizer],
    model: nn.Module | Sequence[nn.Module],
    schedulers: Sequence[Stateful],
    directory: Path,
    changes: Changes,
) -> OpenedForeign | None:
    """Match optimizers and schedulers with another tool's state; ``None`` where there is none. All ranks call.

    ``directory`` is where a checkpoint of ours would have its optimizer.

    Raises:
        CheckpointNotFoundError: There is no optimizer or scheduler in it.
        MisuseError: It is another optimizer's or scheduler's, or parameters cannot be matched without doubt.
        TensorError: The saved state does not fit the optimizer.
        UnsafePickleError: A value could run code.
    """
    group, legacy = session.group, session.config.allow_legacy_pickle_restore
    found_place = group.broadcast_result(
        lambda: str(_foreign_place(directory) or ""), f"looking for an optimizer at {directory}"
    )
    if not found_place:
        return None
    place = Path(cast(str, found_place))
    state = group.attempt(lambda: OptimizerState(optimizer, model), "describing the optimizer")
    steers = group.any(bool(state.optimizers), "asking which ranks have optimizers")
    is_buffered = group.any(state.has_own_ways, "asking how optimizers load their state")
    found = _find_foreign(place, group, legacy, steers)
    has_schedulers = group.any(bool(schedulers), "comparing schedulers")
    schedules = read_schedules(place, group, legacy) if has_schedulers else None

    def compare() -> tuple[OptimizerRestore, dict[str, str], list[tuple[Stateful, dict[str, object]]]]:
        record, names = found.matched(state, changes.key_mapping)
        try:
            plan = plan_restore(state, record, allow_new=changes.allow_new, aside=is_buffered)
        except ShardwiseError as error:
            error.path = error.path or str(place)
            _add_names(error, record)
            raise
        return plan, names, foreign_schedules(schedulers, schedules) if schedulers and schedules is not None else []

    plan, names, fitting = group.attempt(compare, f"comparing the optimizer with {place}")
    source = found.agreed(names, group)
    tensors: OpenedLoad | None = None
    if group.any(bool(plan.targets), "asking which optimizers have tensors"):
        options = LoadOptions(allow_unexpected=True, threads=session.threads, sharing=session.sharing)
        tensors = open_described(plan.held_as_saved, source, group, session.storage, options)
    _count_in_tensors(plan)
    return OpenedForeign(plan, tuple(fitting), tensors, is_buffered)


def _count_in_tensors(plan: OptimizerRestore) -> None:
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


def _foreign_place(directory: Path) -> Path | None:
    """The DCP directory that has the optimizer: ``optim`` itself, or the checkpoint around it. Local."""
    if has_state(directory / "optimizer"):
        return None
    return next((place for place in (directory, directory.parent) if is_dcp(place)), None)


def _find_foreign(place: Path, group: Group, legacy: bool, steers: bool) -> ForeignOptimizers:
    """Read the optimizers of a DCP directory, if any rank has one to restore (``steers``). All ranks call."""

    def read() -> list[object]:
        return [each.to_state() for each in _read(place, legacy)] if steers else []

    states = cast("list[object]", broadcast_state(read, group, f"reading the optimizers of {place}"))
    found = tuple(map(DcpOptimizer.from_state, states))
    return ForeignOptimizers(place, found, open_source(place, group, spread=True))


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


def _in_names(saved: DcpOptimizer, key_mapping: Mapping[str, str] | None) -> DcpOptimizer:
    names = [param for group in saved.groups for param in group.params]
    plain = [plain_name(name) for name in names]
    return saved.renamed(dict(zip(names, rename(plain, key_mapping) if key_mapping else plain, strict=True)))


def _add_names(error: ShardwiseError, record: OptimizerRecord) -> None:
    """Add the other tool's names to an error about absent parameters."""
    if isinstance(error, MissingTensorError):
        there = [param for group in record.groups for param in group.params]
        error.hint = (
            f"It has {listed(there[:_SHOWN])} and so on. If these are the same parameters under other "
            f"names, pass key_mapping. {error.hint or ''}"
        ).strip()


def _places(found: Sequence[DcpOptimizer]) -> str:
    return ", ".join(repr(each.place) for each in found)


def _counts(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:_SHOWN])) + (f" (and {len(sizes) - _SHOWN} more)" if len(sizes) > _SHOWN else "")
