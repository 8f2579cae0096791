"""Runs the addons' hooks so that what fails in one, on any rank, fails on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from shardwise.addons import CheckpointAddon, ConsolidatedHFAddon, SaveHookArgs
from shardwise.addons.base import SavesPretrained
from shardwise.addons.files import local_arguments
from shardwise.checkpointing.optimizers import Optimizers
from shardwise.checkpointing.session import Session
from shardwise.comm import Group
from shardwise.engine.records import ComponentRecord
from shardwise.errors import MisuseError
from shardwise.stateful_wrappers import ModelState
from shardwise.stateful_wrappers.model import Model


class MovedOnState(ModelState):
    """The model as hooks that run in the background get it: its modules, but no values.

    Training goes on meanwhile, so that the values are those of a later step than the save's, or of two.
    """

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise MisuseError(
            "post_save of an asynchronous save reads the model, whose values are those of a later step by now",
            hint="Read what the hook needs in pre_save, or set is_async to false.",
        )

    listing = tensors = held = state_dict = load_state_dict = _refuse


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """A model to save, alone or as part of a checkpoint.

    Attributes:
        directory: The ``model`` directory.
        reserve: Makes the directory above it, on rank 0, before anything is written.
        optimizer: The optimizers; their state tells which tensors were trained beside an adapter.
    """

    session: Session
    model: Model
    directory: Path
    addons: Sequence[CheckpointAddon] = ()
    tokenizer: SavesPretrained | None = None
    peft_config: object | None = None
    is_final: bool = False
    reserve: Callable[[], None] = lambda: None
    optimizer: Optimizers | None = None


def hook_arguments(request: ModelRequest, state: ModelState) -> SaveHookArgs:
    """The ``pre_save`` hooks' arguments in an adapter's save; a model's save adds its directories. All ranks call."""
    config = request.session.config
    return {
        "model_state": state,
        "model_path": str(request.directory),
        "hf_metadata_dir": None,
        "consolidated_path": None,
        "tokenizer": request.tokenizer,
        "peft_config": request.peft_config,
        "original_model_path": request.session.base_name(),
        "v4_compatible": config.v4_compatible,
        "diffusers_compatible": config.diffusers_compatible,
        "legacy_paramwrapper_layout": config.legacy_paramwrapper_layout,
        "is_final_checkpoint": request.is_final,
        "pp_group": request.session.pp_group,
    }


def run_hooks(
    addons: Sequence[CheckpointAddon], hook: Literal["pre_save", "post_save"], args: SaveHookArgs, group: Group
) -> None:
    """Call a hook of every addon; what fails on one rank is raised on all. All ranks call, with the same addons."""
    for addon in addons:
        failure: BaseException | None = None
        try:
            run = addon.pre_save if hook == "pre_save" else addon.post_save
            with local_arguments(args) as local:
                run(**(local | {"group": group}))
        except Exception as error:  # noqa: BLE001 - raised on every rank by agree()
            # An error that looks agreed may come from the addon's own group, which the other ranks know nothing of.
            failure = error
        group.agree(failure, f"{type(addon).__name__}.{hook}")


def run_after(addons: Sequence[CheckpointAddon], args: SaveHookArgs, session: Session, group: Group) -> ComponentRecord:
    """Call the ``post_save`` hooks, as a step of a save. All ranks call."""
    if session.config.is_async:
        args = args | {"model_state": MovedOnState(args["model_state"].model)}
    run_hooks(addons, "post_save", args, group)
    return ComponentRecord()


def leading_own(addons: Sequence[CheckpointAddon]) -> int:
    """The number of addons at the start that are the library's: their work is local, and needs no `run_hooks`."""
    for number, addon in enumerate(addons):
        if type(addon) is not ConsolidatedHFAddon or not vars(addon).keys().isdisjoint(("pre_save", "post_save")):
            return number
    return len(addons)


def passed_addons(addons: Sequence[CheckpointAddon]) -> dict[str, bool]:
    """The addons as `check_same_call` compares them: a hook that some ranks lack would leave the others waiting."""
    return {f"{type(addon).__qualname__} as addon {number}": True for number, addon in enumerate(addons, start=1)}
