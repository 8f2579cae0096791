"""Checks when a checkpointer is built that it may write where it is to write: not after an hour of training."""

from __future__ import annotations

from pathlib import Path

from shardwise.disk.storage import IsLocal, Storage, why_not_writable
from shardwise.errors import StorageError
from shardwise.settings import Settings

#: The environment variable that is used where the setting ``trace`` is not given.
TRACE_VARIABLE = "SHARDWISE_TRACE"


def check_places(config: Settings, storage: Storage | None, trace_dir: Path | None) -> None:
    """Raise `StorageError` if this process may not write to ``checkpoint_dir`` or to the directory of traces. Local.

    Nothing is made. A storage that keeps its files elsewhere is not asked.
    """
    if config.enabled and not config.is_remote and (storage is None or isinstance(storage, IsLocal)):
        root = Path(config.checkpoint_dir).absolute()
        _require(
            "checkpoint_dir",
            root if storage is None else storage.local_path(root),
            "Set checkpoint_dir to a directory that this user may write to, or set enabled to false in a program that "
            "only restores.",
        )
    if trace_dir is not None:
        _require("trace", trace_dir, f"Name another directory in the setting trace or in {TRACE_VARIABLE}.")


def _require(setting: str, directory: Path, hint: str) -> None:
    reason = why_not_writable(directory)
    if reason is not None:
        raise StorageError(f"{setting} is {directory}, and {reason}", path=directory, hint=hint)
