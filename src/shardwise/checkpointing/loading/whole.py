"""Restoring whole checkpoints, and loading their components one at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from shardwise.checkpointing import optimizers
from shardwise.checkpointing.adapters import check_before_training
from shardwise.checkpointing.arguments import check_mapping, refuse_whole_adapter
from shardwise.checkpointing.averages import MODEL_EMA, Average
from shardwise.checkpointing.lifetime import Lifetime, check_same_call
from shardwise.checkpointing.loading import base_model
from shardwise.checkpointing.loading.adapters import OpenedAdapter, open_adapter
from shardwise.checkpointing.loading.foreign_optimizers import Changes, foreign_components, torch_leftovers
from shardwise.checkpointing.loading.models import OpenedModel, open_model
from shardwise.checkpointing.loading.restoring import Undos, overwriting, undone_on_failure
from shardwise.checkpointing.reports import Call, RestoreRecord
from shardwise.checkpointing.run_state.data_order import DataOrder, with_loader
from shardwise.checkpointing.run_state.extras import FoundExtras, find_extras, require_position, saved_names
from shardwise.checkpointing.session import Session
from shardwise.comm import Group
from shardwise.disk.names import is_directory
from shardwise.engine.name_suggestions import listed
from shardwise.engine.verify import VerifyLevel, check_checkpoint
from shardwise.lifecycle import Start, resolve
from shardwise.lifecycle.resolve import is_verifiable
from shardwise.sources.dcp_values import is_dcp
from shardwise.stateful_wrappers import OptimizerState
from shardwise.stateful_wrappers.model import Model
from shardwise.timing import Recording, phase

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Opened:
    """All state of a run matched with a checkpoint, on every rank; nothing has been changed yet.

    Of an average there is the model, and what puts its wrapper's saved tensors in place.
    """

    model: OpenedModel | OpenedAdapter
    averaged: tuple[OpenedModel | OpenedAdapter, Callable[[Undos], None]] | None
    steering: optimizers.OpenedOptimizer | None
    extras: FoundExtras

    def restore(self, group: Group, order: DataOrder, recording: Recording) -> int:
        """Restore everything; returns the bytes that all ranks have read. All ranks call.

        Objects with their own loading code come first, since they may refuse: then every rank undoes its changes.
        After that only reading can fail, and the error says what is partly overwritten.
        """
        if self.steering is not None:
            self.steering.fill(ahead=True)
        with (
            phase("install"),
            undone_on_failure() as undos,
            group.together("taking in options, schedulers and extra state"),
        ):
            if self.steering is not None:
                self.steering.take_in(undos)
            self.extras.extra.take_in(undos)
            if self.averaged is not None:
                self.averaged[1](undos)
        with overwriting("the run's state"):
            self.model.fill()
            if self.averaged is not None:
                self.averaged[0].fill()
            if self.steering is not None:
                self.steering.fill(ahead=False)
            self.extras.fill(group)

            def finish() -> int:
                self.extras.set_generators(order)
                return recording.nbytes

            return sum(group.gather(finish, "setting the random number generators"))


@dataclass(frozen=True, slots=True)
class WhatToRestore:
    """The arguments of `Checkpointer.restore`, which says what they are."""

    model: Model
    optimizer: optimizers.Optimizers | None
    scheduler: optimizers.Schedulers | None
    restore_from: str | Path | int
    extra_state: MutableMapping[str, object]
    verify: VerifyLevel
    changes: Changes
    ema: Model | None
    dataloader: object | None


def restore_checkpoint(life: Lifetime, what: WhatToRestore, told: Call) -> RestoreRecord | None:
    """See `Checkpointer.restore`. All ranks call."""
    session = life.begin(call := f"restore({what.restore_from})")
    life.wait()
    steers = what.optimizer is not None or bool(optimizers.as_list(what.scheduler))
    given = {
        "an optimizer or scheduler": steers,
        "verify='digests'": what.verify == "digests",
        "an ema": what.ema is not None,
        "a dataloader": what.dataloader is not None,
        **what.changes.given(),
    }

    def look() -> str:
        nonlocal what
        check_mapping("extra_state", what.extra_state, MutableMapping)
        check_mapping("key_mapping", what.changes.key_mapping)
        extra_state = with_loader(what.extra_state, what.dataloader, session.group.world_size)
        what = replace(what, extra_state=extra_state)
        if what.ema is not None:
            life.looked(what.ema, is_run=False)
        name = life.looked(what.model, what.optimizer, what.scheduler)
        config = life.config
        if config.enabled and not config.is_peft and session.may_export and config.verify_export:
            refuse_whole_adapter([what.model] if isinstance(what.model, nn.Module) else what.model)
        return name

    check_same_call(call, look, given, session.group)
    if life.config.enabled:
        session.base_path()  # a base that later saves would not find is an error now, not after an hour
        if life.config.is_peft:
            check_before_training(session, what.model, is_adapted=True)
    starts: list[Start] = []
    with phase("resolve"):
        record = _locate(session, what.restore_from, starts.append)
    if record is None:
        with session.group.together("looking at the optimizer"):
            if what.optimizer is not None and life.config.enabled:
                state = OptimizerState(what.optimizer, what.model)
                for _, options in state.groups():
                    state.names(options)  # the model has them, or no save would be possible
        life.allocate_staging(what.model, what.optimizer)
        return None
    # All checks come before the first byte is overwritten.
    opened, left = _open(life, what, record.path, steers)
    total = opened.restore(session.group, life.order, told.recording)
    life.allocate_staging(what.model, what.optimizer)
    life.line.start, life.line.restored = next(iter(starts), None), True
    if record.epoch is not None:
        life.order.epoch = record.epoch
    told.over(session.group, record.path, record.epoch, record.step, total)
    fresh = () if opened.steering is None else tuple(opened.steering.plan.fresh)
    return replace(record, unrestored=left, fresh=fresh)


def _open(life: Lifetime, what: WhatToRestore, path: Path, steers: bool) -> tuple[_Opened, tuple[str, ...]]:
    """Match the run with a checkpoint; also names what stays unrestored. All ranks call; nothing is changed."""
    session = life.session
    # As in a save, a rank may have states that other ranks lack.
    extras = session.group.any(bool(what.extra_state), "comparing what is to be restored")
    wanted = {"optim": steers, "extra": extras, "rng": life.config.save_rng, MODEL_EMA: what.ema is not None}
    components = ["model", *(name for name, is_wanted in wanted.items() if is_wanted)]
    check_checkpoint(path, what.verify, session.group, life.storage, components=components, threads=session.threads)
    # The model is in a directory of its own, or in the DCP directory that holds everything.
    is_one = session.group.broadcast_result(
        lambda: not is_directory(path / "model") and is_dcp(path), f"looking into {path}"
    )
    model = _open_component(session, what.model, path if is_one else path / "model", what.changes.key_mapping)
    averaged = None
    if what.ema is not None:
        with session.group.together("looking at the averaged model"):
            average = Average.of(what.ema)
            saved = average.find(path / MODEL_EMA)
        theirs = _open_component(session.of_model(MODEL_EMA), average.model, path / MODEL_EMA, what.changes.key_mapping)
        averaged = theirs, partial(average.take_in, saved)
    steering: optimizers.OpenedOptimizer | None = None
    if steers:
        optimizer = [] if what.optimizer is None else what.optimizer
        steering = optimizers.open_optimizer(
            session, optimizer, what.model, what.scheduler, path / "optim", what.changes
        )
    found = find_extras(session, path, what.extra_state)
    if what.dataloader is not None:
        require_position(found, what.dataloader, path, session.group)
    taken = ["optimizer"] * bool(optimizers.as_list(what.optimizer)) + ["scheduler"] * bool(
        optimizers.as_list(what.scheduler)
    )
    taken += ["ema"] * (what.ema is not None) + [*what.extra_state, *found.generators.values]
    partly = [f"optimizer state of {listed(steering.unwanted)}"] if steering and steering.unwanted else []
    below_name = model.direct.source.plain.below if isinstance(model, OpenedModel) else None
    left = _unrestored(session, path, found, taken, partly, below_name)
    return _Opened(model, averaged, steering, found), left


def load_model(
    life: Lifetime,
    model: Model,
    model_path: str | Path,
    is_init_step: bool,
    key_mapping: Mapping[str, str] | None,
    allow_checkpoint_key_subset: bool,
) -> None:
    """See `Checkpointer.load_model`. All ranks call."""
    path = Path(model_path).absolute()
    with life.reports.call("load_model") as told:
        life.wait()
        session = life.begin(call := f"load_model({path})")
        given = {"is_init_step=True": is_init_step, f"key_mapping={key_mapping}": bool(key_mapping)}
        check_same_call(call, lambda: life.looked(model, is_run=not is_init_step), given, session.group)
        if is_init_step:
            parts = [model] if isinstance(model, nn.Module) else list(model)
            base_model.fill_from_base(
                session, parts, path, key_mapping=key_mapping, allow_missing=allow_checkpoint_key_subset
            )
        else:
            opened = _open_component(session, model, path, key_mapping, allow_checkpoint_key_subset)
            with overwriting("the model"):
                opened.fill()
        told.over(session.group, path)


def load_optimizer(
    life: Lifetime,
    optimizer: optimizers.Optimizers,
    model: Model,
    weights_path: str | Path,
    scheduler: optimizers.Schedulers | None,
    changes: Changes,
) -> None:
    """See `Checkpointer.load_optimizer`. All ranks call."""
    place = Path(weights_path).absolute() / "optim"
    with life.reports.call("load_optimizer") as told:
        life.wait()
        session = life.begin(call := f"load_optimizer({place.parent})")
        check_same_call(call, lambda: life.looked(model, optimizer, scheduler), changes.given(), session.group)
        opened = optimizers.open_optimizer(session, optimizer, model, scheduler, place, changes)
        opened.fill(ahead=True)
        with undone_on_failure() as undos, session.group.together("setting the optimizer's options"):
            opened.take_in(undos)
        with overwriting("the optimizer's state"):
            opened.fill(ahead=False)
        told.over(session.group, place)


def load_base_model(
    life: Lifetime, model: Model, device: torch.device, root_dir: str | Path | None, model_name: str | None, loads: bool
) -> None:
    """See `Checkpointer.load_base_model`. All ranks call."""
    with life.reports.call("load_base_model") as told:
        session = life.begin(call := f"load_base_model({model_name})")
        life.wait()
        given = {"load_base_model=True": loads, "a model_name": bool(model_name)}
        check_same_call(call, lambda: life.looked(model, is_run=False), given, session.group)
        base_model.load_base_model(session, model, device, root_dir, model_name, loads)
        if life.config.is_peft and life.config.enabled:
            check_before_training(session, model, is_adapted=False)
        life.allocate_staging(model)
        if loads and model_name is not None:
            told.over(session.group, Path(model_name))


def _open_component(
    session: Session, model: Model, path: Path, key_mapping: Mapping[str, str] | None, allow_missing: bool = False
) -> OpenedModel | OpenedAdapter:
    """Compare a model, or its adapters, with a checkpoint's. All ranks call; nothing is changed."""
    if session.config.is_peft:
        return open_adapter(session, model, path, key_mapping, allow_missing)
    options = replace(session.load_options, allow_missing=allow_missing)
    return open_model(session, model, path, key_mapping=key_mapping, options=options)


def _locate(session: Session, restore_from: str | Path | int, seen: Callable[[Start], None]) -> RestoreRecord | None:
    """Resolve a checkpoint on rank 0, which calls ``seen`` with it, and broadcast the result. All ranks call."""

    def find() -> tuple[str, int | None, int | None, dict[str, float]] | None:
        found = resolve(session.root, restore_from)
        if found is None:
            return None
        seen(Start.at(found.path))
        inside = found.path.is_relative_to(session.root)
        path = found.path.relative_to(session.root) if inside else found.path
        return str(path), found.epoch, found.step, dict(found.metrics)

    found = session.group.broadcast_result(find, f"looking for {restore_from}")
    if found is None:
        return None
    path, epoch, step, metrics = found
    # Below each rank's own root, which may be mounted elsewhere than rank 0's.
    return RestoreRecord(epoch, step, session.root / path, metrics)


def _unrestored(
    session: Session,
    directory: Path,
    found: FoundExtras,
    given: Sequence[str],
    partly: Sequence[str],
    model_place: str | None = None,
) -> tuple[str, ...]:
    """Names of states in the checkpoint that this run does not load; rank 0 logs them once. All ranks call.

    This rank restores what is in ``given``; ``partly`` has parts of that which no rank loads. In a DCP directory with
    more than a model, ``model_place`` is the prefix of the model's names.
    """
    group = session.group

    def describe() -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
        has: list[str] = []
        if group.is_main:  # the states in the checkpoint beside its model
            if not is_verifiable(directory):  # another tool's
                has += [*foreign_components(directory, model_place), *torch_leftovers(directory)]
            has += ["ema"] * is_directory(directory / MODEL_EMA) + optimizers.optimizer_components(directory / "optim")
            has += [*saved_names(directory / "extra"), *saved_names(directory / "rng")]
        return has, [*found.extra.skipped, *found.generators.skipped], given

    rows = group.gather(describe, "comparing what is restored")
    wanted = {name for _, _, theirs in rows for name in theirs}
    left = [name for name in rows[0][0] if name not in wanted] + [*partly]
    skipped = list(dict.fromkeys(name for _, theirs, _ in rows for name in theirs))
    if left and group.is_main:
        _LOG.warning("%s also has %s, which restore() was not given: left as it is", directory, ", ".join(left))
    if skipped and group.is_main:
        _LOG.warning("saved on another number of ranks and left as they are: %s", ", ".join(skipped))
    return tuple(dict.fromkeys([*left, *skipped]))
