"""Settings of a checkpointer that the host decides: given here as well, they would contradict it."""

from __future__ import annotations

from collections.abc import Iterable

from shardwise.config import CheckpointingConfig


def first_set(settings: CheckpointingConfig, names: Iterable[str]) -> str | None:
    """The first of the settings ``names`` that is not at its default, or ``None``. Local."""
    defaults = CheckpointingConfig()
    return next((name for name in names if getattr(settings, name) != getattr(defaults, name)), None)
