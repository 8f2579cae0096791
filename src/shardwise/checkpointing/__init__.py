"""The `Checkpointer`: wiring of capture, conversion, engine, addons and lifecycle.

`CheckpointingConfig` is documented as importable from here too. It makes checkpointers and so lives above this package;
it is looked up when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from shardwise.checkpointing.checkpointer import Checkpointer
from shardwise.checkpointing.reports import RestoreRecord
from shardwise.settings import SaveConsolidatedMode

if TYPE_CHECKING:
    from shardwise.config import CheckpointingConfig

__all__ = ["Checkpointer", "CheckpointingConfig", "RestoreRecord", "SaveConsolidatedMode"]


def __getattr__(name: str) -> object:
    if name != "CheckpointingConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = import_module("shardwise.config").CheckpointingConfig
    globals()[name] = value
    return value
