"""Restoring whole checkpoints, and loading their components one at a time."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from shardwise.checkpointing.arguments import check_mapping
from shardwise.checkpointing.averages import MODEL_EMA, Average, FoundAveraging
from shardwise.checkpointing.calls import check_same_call
from shardwise.checkpointing.lifetime import Lifetime
from shardwise.checkpointing.loading import base_model
from shardwise.checkpointing.loading.foreign_optimizers import Changes
from shardwise.checkpointing.loading.models import OpenedModel, open_model
from shardwise.checkpointing.loading.restoring import overwriting, undone_on_failure
from shardwise.checkpointing.optimizers import (
    OpenedOptimizer,
    Optimizers,
    Schedulers,
    as_list,
    open_optimizer,
    several,
)
from shardwise.checkpointing.optimizers import load_optimizer as restore_optimizer
from shardwise.checkpointing.records import RestoreRecord
from shardwise.checkpointing.run_state.checkpoint_state import (
    FoundExtras,
    find_extras,
    locate,
    model_place,
    require_position,
    unrestored,
)
from shardwise.checkpointing.run_state.data_order import DataOrder, with_loader
from shardwise.checkpointing.saving.adapters import OpenedAdapter, check_before_training, open_adapter
from shardwise.checkpointing.saving.torch_format import tensors_alone
from shardwise.checkpointing.session import Session
from shardwise.comm import Group
from shardwise.engine.load import LoadOptions
from shardwise.engine.name_suggestions import listed
from shardwise.engine.verify import VerifyLevel, check_checkpoint
from shardwise.lifecycle import Start
from shardwise.stateful_wrappers import ModelState, OptimizerState
from shardwise.stateful_wrappers.model import Model


@dataclass(frozen=True, slots=True)
class _Opened:
    """All state of a run matched with a checkpoint, on every rank; nothing has been changed yet.

    Attributes:
        model: The model, or its adapters.
        averaged: The averaged model, with the state of its wrapper.
        steering: Optimizers and schedulers.
        extras: Extra state and generators.
    """

    model: OpenedModel | OpenedAdapter
    averaged: tuple[OpenedModel | OpenedAdapter, FoundAveraging] | None
    steering: OpenedOptimizer | None
    extras: FoundExtras

    def restore(self, group: Group, order: DataOrder) -> None:
        """Restore everything. All ranks call.

        Objects with loading code of their own come first, since they may refuse: then every rank undoes its changes.
        After that only reading can fail, and the error says what is partly overwritten.
        """
        if self.steering is not None:
            self.steering.read_buffered()
        with undone_on_failure() as undos, group.together("taking in options, schedulers and extra state"):
            if self.steering is not None:
                self.steering.take_in(undos)
            self.extras.extra.take_in(undos)
            if self.averaged is not None:
                self.averaged[1].take_in(undos)
        with overwriting("the run's state"):
            self.model.fill()
            if self.averaged is not None:
                self.averaged[0].fill()
            if self.steering is not None:
                self.steering.fill()
            self.extras.spread.fill(group)
            with group.together("setting the random number generators"):
                self.extras.set_generators(order)


@dataclass(frozen=True, slots=True)
class WhatToRestore:
    """The arguments of `Checkpointer.restore`, which says what they are."""

    model: Model
    optimizer: Optimizers | None
    scheduler: Schedulers | None
    restore_from: str | Path | int
    extra_state: MutableMapping[str, object] | None
    verify: VerifyLevel
    key_mapping: Mapping[str, str] | None
    ema: Model | None
    allow_new_parameters: bool
    dataloader: object | None = None


def restore_checkpoint(life: Lifetime, what: WhatToRestore) -> RestoreRecord | None:
    """See `Checkpointer.restore`. All ranks call."""
    model, optimizer, scheduler, ema = what.model, what.optimizer, what.scheduler, what.ema
    key_mapping = what.key_mapping
    extra_state: MutableMapping[str, object] = {}
    session = life.begin(call := f"restore({what.restore_from})")
    life.wait()
    steers = optimizer is not None or bool(as_list(scheduler))
    given = {
        "an optimizer or scheduler": steers,
        "verify='digests'": what.verify == "digests",
        f"key_mapping={key_mapping}": bool(key_mapping),
        "an ema": ema is not None,
        "allow_new_parameters=True": what.allow_new_parameters,
        "a dataloader": what.dataloader is not None,
    }

    def look() -> str:
        nonlocal extra_state
        check_mapping("extra_state", what.extra_state)
        given_state = what.extra_state if what.extra_state is not None else {}
        extra_state = with_loader(given_state, what.dataloader, session.group.world_size)
        check_mapping("key_mapping", key_mapping)
        if ema is not None:
            life.looked(ema, is_run=False)
        return life.looked(model, optimizer, scheduler, "checkpoint")

    check_same_call(call, look, given, session.group)
    if life.config.enabled:
        session.base_path()  # a base that later saves would not find is an error now, not after an hour
        if life.config.is_peft:
            check_before_training(session, model, is_adapted=True)
    starts: list[Start] = []
    record = locate(session, what.restore_from, starts.append)
    if record is None:
        allocate_staging(life, model, optimizer)
        return None
    path = record.path
    # As in a save, a rank may have states that other ranks lack.
    extras = session.group.any(bool(extra_state), "comparing what is to be restored")
    wanted = {"model": True, "optim": steers, "extra": extras, "rng": life.config.save_rng}
    wanted[MODEL_EMA] = ema is not None
    components = [name for name, is_wanted in wanted.items() if is_wanted]
    check_checkpoint(path, what.verify, session.group, life.storage, components=components, threads=session.threads)
    # All checks come before the first byte is overwritten.
    opened = open_component(life, model, model_place(path, session.group), key_mapping)
    averaged = _open_ema(life, ema, path / MODEL_EMA) if ema is not None else None
    steering: OpenedOptimizer | None = None
    if steers:
        changes = Changes(key_mapping, what.allow_new_parameters)
        chosen = [] if optimizer is None else optimizer
        steering = open_optimizer(session, chosen, model, scheduler, path / "optim", changes)
    found = find_extras(session, path, extra_state)
    if what.dataloader is not None:
        require_position(found, what.dataloader, path, session.group)
    taken = ["optimizer"] * bool(several(optimizer)) + ["scheduler"] * bool(as_list(scheduler))
    taken += ["ema"] * (ema is not None)
    taken += [*extra_state, *found.generators.values]
    partly = [f"optimizer state of {listed(steering.unwanted)}"] if steering and steering.unwanted else []
    below_name = opened.direct.source.below if isinstance(opened, OpenedModel) else None
    left = unrestored(session, path, found, taken, partly, below_name)
    _Opened(opened, averaged, steering, found).restore(session.group, life.order)
    allocate_staging(life, model, optimizer)
    life.line.start, life.line.restored = next(iter(starts), None), True
    if record.epoch is not None:
        life.order.epoch = record.epoch
    return replace(record, unrestored=left, fresh=tuple(steering.plan.fresh) if steering is not None else ())


def load_model(
    life: Lifetime,
    model: Model,
    model_path: str | Path,
    is_init_step: bool,
    key_mapping: Mapping[str, str] | None,
    allow_checkpoint_key_subset: bool,
) -> None:
    """See `Checkpointer.load_model`. All ranks call."""
    life.wait()
    session = life.begin(call := f"load_model({model_path})")
    given = {"is_init_step=True": is_init_step, f"key_mapping={key_mapping}": bool(key_mapping)}
    check_same_call(call, lambda: life.looked(model, is_run=not is_init_step), given, session.group)
    path = Path(model_path).absolute()
    if is_init_step:
        parts = [model] if isinstance(model, nn.Module) else list(model)
        base_model.fill_from_base(
            session, parts, path, key_mapping=key_mapping, allow_missing=allow_checkpoint_key_subset
        )
        return
    opened = open_component(life, model, path, key_mapping, allow_checkpoint_key_subset)
    with overwriting("the model"):
        opened.fill()


def load_optimizer(
    life: Lifetime,
    optimizer: Optimizers,
    model: Model,
    weights_path: str | Path,
    scheduler: Schedulers | None,
    changes: Changes,
) -> None:
    """See `Checkpointer.load_optimizer`. All ranks call."""
    life.wait()
    session = life.begin(call := f"load_optimizer({weights_path})")
    given = {
        f"key_mapping={changes.key_mapping}": bool(changes.key_mapping),
        "allow_new_parameters=True": changes.allow_new,
    }
    check_same_call(call, lambda: life.looked(model, optimizer, scheduler), given, session.group)
    restore_optimizer(session, optimizer, model, scheduler, Path(weights_path).absolute() / "optim", changes)


def load_base_model(
    life: Lifetime,
    model: Model,
    device: torch.device,
    root_dir: str | Path | None,
    model_name: str | None,
    loads: bool,
) -> None:
    """See `Checkpointer.load_base_model`. All ranks call."""
    session = life.begin(call := f"load_base_model({model_name})")
    life.wait()
    given = {"load_base_model=True": loads}
    check_same_call(call, lambda: life.looked(model, is_run=False), given, session.group)
    base_model.load_base_model(session, model, device, root_dir, model_name, loads)
    if life.config.is_peft and life.config.enabled:
        check_before_training(session, model, is_adapted=False)
    allocate_staging(life, model)


def allocate_staging(life: Lifetime, model: Model, optimizer: Optimizers | None = None) -> None:
    """As `Checkpointer.allocate_staging`, within another call. All ranks call."""
    session = life.session
    stager = session.stager
    if stager is None or life.config.is_peft:
        return
    with session.group.together("making room for asynchronous saves"):
        if life.config.model_save_format == "torch_save":
            stager.allocate_tensors("model", tensors_alone(ModelState(model).state_dict()))
            if optimizer is not None:
                stager.allocate_tensors("optim", OptimizerState(optimizer, model).state_dict())
            return
        captured = session.names.capture(ModelState(model), load=True)
        stager.allocate("model", [*captured.held, *captured.excluded])
        if optimizer is not None:
            stager.allocate("optim", OptimizerState(optimizer, model).held())


def open_component(
    life: Lifetime,
    model: Model,
    path: Path,
    key_mapping: Mapping[str, str] | None = None,
    allow_missing: bool = False,
    session: Session | None = None,
) -> OpenedModel | OpenedAdapter:
    """Compare a model, or its adapters, with a checkpoint's. All ranks call; nothing is changed."""
    session = session or life.session
    if life.config.is_peft:
        return open_adapter(session, model, path, key_mapping=key_mapping, allow_missing=allow_missing)
    options = LoadOptions(allow_missing, threads=session.threads, sharing=session.sharing)
    return open_model(session, model, path, key_mapping=key_mapping, options=options)


def _open_ema(life: Lifetime, ema: Model, directory: Path) -> tuple[OpenedModel | OpenedAdapter, FoundAveraging]:
    """Compare an average with a checkpoint's. All ranks call; nothing is changed."""
    session = life.session
    average: Average | None = None
    found: FoundAveraging | None = None
    with session.group.together("looking at the averaged model"):
        average = Average.of(ema)
        found = average.find(directory)
    assert average is not None
    assert found is not None
    return open_component(life, average.model, directory, session=session.further(MODEL_EMA)), found
