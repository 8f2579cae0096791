"""Saving one whole checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from shardwise._version import __version__
from shardwise.checkpointing.arguments import check_arguments, check_mapping
from shardwise.checkpointing.averages import MODEL_EMA, Average
from shardwise.checkpointing.lifetime import Lifetime
from shardwise.checkpointing.optimizers import OptimizerSave, as_list
from shardwise.checkpointing.run_state.checkpoint_state import below, capture_extras
from shardwise.checkpointing.run_state.data_order import with_loader
from shardwise.checkpointing.saving.commits import Publication, check_metrics, warn_of_metrics
from shardwise.checkpointing.saving.components import model_save
from shardwise.checkpointing.saving.hooks import passed_addons
from shardwise.checkpointing.saving.request import WhatToSave
from shardwise.comm import Group, JsonValue
from shardwise.engine.jobs import SaveJob, Step
from shardwise.errors import MisuseError, StorageError
from shardwise.lifecycle import checkpoint_name, remove_leftovers, reserve, temporary_name
from shardwise.stateful_wrappers.model import Model

_LOG = logging.getLogger(__name__)


def save_checkpoint(life: Lifetime, what: WhatToSave, mistake: MisuseError | None) -> Path | None:
    """See `Checkpointer.save`. All ranks call.

    Args:
        life: The checkpointer's.
        what: What is to be saved.
        mistake: What is wrong with how it was asked for, where something is.
    """
    model, optimizer, scheduler = what.model, what.optimizer, what.scheduler
    session = life.begin(call := f"save(epoch {what.epoch}, step {what.step})")
    if not life.config.enabled:
        if mistake is not None:
            raise mistake
        return None
    life.ends = life.ends or what.is_final_checkpoint
    steers = optimizer is not None or bool(as_list(scheduler))
    numbers: dict[str, float] = {}
    extra_state: Mapping[str, object] = {}

    def look() -> str:
        nonlocal numbers, extra_state
        if mistake is not None:
            raise mistake
        check_arguments(model, optimizer, scheduler)
        life.looked(model, saves=True)
        check_mapping("metrics", what.metrics)
        check_mapping("extra_state", what.extra_state)
        extra_state = with_loader(dict(what.extra_state or {}), what.dataloader, session.group.world_size)
        if what.dataloader is not None:
            life.order.check_saved(what.dataloader, life.config.save_rng)
        if what.ema is not None:
            life.looked(what.ema, saves=True, is_run=False)
        numbers = check_metrics(what.metrics)
        return checkpoint_name(what.epoch, what.step)

    given = {"an optimizer or scheduler": steers, "is_final_checkpoint=True": what.is_final_checkpoint}
    given |= {"an ema": what.ema is not None, "a dataloader": what.dataloader is not None}
    turn = life.turn(call, look, given | passed_addons(life.addons))
    life.order.epoch = what.epoch
    if turn.skipped:
        return None
    if session.group.is_main:
        warn_of_metrics(numbers, life.config)
    name = checkpoint_name(what.epoch, what.step)
    temp, final = session.root / temporary_name(name), session.root / name
    with turn.raising_earlier(name, life.wait):
        publication = _publication(life, temp, final, what.epoch, what.step, numbers)
        make_room = partial(_reserve, life, name)
        try:
            save = model_save(
                life,
                model,
                temp / "model",
                what.tokenizer,
                what.peft_config,
                what.is_final_checkpoint,
                publication.reserved(make_room),
                optimizer,
            )
            steps = below("model", save.steps())
            closing = [*save.closing]
            if what.ema is not None:
                own, theirs = _ema_steps(life, what, what.ema, temp / MODEL_EMA)
                steps, closing = steps + own, closing + theirs
            if steers:
                chosen = [] if optimizer is None else optimizer
                steps += below("optim", OptimizerSave(session, chosen, model, scheduler, temp / "optim").steps())
            steps += capture_extras(session, temp, extra_state, life.order)
        except BaseException:
            publication.abandon(session.group)
            raise
        commit = partial(publication.commit, closing=closing)
        life.run(SaveJob(f"saving {final}", tuple(steps), commit, publication.abandon))
    return final


def _ema_steps(
    life: Lifetime, what: WhatToSave, ema: Model, directory: Path
) -> tuple[list[Step], list[Callable[[Group], None]]]:
    """Capture the average; what is left to do, and with what it ends. All ranks call."""
    session = life.session
    average: Average | None = None
    beside: list[Step] = []
    with session.group.together("looking at the averaged model"):
        average = Average.of(ema)
        beside = average.capture(directory, session.storage)
    assert average is not None
    further = session.further(MODEL_EMA)
    saving = model_save(
        life,
        average.model,
        directory,
        what.tokenizer,
        what.peft_config,
        what.is_final_checkpoint,
        lambda: None,
        session=further,
    )
    return below(MODEL_EMA, [*saving.steps(), *beside], MODEL_EMA), list(saving.closing)


def _publication(
    life: Lifetime, temp: Path, final: Path, epoch: int, step: int, metrics: Mapping[str, float]
) -> Publication:
    """What makes the checkpoint visible in the end. Local."""
    session = life.session
    info: dict[str, JsonValue] = {
        "shardwise": __version__,
        "epoch": epoch,
        "step": step,
        "world_size": session.group.world_size,
        "metrics": {key: value if math.isfinite(value) else None for key, value in metrics.items()},
    }
    return Publication(session, temp, final, info, metrics, life.line)


def _reserve(life: Lifetime, name: str) -> None:
    """Make the directory of a checkpoint to be; once also remove what interrupted saves left. Rank 0 calls."""
    if not life.is_tidied:
        try:
            active = [life.session.root / temporary_name(name)]  # whose claim is this very save's
            remove_leftovers(life.session.root, active=active, storage=life.storage)
        except StorageError as error:
            # Space that is not freed. Should this save lack it, or want that very name, it says so itself.
            _LOG.warning("what an interrupted save left could not be removed: %s", error)
    reserve(life.session.root, name, life.line.left_from, storage=life.storage)
    life.is_tidied = True
