"""Saving and loading optimizers and schedulers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import torch

from shardwise.checkpointing.loading import foreign_optimizers
from shardwise.checkpointing.loading.restoring import Stateful, Undos
from shardwise.checkpointing.per_rank import OwnRead, find_of_optimizer, optimizer_steps
from shardwise.checkpointing.run_state import schedulers as schedules
from shardwise.checkpointing.saving.torch_format import capture_distcp, write_distcp
from shardwise.checkpointing.session import Session
from shardwise.comm import Group, JsonValue
from shardwise.convert.mapping import rename
from shardwise.disk.names import is_there
from shardwise.engine.load import LoadSource, OpenedLoad, open_load
from shardwise.engine.name_suggestions import listed
from shardwise.engine.records import ComponentRecord, Step, local_step, write_state
from shardwise.engine.replicas import comparison
from shardwise.engine.shards import shard_plan, write_shards
from shardwise.errors import CheckpointNotFoundError, MisuseError, ShardwiseError
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.schedule import left_to_others
from shardwise.sources.dcp_values import is_dcp
from shardwise.sources.sources import open_source
from shardwise.sources.state_files import has_state, joined, pack_state, read_state, split, unpack_state
from shardwise.stateful_wrappers import OptimizerState
from shardwise.stateful_wrappers.inner_optimizers import AnyOptimizer
from shardwise.stateful_wrappers.model import Model
from shardwise.stateful_wrappers.optimizer import OptimizerRecord
from shardwise.stateful_wrappers.optimizer_restore import OptimizerRestore, plan_restore
from shardwise.stateful_wrappers.replicas import RankRecord, agreed
from shardwise.stateful_wrappers.tensors import MeshRegister

_LOG = logging.getLogger(__name__)
OPTIMIZER_STATE = "optimizer"


_T = TypeVar("_T")
Optimizers = AnyOptimizer | Sequence[AnyOptimizer]
Schedulers = Stateful | Sequence[Stateful]


def as_list(given: _T | Sequence[_T] | None) -> list[_T]:
    """Optimizers or schedulers as a list."""
    if given is None:
        return []
    return list(given) if isinstance(given, Sequence) else [given]


def capture_optimizer(
    session: Session, optimizer: Optimizers, model: Model, scheduler: Schedulers | None, directory: Path
) -> list[Step]:
    """Capture optimizers and schedulers now and return the steps that write them. All ranks call."""
    group = session.group
    states: list[OptimizerState] = []

    def look() -> JsonValue:
        states.append(OptimizerState(optimizer, model))
        return cast(JsonValue, states[0].unsettled())

    unsettled = group.gather(look, "looking at the optimizer")
    [state] = states
    if any(unsettled):
        state.settle(cast("list[dict[str, list[object]]]", unsettled))

    def describe_states() -> tuple[bytes, bytes, bytes]:
        return joined(pack_state(state.record().to_state())), *schedules.capture_schedules(as_list(scheduler), model)

    write_states = _states_step(session, group.attempt(describe_states, "describing the optimizer"), directory)
    is_torchs = session.config.model_save_format == "torch_save"
    tensors: dict[str, torch.Tensor] = {}
    held: list[HeldTensor] = []

    def describe() -> list[HeldTensor]:
        found = state.held(MeshRegister(session.may_differ.of_state(state.owners())))
        if is_torchs:
            tensors.update(capture_distcp(session, "optim", state.state_dict()))
        held.extend(found if is_torchs else session.staged("optim", found))
        return held

    roster = session.agreement("optim").roster(describe, "describing the optimizer's tensors")
    own_steps = optimizer_steps(session, state, directory)
    if is_torchs:
        replicas, others = comparison(held, roster, group.rank), left_to_others(held, roster, group.rank)
        write = partial(write_distcp, tensors, directory, replicas=replicas, others=others)
        return [write_states, write, *own_steps]
    plan = shard_plan(held, roster, group, directory, "optim", "optim")
    return [write_states, lambda group: write_shards(plan, group, session.storage), *own_steps]


def _states_step(session: Session, own: Sequence[bytes], directory: Path) -> Step:
    """Merge the ranks' options, plain values and schedulers; the step writes them once. All ranks call."""
    group, may_differ = session.group, session.may_differ
    optimizers, attachments, states = schedules.gather_distinct(group, own)

    def differs(name: str) -> bool:
        # Not of a parameter with per-rank tensors: its state would mix the values of two ranks.
        return may_differ.all and not may_differ.is_own(name)

    def merge() -> tuple[dict[str, bytes], dict[str, bytes]]:
        records = [RankRecord(OptimizerRecord.from_state(unpack_state(split(o.blob))), o.ranks) for o in optimizers]
        merged = pack_state(OptimizerRecord.merge(agreed(records, differs)).to_state())
        return merged, schedules.merge_schedules(attachments, states, group.world_size) if group.is_main else {}

    merged, schedule = group.attempt(merge, "merging the optimizers' groups")

    def write() -> ComponentRecord:
        session.storage.make_directory(directory)
        record = write_state(session.storage, directory / OPTIMIZER_STATE, merged)
        return record + write_state(session.storage, directory / schedules.SCHEDULER_STATE, schedule)

    return local_step("writing the optimizer's groups", write, main_only=True)


@dataclass(frozen=True, slots=True)
class OpenedOptimizer:
    """Optimizers and schedulers matched with a checkpoint, on every rank; nothing has been changed yet.

    ``tensors`` are read into the optimizers' memory, ``own`` are this rank's alone. Where ``is_buffered`` (the same on
    every rank) they are read into separate memory before the optimizers load them.
    """

    session: Session
    plan: OptimizerRestore
    schedulers: schedules.FoundSchedules
    tensors: OpenedLoad | None
    own: OwnRead | None = None
    is_buffered: bool = False

    @property
    def unwanted(self) -> tuple[str, ...]:
        """Parameters with saved state that no rank's optimizer has."""
        names = self.tensors.unexpected if self.tensors is not None else ()
        return tuple(dict.fromkeys(self.plan.params_of.get(name, name) for name in names))

    def take_in(self, undos: Undos) -> None:
        """Set options and schedulers, and put the memory in place that `fill` fills. Local."""
        undos.add("the optimizer", self.plan.apply())
        for scheduler, state in self.schedulers.schedules:
            try:
                # A copy: torch's schedulers keep a reference to the state, and two may share one state.
                undos.load("the scheduler", scheduler, copy.deepcopy(state))
            except Exception as error:
                raise MisuseError(
                    f"the saved scheduler does not fit: {type(scheduler).__name__} refuses it with "
                    f"{type(error).__name__}: {error}",
                    hint="Pass the same scheduler as when the checkpoint was saved, or restore without one.",
                ) from error

    def fill(self, *, ahead: bool) -> None:
        """Read the state tensors: after `take_in`, but where ``is_buffered`` before (``ahead``). All ranks call."""
        if self.tensors is None or ahead != self.is_buffered:
            return
        self.tensors.read()
        if self.tensors.asked:
            with self.session.group.together("reading the optimizer's state of each rank's own tensors"):
                if self.own is not None:
                    self.own.read(self.session)


def open_optimizer(
    session: Session,
    optimizer: Optimizers,
    model: Model,
    scheduler: Schedulers | None,
    directory: Path,
    changes: foreign_optimizers.Changes,
) -> OpenedOptimizer:
    """Match optimizers (fresh or used) and schedulers with the saved ones. All ranks call; nothing is changed."""
    group, schedulers = session.group, as_list(scheduler)
    with group.together("looking at the optimizer") as buffered:
        state = OptimizerState(optimizer, model)
        buffered.flag = state.has_own_ways
    foreign = foreign_optimizers.find_foreign(session, directory, state, schedulers)
    names: dict[str, str] = {}
    compared: list[tuple[OptimizerRestore, schedules.FoundSchedules, OwnRead | None]] = []

    def compare() -> tuple[bool, list[int], Sequence[str], bool]:
        own = None
        if foreign is not None:
            plan, found, dcp_names = foreign.compared(state, schedulers, changes, buffered.any)
            names.update(dcp_names)
        else:
            plan, found = _compared(session, state, model, schedulers, directory, changes, buffered.any)
            own = find_of_optimizer(session, plan, directory)
        if own is not None:
            plan.keep({saved.spec.name for saved, _ in own.pairs}, own.parameters)
        compared.append((plan, found, own))
        return bool(plan.targets), sorted(found.used), found.chosen, bool(found.schedules)

    rows = group.gather(compare, f"comparing the optimizer with {directory}")
    [(plan, found, own)] = compared
    if plan.fresh:
        _LOG.warning(
            "the saved optimizer did not update %s, which start without state (allow_new_parameters)",
            listed(plan.fresh),
        )
    if any(row[3] for row in rows):
        used, chosen = {number for row in rows for number in row[1]}, [key for row in rows for key in row[2]]
        _check_schedules(found, used, chosen, directory, group)
    tensors = None
    if any(row[0] for row in rows):
        if foreign is not None:
            source = foreign.agreed(names, group)
        else:
            state_files = frozenset(f"{name}.safetensors" for name in (OPTIMIZER_STATE, schedules.SCHEDULER_STATE))
            source = open_source(directory, group, spread=True, exclude=state_files)
        # A frozen stage, or an optimizer over fewer parameters, may need less than was saved.
        options = replace(session.load_options, allow_unexpected=True)
        loaded = LoadSource(source)
        tensors = open_load(plan.held_as_saved, loaded, group, session.storage, options, lambda: own is not None)
    if foreign is not None:
        foreign_optimizers.count_in_tensors(plan)
    return OpenedOptimizer(session, plan, found, tensors, own, buffered.any)


def _check_schedules(
    found: schedules.FoundSchedules, used: Collection[int], chosen: Sequence[str], directory: Path, group: Group
) -> None:
    """Check that all ranks together have ``used`` every saved scheduler; tell what had to be ``chosen``."""
    with group.together("comparing schedulers"):
        left = [entry for number, entry in enumerate(found.entries) if number not in used]
        if left:  # restored on no rank
            count = sum(1 for entry in found.entries if left[0].ranks[0] in entry.ranks)
            which = f"; none is restored from that of {left[0].where}"
            raise schedules.other_number(count, len(found.schedules), directory, which)
    if chosen and group.is_main:
        _LOG.warning(
            "the schedulers in %s were saved by another number of ranks, and ranks that held the same parameters "
            "had different %s: every rank takes the lowest rank's",
            directory,
            ", ".join(dict.fromkeys(chosen)),
        )


def optimizer_components(directory: Path) -> list[str]:
    """Which of ``optimizer`` and ``scheduler`` a checkpoint's ``optim`` directory has. Local."""
    if not is_there(directory):
        return []
    stem = directory / OPTIMIZER_STATE
    if not has_state(stem) and is_dcp(directory):
        return [name for name in foreign_optimizers.foreign_components(directory) if name in ("optimizer", "scheduler")]
    # Without a record it is another tool's.
    has_optimizer = not has_state(stem) or bool(OptimizerRecord.from_state(read_state(stem)).groups)
    return ["optimizer"] * has_optimizer + ["scheduler"] * has_state(directory / schedules.SCHEDULER_STATE)


def _compared(
    session: Session,
    state: OptimizerState,
    model: Model,
    schedulers: Sequence[Stateful],
    directory: Path,
    changes: foreign_optimizers.Changes,
    is_buffered: bool,
) -> tuple[OptimizerRestore, schedules.FoundSchedules]:
    if not is_there(directory):
        raise CheckpointNotFoundError(
            "the checkpoint was saved without an optimizer",
            path=directory,
            hint="Restore without an optimizer, or choose a checkpoint that has one.",
        )
    record = OptimizerRecord.from_state(read_state(directory / OPTIMIZER_STATE))
    try:
        if changes.key_mapping:
            names = list(dict.fromkeys(name for group in record.groups for name in group.params))
            record = record.under(dict(zip(names, rename(names, changes.key_mapping), strict=True)))
        plan = plan_restore(state, record, allow_new=changes.allow_new, aside=is_buffered)
    except ShardwiseError as error:
        error.path = error.path or str(directory)
        raise
    if not schedulers:
        return plan, schedules.FoundSchedules()
    key_mapping = changes.key_mapping
    other = {**record.aliases, **state.saved_under}

    mapped: dict[str, str] = {}

    def renamed(name: str, saved: frozenset[str]) -> str:
        if name in saved:
            return name
        if key_mapping and not mapped:
            known = sorted(saved)
            mapped.update(zip(rename(known, key_mapping), known, strict=True))
        return mapped.get(name, other.get(name, name))

    own = schedules.attached(schedulers, model)
    found = schedules.saved_schedules(schedulers, own, renamed, record.schedulers, directory, session.group)
    return plan, found
