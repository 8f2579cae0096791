"""The `Checkpointer`: wiring of capture, conversion, engine, addons and lifecycle."""

from shardwise.checkpointing.checkpointer import Checkpointer
from shardwise.checkpointing.records import RestoreRecord

__all__ = ["Checkpointer", "RestoreRecord"]
