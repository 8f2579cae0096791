"""What a whole checkpoint has beside model and optimizer, and finding one to resume from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import cast

from shardwise.checkpointing.context import Context
from shardwise.checkpointing.extras import RandomState, capture_steps, restore_values
from shardwise.checkpointing.records import RestoreRecord
from shardwise.comm import JsonValue
from shardwise.engine.jobs import Step
from shardwise.lifecycle import resolve

_LOG = logging.getLogger(__name__)


def locate(context: Context, restore_from: str | Path) -> RestoreRecord | None:
    """Resolve a checkpoint on rank 0 and tell every rank. All ranks call."""

    def find() -> JsonValue:
        found = resolve(context.root, restore_from)
        return None if found is None else [str(found.path), found.epoch, found.step, dict(found.metrics)]

    told = context.group.tell(find, f"looking for {restore_from}")
    if told is None:
        return None
    path, epoch, step, metrics = cast(tuple[str, int | None, int | None, dict[str, float]], told)
    return RestoreRecord(epoch, step, Path(path), metrics)


def capture_extras(context: Context, directory: Path, extra_state: Mapping[str, object]) -> list[Step]:
    """Capture random number generators and extra state now; returns what is left to do. All ranks call."""
    generators = {"rng": RandomState()} if context.config.save_rng else {}
    return [
        *below("rng", capture_steps(context, generators, directory / "rng")),
        *below("extra", capture_steps(context, extra_state, directory / "extra")),
    ]


def restore_extras(
    context: Context, directory: Path, extra_state: MutableMapping[str, object] | None
) -> tuple[str, ...]:
    """Put generators and extra state back. All ranks call.

    Args:
        context: Settings, ranks and storage.
        directory: The checkpoint's.
        extra_state: What this rank wants of the extra state; ``None`` on every rank where no rank wants any.

    Returns:
        Names that were left as they are, because they were saved for each rank of another number of ranks.
    """
    group = context.group
    skipped: tuple[str, ...] = ()
    if extra_state is not None:
        skipped += restore_values(group, extra_state, directory / "extra")
    if context.config.save_rng and group.any((directory / "rng").is_dir(), "looking for generators"):
        skipped += restore_values(group, {"rng": RandomState()}, directory / "rng")
    if skipped and group.is_main:
        _LOG.warning("saved on another number of ranks and left as they are: %s", ", ".join(skipped))
    return skipped


def below(prefix: str, steps: Sequence[Step]) -> list[Step]:
    """The steps with the paths of their records put below ``prefix``."""

    def moved(step: Step) -> Step:
        return lambda group: step(group).below(prefix)

    return [moved(step) for step in steps]
