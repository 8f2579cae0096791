"""Checkpoints of distributed PyTorch training that are, as written, the Hugging Face model other tools open.

Importing the package is cheap and has no side effects: torch and transformers are loaded when a name that needs them is
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from shardwise._version import __version__

if TYPE_CHECKING:
    from shardwise.base.files import base_dtype
    from shardwise.checkpointing import Checkpointer, RestoreRecord
    from shardwise.config import CheckpointingConfig, SaveConsolidatedMode
    from shardwise.dcp.storage import SafetensorsReader, SafetensorsWriter
    from shardwise.errors import ShardwiseError
    from shardwise.lifecycle import CheckpointInfo, PreemptionGuard
    from shardwise.timing import CallRecord

__all__ = [
    "CallRecord",
    "CheckpointInfo",
    "Checkpointer",
    "CheckpointingConfig",
    "PreemptionGuard",
    "RestoreRecord",
    "SafetensorsReader",
    "SafetensorsWriter",
    "SaveConsolidatedMode",
    "ShardwiseError",
    "__version__",
    "base_dtype",
]

_HOMES = {
    "CallRecord": "shardwise.timing",
    "CheckpointInfo": "shardwise.lifecycle",
    "Checkpointer": "shardwise.checkpointing",
    "CheckpointingConfig": "shardwise.config",
    "PreemptionGuard": "shardwise.lifecycle",
    "RestoreRecord": "shardwise.checkpointing",
    "SafetensorsReader": "shardwise.dcp.storage",
    "SafetensorsWriter": "shardwise.dcp.storage",
    "SaveConsolidatedMode": "shardwise.config",
    "ShardwiseError": "shardwise.errors",
    "base_dtype": "shardwise.base.files",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
