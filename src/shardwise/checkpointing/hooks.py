"""Runs the addons' hooks so that what fails in one, on any rank, fails on all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from shardwise.addons import CheckpointAddon, SaveHookArgs
from shardwise.comm import Group
from shardwise.errors import PeerError, ShardwiseError


def run_hooks(
    addons: Sequence[CheckpointAddon], hook: Literal["pre_save", "post_save"], args: SaveHookArgs, group: Group
) -> None:
    """Call a hook of every addon, one after the other. All ranks call.

    An addon may communicate, or not: its author need not know that the ranks have to leave together.

    Raises:
        ShardwiseError: What a hook failed with, on every rank.
    """
    for addon in addons:
        name = f"{type(addon).__name__}.{hook}"
        failure: BaseException | None = None
        try:
            run = addon.pre_save if hook == "pre_save" else addon.post_save
            run(**(args | {"group": group}))
        except Exception as error:
            if _is_agreed(error):
                raise
            failure = error
        group.agree(failure, name)


def _is_agreed(error: Exception) -> bool:
    """Whether the ranks have exchanged this error already: doing so is what puts a rank into it."""
    return isinstance(error, PeerError) or (isinstance(error, ShardwiseError) and error.rank is not None)
