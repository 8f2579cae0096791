"""The `Checkpointer`: wiring of capture, conversion, engine, addons and lifecycle.

Its names are looked up when they are asked for: settings by themselves load no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwise.checkpointing.checkpointer import Checkpointer
    from shardwise.checkpointing.config import CheckpointingConfig
    from shardwise.checkpointing.reports import RestoreRecord
    from shardwise.settings import SaveConsolidatedMode

__all__ = ["Checkpointer", "CheckpointingConfig", "RestoreRecord", "SaveConsolidatedMode"]

_HOMES = {
    "Checkpointer": "shardwise.checkpointing.checkpointer",
    "CheckpointingConfig": "shardwise.checkpointing.config",
    "RestoreRecord": "shardwise.checkpointing.reports",
    "SaveConsolidatedMode": "shardwise.settings",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
