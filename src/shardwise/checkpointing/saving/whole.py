"""Saving a whole checkpoint, or one component (``weights_path/model``) for loops that publish by themselves.

A component is written beside its place and moved there in one step: a re-save leaves no files of an earlier split, and
an interrupted save leaves the earlier component whole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

from torch import nn

from shardwise._version import __version__
from shardwise.addons.base import SavesPretrained
from shardwise.checkpointing.arguments import check_mapping, check_tokenizer, whole_number
from shardwise.checkpointing.averages import MODEL_EMA, Average
from shardwise.checkpointing.lifetime import Lifetime, Turn
from shardwise.checkpointing.optimizers import Optimizers, Schedulers, as_list, capture_optimizer
from shardwise.checkpointing.reports import Call
from shardwise.checkpointing.run_state.data_order import with_loader
from shardwise.checkpointing.run_state.extras import BATCHES, capture_steps
from shardwise.checkpointing.run_state.generators import RandomState
from shardwise.checkpointing.saving.adapters import AdapterSave
from shardwise.checkpointing.saving.commits import Closing, Publication, Replacement, check_metrics, warn_of_metrics
from shardwise.checkpointing.saving.hooks import ModelRequest, leading_own, passed_addons
from shardwise.checkpointing.saving.models import ModelSave
from shardwise.comm import JsonValue
from shardwise.engine.records import Step, below
from shardwise.errors import MisuseError, StorageError
from shardwise.lifecycle import checkpoint_name, remove_leftovers, reserve, temporary_name
from shardwise.stateful_wrappers.model import Model
from shardwise.timing import phase

_LOG = logging.getLogger(__name__)


def save_checkpoint(life: Lifetime, what: WhatToSave, mistake: MisuseError | None, told: Call) -> Path | None:
    """See `Checkpointer.save`; a ``mistake`` in the arguments is raised where all ranks receive it. All ranks call."""
    session = life.begin(call := f"save(epoch {what.epoch}, step {what.step})")
    if not life.config.enabled:
        if mistake is not None:
            raise mistake
        return None
    life.ends = life.ends or what.is_final_checkpoint
    steers = what.optimizer is not None or bool(as_list(what.scheduler))
    numbers: dict[str, float] = {}

    def look() -> str:
        nonlocal numbers, what
        if mistake is not None:
            raise mistake
        life.looked(what.model, what.optimizer, what.scheduler, saves=True)
        check_tokenizer(what.tokenizer)
        check_mapping("metrics", what.metrics)
        check_mapping("extra_state", what.extra_state)
        extra_state = with_loader(dict(what.extra_state or {}), what.dataloader, session.group.world_size)
        what = replace(what, extra_state=extra_state)
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
    final = session.root / name
    info: dict[str, JsonValue] = {
        "shardwise": __version__,
        "epoch": what.epoch,
        "step": what.step,
        "world_size": session.group.world_size,
        "metrics": {key: value if math.isfinite(value) else None for key, value in numbers.items()},
    }
    target = Publication(session, final, info, numbers, life.line, partial(_reserve, life, name))
    life.save(target, lambda: _capture(life, what, target), turn.earlier, told, what.epoch, what.step)
    return final


@phase("capture")
def _capture(life: Lifetime, what: WhatToSave, target: Publication) -> tuple[list[Step], Closing]:
    """Capture everything now; returns the steps that write it, and the local work at their end. All ranks call."""
    optimizer, scheduler, temp = what.optimizer, what.scheduler, target.temp
    request = ModelRequest(
        life.session,
        what.model,
        temp / "model",
        addons=life.addons,
        tokenizer=what.tokenizer,
        peft_config=what.peft_config,
        is_final=what.is_final_checkpoint,
        reserve=target.reserve,
        optimizer=optimizer,
    )
    save = model_save(request)
    steps = below("model", save.steps())
    closing = save.take_closing()
    if what.ema is not None:
        place, session = temp / MODEL_EMA, life.session
        with session.group.together("looking at the averaged model"):
            average = Average.of(what.ema)
            beside = average.capture(place, session.storage)
        # Users' own hooks are for the model alone: they may write to one place.
        addons = life.addons if session.config.is_peft else life.addons[: leading_own(life.addons)]
        request = replace(request, session=session.of_model(MODEL_EMA), model=average.model, directory=place)
        theirs = model_save(replace(request, addons=addons, reserve=lambda: None, optimizer=None))
        steps += below(MODEL_EMA, [*theirs.steps(), *beside], MODEL_EMA)
        closing = [*closing, *theirs.take_closing()]
    if optimizer is not None or as_list(scheduler):
        chosen = [] if optimizer is None else optimizer
        steps += below("optim", capture_optimizer(life.session, chosen, what.model, scheduler, temp / "optim"))
    generators: dict[str, object] = {"rng": RandomState()} if life.config.save_rng else {}
    positions = life.order.state(life.session.group.rank) if generators else None
    if positions is not None:
        generators[BATCHES] = positions
    steps += below("rng", capture_steps(life.session, generators, temp / "rng"))
    steps += below("extra", capture_steps(life.session, what.extra_state or {}, temp / "extra"))
    return steps, closing


def _reserve(life: Lifetime, name: str) -> None:
    """Make a checkpoint's directory; the first time also remove what interrupted saves left. Rank 0 calls."""
    if not life.is_tidied:
        try:
            active = [life.session.root / temporary_name(name)]  # whose claim is this very save's
            remove_leftovers(life.session.root, active=active)
        except StorageError as error:
            # The space is not freed. If this save lacks it, or needs that very name, it fails with an error of its own.
            _LOG.warning("what an interrupted save left could not be removed: %s", error)
    reserve(life.session.root, name, life.line.left_from)
    life.is_tidied = True


_NAMES = ("epoch", "step", "model", "optimizer", "scheduler")
_HINT = (
    "Call save(step=..., model=..., optimizer=...), with epoch=... if you like, or save(epoch, step, model, optimizer)."
)


@dataclass(frozen=True, slots=True)
class WhatToSave:
    """The arguments of a save that may be given by position or by name."""

    epoch: int
    step: int
    model: Model
    optimizer: Optimizers | None
    scheduler: Schedulers | None
    tokenizer: SavesPretrained | None = None
    peft_config: object | None = None
    metrics: Mapping[str, float] | None = None
    extra_state: Mapping[str, object] | None = None
    is_final_checkpoint: bool = False
    ema: Model | None = None
    dataloader: object | None = None

    @staticmethod
    def of(
        positional: Sequence[object], named: Mapping[str, object], epoch: int
    ) -> tuple[WhatToSave, MisuseError | None]:
        """Sort the arguments by their names; a mistake is returned. ``epoch`` is meant where none is given."""
        given = dict(zip(_NAMES, positional, strict=False))
        mistake = _mistake(positional, given, named)
        given = {**given, **{name: value for name, value in named.items() if name in _NAMES}}
        if given.get("epoch") is None:
            given["epoch"] = epoch
        what = WhatToSave(
            whole_number(cast(int, given["epoch"])),
            whole_number(cast(int, given.get("step"))),
            cast(nn.Module, given.get("model")),
            cast("Optimizers | None", given.get("optimizer")),
            cast("Schedulers | None", given.get("scheduler")),
        )
        return what, mistake


def _mistake(
    positional: Sequence[object], given: Mapping[str, object], named: Mapping[str, object]
) -> MisuseError | None:
    if len(positional) > len(_NAMES):
        return MisuseError(f"save() was given {len(positional)} arguments by position", hint=_HINT)
    if positional and isinstance(positional[0], nn.Module):
        return MisuseError("save() was given the model in the place of the epoch", hint=_HINT)
    for name, value in named.items():
        if name not in _NAMES:
            return MisuseError(f"save() has no argument {name}", hint=_HINT)
        if name in given:
            return MisuseError(
                f"save() was given {name} twice: {_shown(given[name])} by position, {_shown(value)} by name", hint=_HINT
            )
    lacks = [name for name in ("step", "model") if name not in given and name not in named]
    if lacks:
        return MisuseError(f"save() was not given {' and '.join(lacks)}", hint=_HINT)
    return None


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, int) else f"a {type(value).__name__}"


def save_model(
    life: Lifetime,
    model: Model,
    weights_path: str | Path,
    peft_config: object | None,
    tokenizer: SavesPretrained | None,
    is_final: bool,
) -> None:
    """See `Checkpointer.save_model`. All ranks call."""
    life.ends = life.ends or is_final

    def look() -> str:
        check_tokenizer(tokenizer)
        return life.looked(model, saves=True)

    def capture(target: Replacement) -> tuple[Sequence[Step], Closing]:
        request = ModelRequest(
            life.session,
            model,
            target.temp,
            addons=life.addons,
            tokenizer=tokenizer,
            peft_config=peft_config,
            is_final=is_final,
            reserve=target.reserve,
        )
        save = model_save(request)
        return save.steps(), save.take_closing()

    given = {"is_final_checkpoint=True": is_final} | passed_addons(life.addons)
    _save_component(life, "model", weights_path, look, given, capture)


def save_optimizer(
    life: Lifetime, optimizer: Optimizers, model: Model, weights_path: str | Path, scheduler: Schedulers | None
) -> None:
    """See `Checkpointer.save_optimizer`. All ranks call."""

    def capture(target: Replacement) -> tuple[Sequence[Step], Closing]:
        group = life.session.group
        with group.together(f"preparing {target.place}"):
            if group.is_main:
                target.reserve()
        return capture_optimizer(life.session, optimizer, model, scheduler, target.temp), ()

    _save_component(
        life, "optimizer", weights_path, lambda: life.looked(model, optimizer, scheduler, saves=True), {}, capture
    )


def _save_component(
    life: Lifetime,
    what: Literal["model", "optimizer"],
    weights_path: str | Path,
    look: Callable[[], str],
    given: Mapping[str, bool],
    capture: Callable[[Replacement], tuple[Sequence[Step], Closing]],
) -> None:
    """Save one component; ``capture`` returns the steps that write it. All ranks call."""
    place = Path(weights_path).absolute() / ("model" if what == "model" else "optim")
    with life.reports.call(f"save_{what}") as told:
        session = life.begin(call := f"save_{what}({place.parent})")
        turn = life.turn(call, look, given) if life.config.enabled else Turn(skipped=True)
        if turn.skipped:
            return
        target = Replacement(session, place, str(place), {"shardwise": __version__})
        life.save(target, lambda: capture(target), turn.earlier, told)


def model_save(request: ModelRequest) -> ModelSave | AdapterSave:
    """One save of a model, or of its adapters. All ranks call."""
    return AdapterSave(request) if request.session.config.is_peft else ModelSave(request)
