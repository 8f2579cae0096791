"""Whether a saved scheduler's state is that of the scheduler which is to take it in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from torch.optim.lr_scheduler import LRScheduler

from shardwise.checkpointing.restoring import HasState
from shardwise.engine.statefiles import has_state, read_state
from shardwise.errors import CheckpointNotFoundError, MisuseError, StateFormatError

SCHEDULER_STATE = "scheduler"
#: Of torch's schedulers, and gone from newer releases.
_GONE = {"verbose"}


def scheduler_kind(scheduler: HasState) -> str:
    """Name of the scheduler's class; of one that only passes on to another (accelerate's), the other's."""
    return type(_inner(scheduler)).__name__


def saved_schedules(
    schedulers: Sequence[HasState], kinds: Sequence[str], directory: Path
) -> list[tuple[HasState, dict[str, object]]]:
    """Each scheduler with the state that was saved of it. Local; nothing is changed.

    Args:
        schedulers: What is to be restored; one at least.
        kinds: The classes of those that were saved; older checkpoints do not say.
        directory: The optimizer's directory.

    Raises:
        CheckpointNotFoundError: None was saved.
        MisuseError: Others were saved, or another number.
        StateFormatError: The state is damaged.
    """
    stem = directory / SCHEDULER_STATE
    path = stem.with_name(f"{SCHEDULER_STATE}.json")
    if not has_state(stem):
        raise CheckpointNotFoundError(
            "the checkpoint was saved without a scheduler",
            path=path,
            hint="Restore without a scheduler, or choose a checkpoint that has one.",
        )
    states = read_state(stem)
    if not isinstance(states, list):
        raise StateFormatError("this is not a list of schedulers' states", path=path, hint="Restore the file.")
    if len(states) != len(schedulers):
        raise MisuseError(
            f"{len(states)} {'scheduler was' if len(states) == 1 else 'schedulers were'} saved and "
            f"{len(schedulers)} {'is' if len(schedulers) == 1 else 'are'} to be restored",
            path=path,
            hint="Pass the schedulers that the checkpoint was saved with, in the same order; or restore without them.",
        )
    for number, (scheduler, state) in enumerate(zip(schedulers, states, strict=True)):
        inner = _inner(scheduler)
        if isinstance(inner, LRScheduler):
            _check_fit(inner, state, kinds[number] if number < len(kinds) else "", path)
    return list(zip(schedulers, cast(list[dict[str, object]], states), strict=True))


def _check_fit(scheduler: LRScheduler, state: object, kind: str, path: Path) -> None:
    """Torch's schedulers take in whatever they are given, attribute by attribute, so they are compared here."""
    own = type(scheduler).__name__
    hint = "Build the scheduler that the checkpoint was saved with; or restore without it, and it starts afresh."
    if not isinstance(state, Mapping):
        raise StateFormatError("a scheduler's state is not a dictionary", path=path, hint="Restore the file.")
    if kind and kind != own:
        raise MisuseError(
            f"the checkpoint's scheduler is {kind} and the one to be restored is {own}", path=path, hint=hint
        )
    have = scheduler.state_dict()
    mine, saved = ({key for key in each if not key.startswith("_")} - _GONE for each in (have, state))
    if not kind and mine - saved and saved - mine:
        raise MisuseError(
            f"the checkpoint's scheduler is no {own}: it has {sorted(saved - mine)} and lacks {sorted(mine - saved)}",
            path=path,
            hint=hint,
        )
    rates, saved_rates = have.get("base_lrs"), state.get("base_lrs")
    if isinstance(rates, list) and isinstance(saved_rates, list) and len(rates) != len(saved_rates):
        raise MisuseError(
            f"the checkpoint's scheduler has learning rates of {len(saved_rates)} parameter groups and the one to be "
            f"restored of {len(rates)}",
            path=path,
            hint="Build the optimizer with the same parameter groups as when the checkpoint was saved.",
        )


def _inner(scheduler: HasState) -> object:
    inner: object = scheduler
    while not isinstance(inner, LRScheduler) and isinstance(getattr(inner, "scheduler", None), LRScheduler):
        inner = getattr(inner, "scheduler")  # noqa: B009 - of no declared type
    return inner
