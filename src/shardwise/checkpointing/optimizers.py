"""Saving and loading optimizers and schedulers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn

from shardwise.checkpointing.loading.foreign_optimizers import Changes, open_foreign
from shardwise.checkpointing.loading.foreign_states import foreign_components
from shardwise.checkpointing.loading.restoring import HasState, Undos, overwriting, undone_on_failure
from shardwise.checkpointing.per_rank import OwnRead, find_optimizer, optimizer_steps
from shardwise.checkpointing.run_state.distinct_values import blob_of, gather_distinct, unblob
from shardwise.checkpointing.run_state.schedule_records import attached, capture_schedules, merge_schedules
from shardwise.checkpointing.run_state.schedulers import SCHEDULER_STATE, FoundSchedules, Schedule, saved_schedules
from shardwise.checkpointing.saving.torch_format import capture_distcp, write_distcp
from shardwise.checkpointing.session import Session
from shardwise.comm import Group, JsonValue
from shardwise.convert.mapping import rename
from shardwise.disk.names import is_there
from shardwise.engine.jobs import Step
from shardwise.engine.load import LoadOptions, OpenedLoad, open_described
from shardwise.engine.name_suggestions import listed
from shardwise.engine.records import ComponentRecord, write_state
from shardwise.engine.replicas import comparison
from shardwise.engine.shards import ShardPlan, write_shards
from shardwise.errors import CheckpointNotFoundError, MisuseError, ShardwiseError
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.ownership import left_to_others
from shardwise.plan.shards import plan_shards
from shardwise.sources.dcp_values import is_dcp
from shardwise.sources.sources import open_source
from shardwise.sources.state_files import has_state, pack_state, read_state, unpack_state
from shardwise.stateful_wrappers import OptimizerState
from shardwise.stateful_wrappers.inner_optimizers import AnyOptimizer
from shardwise.stateful_wrappers.optimizer import OptimizerRecord
from shardwise.stateful_wrappers.optimizer_restore import OptimizerRestore, RestoreOptions, plan_restore
from shardwise.stateful_wrappers.replicated_options import RankRecord, agreed
from shardwise.stateful_wrappers.tensors import MeshRegister

_LOG = logging.getLogger(__name__)
OPTIMIZER_STATE = "optimizer"


Optimizers = AnyOptimizer | Sequence[AnyOptimizer]
Schedulers = HasState | Sequence[HasState]


def several(optimizer: Optimizers | None) -> list[AnyOptimizer]:
    """Optimizers as a list; none is an empty one."""
    if optimizer is None:
        return []
    return list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]


def as_list(schedulers: Schedulers | None) -> list[HasState]:
    """Schedulers as a list; none is an empty one."""
    if schedulers is None:
        return []
    return list(schedulers) if isinstance(schedulers, Sequence) else [schedulers]


class OptimizerSave:
    """One save of optimizers and schedulers."""

    def __init__(
        self,
        session: Session,
        optimizer: Optimizers,
        model: nn.Module | Sequence[nn.Module],
        scheduler: Schedulers | None,
        directory: Path,
    ) -> None:
        self._session = session
        self._directory = directory
        self._model = model
        self._optimizer = optimizer
        self._schedulers = as_list(scheduler)

    def steps(self) -> list[Step]:
        """Capture the state and return the steps that write it. All ranks call."""
        session, group = self._session, self._session.group
        state: OptimizerState
        unsettled: dict[str, list[object]] = {}
        with group.together("looking at the optimizer") as is_unsettled:
            state = OptimizerState(self._optimizer, self._model)
            unsettled = state.unsettled()
            is_unsettled.flag = bool(unsettled)
        if is_unsettled.any:
            told = group.gather_json(cast(JsonValue, unsettled), "comparing state that each rank keeps as it likes")
            state.settle(cast("list[dict[str, list[object]]]", told))
        with group.together("describing the optimizer"):
            own = blob_of(pack_state(state.record().to_state()))
            attachments, states = capture_schedules(self._schedulers, self._model)
        merged: dict[str, bytes] = {}
        schedule: dict[str, bytes] = {}
        theirs = gather_distinct(group, [own, attachments, states])
        with group.together("merging the optimizers' groups"):
            records = [RankRecord(OptimizerRecord.from_state(unpack_state(unblob(o.blob))), o.ranks) for o in theirs[0]]
            merged = pack_state(OptimizerRecord.merge(agreed(records, self._may_differ)).to_state())
            if group.is_main:
                schedule = merge_schedules(theirs[1], theirs[2], group.world_size)

        def write_states(group: Group) -> ComponentRecord:
            record = ComponentRecord()
            with group.together("writing the optimizer's groups"):
                if group.is_main:
                    session.storage.make_directory(self._directory)
                    record = write_state(session.storage, self._directory / OPTIMIZER_STATE, merged)
                    if schedule:
                        record += write_state(session.storage, self._directory / SCHEDULER_STATE, schedule)
            return record

        is_torchs = session.config.model_save_format == "torch_save"
        tensors: dict[str, torch.Tensor] = {}
        held: list[HeldTensor] = []

        def describe() -> list[HeldTensor]:
            found = state.held(MeshRegister(session.may_differ.of_state(state.owners())))
            if is_torchs:
                tensors.update(capture_distcp(session, "optim", state.state_dict()))
            held.extend(found if is_torchs else session.staged("optim", found))
            return held

        roster = session.optimizer_agreement.roster(describe, "describing the optimizer's tensors")
        own_steps = optimizer_steps(session, state, self._directory)
        replicas = comparison(held, roster, group.rank)
        if is_torchs:
            others = left_to_others(held, roster, group.rank)
            write = partial(write_distcp, tensors, self._directory, replicas=replicas, others=others)
            return [write_states, write, *own_steps]
        files = group.attempt(
            lambda: plan_shards(held, roster, group.rank, stem="optim"), "planning the optimizer's files"
        )
        plan = ShardPlan(self._directory, "optim", roster, files, replicas=(replicas,))
        return [write_states, lambda group: write_shards(plan, group, session.storage), *own_steps]

    def _may_differ(self, name: str) -> bool:
        """Whether ranks may have different options and plain values of a parameter, and the lowest rank's are saved.

        False for a parameter with per-rank tensors: its state would mix the values of two ranks.
        """
        may_differ = self._session.may_differ
        return may_differ.all and not may_differ.is_own(name)


@dataclass(frozen=True, slots=True)
class OpenedOptimizer:
    """Optimizers and schedulers matched with a checkpoint, on every rank; nothing has been changed yet.

    Attributes:
        session: Settings, ranks and storage.
        plan: The state the optimizers will get.
        schedulers: Each scheduler with its saved state.
        tensors: Tensors to read into the optimizers' memory; ``None`` where no rank has any.
        own: Per-rank state of this rank; ``None`` where it has none.
        is_buffered: Whether the state is read into separate memory before optimizers load it; the same on every rank.
    """

    session: Session
    plan: OptimizerRestore
    schedulers: FoundSchedules
    tensors: OpenedLoad | None
    own: OwnRead | None = None
    is_buffered: bool = False

    @property
    def unwanted(self) -> tuple[str, ...]:
        """Parameters with saved state that no rank's optimizer has."""
        names = self.tensors.unexpected if self.tensors is not None else ()
        return tuple(dict.fromkeys(self.plan.params_of.get(name, name) for name in names))

    def read_buffered(self) -> None:
        """Read the state into separate memory for optimizers that load it by their own code. All ranks call."""
        if self.is_buffered:
            self._read()

    def take_in(self, undos: Undos) -> None:
        """Set options and schedulers, and put the memory in place that `fill` fills. Local, after `read_aside`.

        Raises:
            MisuseError: A scheduler refuses its state.
        """
        undos.add("the optimizer", self.plan.apply())
        for each in self.schedulers.schedules:
            scheduler = each.scheduler
            try:
                # A copy: torch's schedulers keep a reference to the state, and two may share one state.
                undos.load("the scheduler", scheduler, copy.deepcopy(each.state))
            except Exception as error:
                raise MisuseError(
                    f"the saved scheduler does not fit: {type(scheduler).__name__} refuses it with "
                    f"{type(error).__name__}: {error}",
                    hint="Pass the same scheduler as when the checkpoint was saved, or restore without one.",
                ) from error

    def fill(self) -> None:
        """Read the state tensors, unless `read_buffered` has. All ranks call, after `take_in`."""
        if not self.is_buffered:
            self._read()

    def _read(self) -> None:
        if self.tensors is None:
            return
        self.tensors.read()
        if self.tensors.asked:
            with self.session.group.together("reading the optimizer's state of each rank's own tensors"):
                if self.own is not None:
                    self.own.read(self.session)


def _tell_fresh(plan: OptimizerRestore) -> None:
    if plan.fresh:
        _LOG.warning(
            "the saved optimizer did not update %s, which start without state (allow_new_parameters)",
            listed(plan.fresh),
        )


def open_optimizer(
    session: Session,
    optimizer: Optimizers,
    model: nn.Module | Sequence[nn.Module],
    scheduler: Schedulers | None,
    directory: Path,
    changes: Changes | None = None,
) -> OpenedOptimizer:
    """Match optimizers (fresh or used) and schedulers with the saved ones. All ranks call; nothing is changed.

    Raises:
        CheckpointNotFoundError: The checkpoint has no optimizer or scheduler state.
        MisuseError: The saved state is of another optimizer or scheduler.
        TensorError: The saved state does not fit the optimizer.
    """
    group = session.group
    state: OptimizerState | None = None
    plan: OptimizerRestore | None = None
    own: OwnRead | None = None
    schedulers = FoundSchedules()
    foreign = open_foreign(session, optimizer, model, as_list(scheduler), directory, changes or Changes())
    if foreign is not None:
        _tell_fresh(foreign.plan)
        schedulers = FoundSchedules(tuple(Schedule(*pair) for pair in foreign.schedulers))
        return OpenedOptimizer(session, foreign.plan, schedulers, foreign.tensors, is_buffered=foreign.is_buffered)
    with group.together("looking at the optimizer") as buffered:
        state = OptimizerState(optimizer, model)
        buffered.flag = state.has_own_ways

    def compare() -> JsonValue:
        nonlocal plan, schedulers, own
        assert state is not None
        plan, schedulers = _compared(session, state, model, as_list(scheduler), directory, changes, buffered.any)
        own = find_optimizer(session, plan, directory)
        if own is not None:
            plan.keep({saved.spec.name for saved, _ in own.pairs}, own.parameters)
        return [bool(plan.targets), sorted(schedulers.used), list(schedulers.chosen), bool(schedulers.schedules)]

    rows = cast(list[_Compared], group.gather(compare, f"comparing the optimizer with {directory}"))
    assert plan is not None
    found = plan
    _tell_fresh(found)
    if any(row[3] for row in rows):
        with group.together("comparing schedulers"):
            schedulers.check_all_used(frozenset(number for row in rows for number in row[1]), directory)
        _warn_of_chosen(group, directory, [key for row in rows for key in row[2]])
    if not any(row[0] for row in rows):
        return OpenedOptimizer(session, found, schedulers, None, is_buffered=buffered.any)
    states = frozenset(f"{name}.safetensors" for name in (OPTIMIZER_STATE, SCHEDULER_STATE))
    source = open_source(directory, group, spread=True, exclude=states)
    # A frozen stage, or an optimizer over fewer parameters, may need less than was saved.
    options = LoadOptions(allow_unexpected=True, threads=session.threads, sharing=session.sharing)
    tensors = open_described(found.held_as_saved, source, group, session.storage, options, lambda: own is not None)
    return OpenedOptimizer(session, found, schedulers, tensors, own, buffered.any)


_Compared = tuple[bool, list[int], list[str], bool]


def _warn_of_chosen(group: Group, directory: Path, keys: Sequence[str]) -> None:
    if keys and group.is_main:
        _LOG.warning(
            "the schedulers in %s were saved by another number of ranks, and ranks that held the same parameters had "
            "different %s: every rank takes the lowest rank's",
            directory,
            ", ".join(dict.fromkeys(keys)),
        )


def load_optimizer(
    session: Session,
    optimizer: Optimizers,
    model: nn.Module | Sequence[nn.Module],
    scheduler: Schedulers | None,
    directory: Path,
    changes: Changes | None = None,
) -> None:
    """Restore optimizers (fresh or used) and schedulers in place. All ranks call.

    Raises:
        ShardwiseError: As `open_optimizer`, with nothing changed; or a file could not be read, as the text then says.
    """
    group = session.group
    opened = open_optimizer(session, optimizer, model, scheduler, directory, changes)
    opened.read_buffered()
    with undone_on_failure() as undos, group.together("setting the optimizer's options"):
        opened.take_in(undos)
    with overwriting("the optimizer's state"):
        opened.fill()


def optimizer_components(directory: Path) -> list[str]:
    """Which of ``optimizer`` and ``scheduler`` a checkpoint's ``optim`` directory has. Local."""
    if not is_there(directory):
        return []
    stem = directory / OPTIMIZER_STATE
    if not has_state(stem) and is_dcp(directory):
        return [name for name in foreign_components(directory) if name in ("optimizer", "scheduler")]
    # Without a record it is another tool's.
    has_optimizer = not has_state(stem) or bool(OptimizerRecord.from_state(read_state(stem)).groups)
    return ["optimizer"] * has_optimizer + ["scheduler"] * has_state(directory / SCHEDULER_STATE)


def _compared(
    session: Session,
    state: OptimizerState,
    model: nn.Module | Sequence[nn.Module],
    schedulers: Sequence[HasState],
    directory: Path,
    changes: Changes | None,
    is_buffered: bool,
) -> tuple[OptimizerRestore, FoundSchedules]:
    changes = changes or Changes()
    if not is_there(directory):
        raise CheckpointNotFoundError(
            "the checkpoint was saved without an optimizer",
            path=directory,
            hint="Restore without an optimizer, or choose a checkpoint that has one.",
        )
    record = OptimizerRecord.from_state(read_state(directory / OPTIMIZER_STATE))
    try:
        if changes.key_mapping:
            record = _renamed(record, changes.key_mapping)
        plan = plan_restore(state, record, RestoreOptions(changes.allow_new, is_buffered))
    except ShardwiseError as error:
        error.path = error.path or str(directory)
        raise
    if not schedulers:
        return plan, FoundSchedules()
    group, key_mapping = session.group, changes.key_mapping
    other = {**record.aliases, **state.saved_under}

    mapped: dict[str, str] = {}

    def renamed(name: str, saved: frozenset[str]) -> str:
        if name in saved:
            return name
        if key_mapping and not mapped:
            known = sorted(saved)
            mapped.update(zip(rename(known, key_mapping), known, strict=True))
        return mapped.get(name, other.get(name, name))

    own = attached(schedulers, model)
    found = saved_schedules(schedulers, own, renamed, record.schedulers, directory, group.rank, group.world_size)
    return plan, found


def _renamed(record: OptimizerRecord, key_mapping: Mapping[str, str]) -> OptimizerRecord:
    names = list(dict.fromkeys([name for group in record.groups for name in group.params]))
    return record.under(dict(zip(names, rename(names, key_mapping), strict=True)))
