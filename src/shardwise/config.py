"""The documented home of the settings; `CheckpointingConfig` stands in `shardwise.checkpointing.config`."""

from __future__ import annotations

from shardwise.checkpointing.config import CheckpointingConfig
from shardwise.settings import SaveConsolidatedMode

# The names in pairs are public here too: this module is where the reference documents them.
from shardwise.settings import SerializationFormat as SerializationFormat
from shardwise.settings import _is_geq_torch_2_9 as _is_geq_torch_2_9
from shardwise.settings import _normalize_save_consolidated as _normalize_save_consolidated

__all__ = ["CheckpointingConfig", "SaveConsolidatedMode"]
