"""Runs the addons' hooks so that what fails in one, on any rank, fails on all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NoReturn

from shardwise.addons import CheckpointAddon, ConsolidatedHFAddon, SaveHookArgs
from shardwise.addons.files import local_arguments
from shardwise.comm import Group
from shardwise.errors import MisuseError
from shardwise.stateful_wrappers import ModelState


class MovedOnState(ModelState):
    """What hooks that run in the background are given of the model: its modules, but no values.

    Training goes on meanwhile, so that the values are those of a later step than the save's, or of two.
    """

    def _refuse(self) -> NoReturn:
        raise MisuseError(
            "post_save of an asynchronous save reads the model, whose values are those of a later step by now",
            hint="Read what the hook needs in pre_save, or set is_async to false.",
        )

    def listing(self, stand_ins: object = None, *, values: bool = True, norms: bool = False) -> NoReturn:
        """Refuse."""
        self._refuse()

    def tensors(self) -> NoReturn:
        """Refuse."""
        self._refuse()

    def held(self, meshes: object = None) -> NoReturn:
        """Refuse."""
        self._refuse()

    def state_dict(self) -> NoReturn:
        """Refuse."""
        self._refuse()

    def load_state_dict(self, state_dict: Mapping[str, object]) -> NoReturn:
        """Refuse."""
        self._refuse()


def after_arguments(args: SaveHookArgs, state: ModelState, *, in_background: bool) -> SaveHookArgs:
    """What ``post_save`` hooks are given, for ``args`` of ``pre_save`` hooks and the model's state."""
    return args | {"model_state": MovedOnState(state.model)} if in_background else args


def run_hooks(
    addons: Sequence[CheckpointAddon], hook: Literal["pre_save", "post_save"], args: SaveHookArgs, group: Group
) -> None:
    """Call a hook of every addon, one after the other. All ranks call, with the same addons.

    An addon may communicate, or not: its author need not know that the ranks have to leave together.

    Raises:
        ShardwiseError: What a hook failed with, on every rank.
    """
    for addon in addons:
        failure: BaseException | None = None
        try:
            run = addon.pre_save if hook == "pre_save" else addon.post_save
            with local_arguments(args) as local:
                run(**(local | {"group": group}))
        except Exception as error:  # noqa: BLE001 - raised on every rank by agree()
            # What looks agreed may come from a group of the addon's own, of which the other ranks know nothing.
            failure = error
        group.agree(failure, f"{type(addon).__name__}.{hook}")


def leading_own(addons: Sequence[CheckpointAddon]) -> int:
    """How many addons at the start are the library's, with its own hooks.

    What they do is local, and is done where the ranks leave together anyhow; `run_hooks` is for all behind them.
    """
    return next((n for n, addon in enumerate(addons) if not _is_own(addon)), len(addons))


def _is_own(addon: CheckpointAddon) -> bool:
    return type(addon) is ConsolidatedHFAddon and vars(addon).keys().isdisjoint(("pre_save", "post_save"))


def passed_addons(addons: Sequence[CheckpointAddon]) -> dict[str, bool]:
    """The addons as `check_same_call` compares them: a hook that some ranks lack would leave the others waiting."""
    return {f"{type(addon).__qualname__} as addon {number}": True for number, addon in enumerate(addons, start=1)}
