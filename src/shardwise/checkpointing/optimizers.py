"""Saving and loading optimizers and schedulers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, cast

from torch import nn
from torch.optim import Optimizer

from shardwise.checkpointing.context import Context
from shardwise.checkpointing.per_rank import OwnRead, find_optimizer, optimizer_steps
from shardwise.checkpointing.torch_format import save_distcp
from shardwise.comm import Group
from shardwise.engine.jobs import Step
from shardwise.engine.load import LoadOptions, load_tensors
from shardwise.engine.records import ComponentRecord
from shardwise.engine.replicas import Comparison, comparison
from shardwise.engine.shards import ShardPlan, write_shards
from shardwise.engine.statefiles import has_state, read_state, write_state
from shardwise.errors import CheckpointNotFoundError, MisuseError
from shardwise.io.sources import Source, open_source
from shardwise.io.statefiles import pack_state, unpack_state
from shardwise.plan.fragments import HeldTensor
from shardwise.plan.shards import ShardFile, plan_shards
from shardwise.stateful_wrappers import OptimizerState
from shardwise.stateful_wrappers.optimizer import OptimizerRecord
from shardwise.stateful_wrappers.tensors import MeshRegister

OPTIMIZER_STATE = "optimizer"
SCHEDULER_STATE = "scheduler"


class HasState(Protocol):
    """A scheduler, or anything with the two methods of a state."""

    def state_dict(self) -> dict[str, object]:
        """The state, as plain containers."""
        ...

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Take the state in."""
        ...


Optimizers = Optimizer | Sequence[Optimizer]
Schedulers = HasState | Sequence[HasState]


def as_list(schedulers: Schedulers | None) -> list[HasState]:
    """Schedulers as a list; none is an empty one."""
    if schedulers is None:
        return []
    return list(schedulers) if isinstance(schedulers, Sequence) else [schedulers]


class OptimizerSave:
    """One save of optimizers and schedulers."""

    def __init__(
        self,
        context: Context,
        optimizer: Optimizers,
        model: nn.Module | Sequence[nn.Module],
        scheduler: Schedulers | None,
        directory: Path,
    ) -> None:
        self._context = context
        self._directory = directory
        self._model = model
        self._optimizer = optimizer
        self._schedulers = as_list(scheduler)

    def steps(self) -> list[Step]:
        """Capture the state and return what is left to do. All ranks call."""
        context, group = self._context, self._context.group
        state: OptimizerState | None = None
        own: dict[str, bytes] = {}
        schedule: dict[str, bytes] = {}
        with group.together("describing the optimizer"):
            state = OptimizerState(self._optimizer, self._model)
            own = pack_state(state.record().to_state())
            if self._schedulers:
                schedule = pack_state([scheduler.state_dict() for scheduler in self._schedulers])
        assert state is not None
        merged: dict[str, bytes] = {}
        theirs = distinct(group, own)
        with group.together("merging the optimizers' groups"):
            records = [OptimizerRecord.from_state(unpack_state(packed)) for packed in theirs]
            merged = pack_state(OptimizerRecord.merge(records).to_state())

        def write_states(group: Group) -> ComponentRecord:
            record = ComponentRecord()
            with group.together("writing the optimizer's groups"):
                if group.is_main:
                    context.storage.make_directory(self._directory)
                    record = write_state(context.storage, self._directory / OPTIMIZER_STATE, merged)
                    if schedule:
                        record += write_state(context.storage, self._directory / SCHEDULER_STATE, schedule)
            return record

        is_torchs = context.config.model_save_format == "torch_save"
        held: list[HeldTensor] = []
        with group.together("describing the optimizer's tensors"):
            held = state.held(MeshRegister(context.may_differ.of_state(state.owners())))
            held = held if is_torchs else context.staged("optim", held)
        roster = context.optimizer_roster.roster(held)
        own_steps = optimizer_steps(context, state, self._directory)
        if is_torchs:
            write = partial(save_distcp, state, self._directory, held=held, roster=roster)
            return [write_states, write, *own_steps]
        files: tuple[ShardFile, ...] = ()
        replicas: tuple[Comparison, ...] = ()
        with group.together("planning the optimizer's files"):
            files = plan_shards(held, roster, group.rank, stem="optim")
            replicas = (comparison(held, roster, group.rank),)
        plan = ShardPlan(self._directory, "optim", roster, files, replicas=replicas)
        return [write_states, lambda group: write_shards(plan, group, context.storage, later=True), *own_steps]


def distinct(group: Group, own: dict[str, bytes]) -> list[dict[str, bytes]]:
    """Every different value among the ranks, in the order of the first rank that has it, on every rank.

    Ranks of one kind have the same value, so only their digests and one copy of each travel.
    """
    blob = b"".join(len(v).to_bytes(8, "little") + k.encode().ljust(16) + v for k, v in sorted(own.items()))
    digests = cast(list[str], group.gather_json(hashlib.blake2b(blob, digest_size=16).hexdigest(), "comparing states"))
    out = []
    for digest in dict.fromkeys(digests):
        source = digests.index(digest)
        raw = group.broadcast_bytes(blob if group.rank == source else b"", source, "exchanging states")
        out.append(_unblob(raw))
    return out


def _unblob(raw: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    position = 0
    while position < len(raw):
        size = int.from_bytes(raw[position : position + 8], "little")
        key = raw[position + 8 : position + 24].decode().strip()
        found[key] = raw[position + 24 : position + 24 + size]
        position += 24 + size
    return found


def load_optimizer(
    context: Context,
    optimizer: Optimizers,
    model: nn.Module | Sequence[nn.Module],
    scheduler: Schedulers | None,
    directory: Path,
) -> None:
    """Restore optimizers (fresh or used) and schedulers in place. All ranks call.

    Raises:
        CheckpointNotFoundError: The checkpoint has no optimizer or scheduler state.
        TensorError: The saved state does not fit the optimizer.
    """
    group = context.group
    schedulers = as_list(scheduler)
    state: OptimizerState | None = None
    own: OwnRead | None = None
    with group.together(f"restoring the optimizer's groups from {directory}") as owns:
        state = OptimizerState(optimizer, model)
        if not os.path.lexists(directory):
            raise CheckpointNotFoundError(
                "the checkpoint was saved without an optimizer",
                path=directory,
                hint="Restore without an optimizer, or choose a checkpoint that has one.",
            )
        record = OptimizerRecord.from_state(read_state(directory / OPTIMIZER_STATE))
        state.prepare(record)
        own = find_optimizer(context, state, directory)
        owns.flag = own is not None
        if schedulers:
            _load_schedulers(schedulers, directory)
    assert state is not None
    if not group.any(bool(state.state_dict()), "comparing optimizer states"):
        return
    source = open_source(directory, group, spread=True)
    source = _without_files(source, {f"{name}.safetensors" for name in (OPTIMIZER_STATE, SCHEDULER_STATE)})
    held: list[HeldTensor] = []
    with group.together("describing the optimizer"):
        held = state.held_as_saved(source.tensors.keys())
    # A frozen stage, or an optimizer over fewer parameters, may want less than what was saved.
    options = LoadOptions(allow_unexpected=True, threads=context.threads, sharing=context.sharing)
    load_tensors(held, source, group, context.storage, options)
    if owns.any:
        with group.together("reading the optimizer's state of each rank's own tensors"):
            if own is not None:
                own.read(context)
                state.keep_only({saved.spec.name for saved, _ in own.pairs}, own.parameters)


def _without_files(source: Source, names: set[str]) -> Source:
    drop = {number for number, file in enumerate(source.files) if file.name in names}
    if not drop:
        return source
    return source.without(
        name
        for name, tensor in source.tensors.items()
        if tensor.scattered is None and all(chunk.file in drop for chunk in tensor.chunks)
    )


def _load_schedulers(schedulers: Sequence[HasState], directory: Path) -> None:
    stem = directory / SCHEDULER_STATE
    if not has_state(stem):
        raise CheckpointNotFoundError(
            "the checkpoint was saved without a scheduler",
            path=stem.with_name(f"{SCHEDULER_STATE}.json"),
            hint="Restore without a scheduler, or choose a checkpoint that has one.",
        )
    states = cast(list[dict[str, object]], read_state(stem))
    if len(states) == 1 and len(schedulers) > 1:
        states = states * len(schedulers)
    if len(states) < len(schedulers):
        raise MisuseError(
            f"{len(states)} schedulers were saved and {len(schedulers)} are to be restored",
            path=directory,
            hint="Pass the same schedulers as when the checkpoint was saved.",
        )
    for scheduler, saved in zip(schedulers, states, strict=False):
        scheduler.load_state_dict(saved)
