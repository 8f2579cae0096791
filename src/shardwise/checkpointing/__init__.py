"""The `Checkpointer`: wiring of capture, conversion, engine, addons and lifecycle."""

from shardwise.checkpointing.checkpointer import Checkpointer
from shardwise.checkpointing.records import RestoreRecord
from shardwise.config import CheckpointingConfig, SaveConsolidatedMode

__all__ = ["Checkpointer", "CheckpointingConfig", "RestoreRecord", "SaveConsolidatedMode"]
