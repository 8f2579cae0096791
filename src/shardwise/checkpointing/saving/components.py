"""Saving one component of a checkpoint at a time: a model, or an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from shardwise._version import __version__
from shardwise.addons.base import SavesPretrained
from shardwise.checkpointing.lifetime import Lifetime
from shardwise.checkpointing.optimizers import Optimizers, Schedulers, capture_optimizer
from shardwise.checkpointing.reports import Call, Outcome
from shardwise.checkpointing.saving.adapters import AdapterSave
from shardwise.checkpointing.saving.commits import Closing
from shardwise.checkpointing.saving.hooks import leading_own, passed_addons
from shardwise.checkpointing.saving.models import ModelSave
from shardwise.checkpointing.saving.standalone import Replacement
from shardwise.checkpointing.session import Session
from shardwise.comm import Group
from shardwise.engine.jobs import Commit
from shardwise.engine.records import ComponentRecord
from shardwise.stateful_wrappers.model import Model


def save_model(
    life: Lifetime,
    model: Model,
    weights_path: str | Path,
    peft_config: object | None,
    tokenizer: SavesPretrained | None,
    is_final_checkpoint: bool,
) -> None:
    """See `Checkpointer.save_model`. All ranks call."""
    with life.reports.call("save_model") as told:
        _save_model(life, model, Path(weights_path).absolute(), peft_config, tokenizer, is_final_checkpoint, told)


def _save_model(
    life: Lifetime,
    model: Model,
    weights_path: Path,
    peft_config: object | None,
    tokenizer: SavesPretrained | None,
    is_final_checkpoint: bool,
    told: Call,
) -> None:
    session = life.begin(call := f"save_model({weights_path})")
    if not life.config.enabled:
        return
    life.ends = life.ends or is_final_checkpoint
    given = {"is_final_checkpoint=True": is_final_checkpoint} | passed_addons(life.addons)
    turn = life.turn(call, lambda: life.looked(model, saves=True), given)
    if turn.skipped:
        return
    target = Replacement(session, weights_path / "model", {"shardwise": __version__})
    with life.saving(f"{weights_path}/model", target.place, turn, target.abandon) as run:
        save = model_save(life, model, target.temp, tokenizer, peft_config, is_final_checkpoint, target.reserve)
        steps = save.steps()
        run(steps, _committed(target, told, save.closing))


def save_optimizer(
    life: Lifetime, optimizer: Optimizers, model: Model, weights_path: str | Path, scheduler: Schedulers | None
) -> None:
    """See `Checkpointer.save_optimizer`. All ranks call."""
    with life.reports.call("save_optimizer") as told:
        session = life.begin(call := f"save_optimizer({weights_path})")
        if not life.config.enabled:
            return
        turn = life.turn(call, lambda: life.looked(model, optimizer, scheduler, saves=True), {})
        if turn.skipped:
            return
        target = Replacement(session, Path(weights_path).absolute() / "optim", {"shardwise": __version__})
        with life.saving(f"{weights_path}/optim", target.place, turn, target.abandon) as run:
            with session.group.together(f"preparing {weights_path}/optim"):
                if session.group.is_main:
                    target.reserve()
            run(capture_optimizer(session, optimizer, model, scheduler, target.temp), _committed(target, told))


def _committed(target: Replacement, told: Call, closing: Closing = ()) -> Commit:
    """The commit of a component, which then tells of the save."""

    def commit(group: Group, record: ComponentRecord) -> None:
        target.commit(group, record, closing)
        told.over(Outcome(group, target.place, total_bytes=target.total_bytes))

    return commit


def model_save(
    life: Lifetime,
    model: Model,
    directory: Path,
    tokenizer: SavesPretrained | None,
    peft_config: object | None,
    is_final: bool,
    reserve: Callable[[], None],
    optimizer: Optimizers | None = None,
    session: Session | None = None,
) -> ModelSave | AdapterSave:
    """One save of a model, or of its adapters. All ranks call."""
    kind = partial(AdapterSave, optimizer=optimizer) if life.config.is_peft else ModelSave
    # Users' own hooks are for the model alone: they may write to one place.
    addons = life.addons if session is None or life.config.is_peft else life.addons[: leading_own(life.addons)]
    return kind(
        session or life.session,
        model,
        directory,
        addons,
        tokenizer=tokenizer,
        peft_config=peft_config,
        is_final=is_final,
        reserve=reserve,
    )
