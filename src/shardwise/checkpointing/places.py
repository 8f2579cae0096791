"""Checks when a checkpointer is built that it may write where it is to write: not after an hour of training."""

from __future__ import annotations

import logging
from pathlib import Path

from shardwise.disk.names import is_directory, names_in
from shardwise.disk.storage import IsLocal, Storage, why_not_writable
from shardwise.errors import StorageError
from shardwise.lifecycle import parse_checkpoint_name
from shardwise.settings import Settings

_LOG = logging.getLogger(__name__)
#: The environment variable that is used where the setting ``trace`` is not given.
TRACE_VARIABLE = "SHARDWISE_TRACE"


def check_places(config: Settings, storage: Storage | None, trace_dir: Path | None) -> None:
    """Raise `StorageError` if this process may not write to ``checkpoint_dir`` or to the directory of traces. Local.

    Nothing is made. A storage that keeps its files elsewhere is not asked. A ``checkpoint_dir`` with checkpoints may be
    there to be restored from, so that this is only a warning.
    """
    if config.enabled and not config.is_remote and (storage is None or isinstance(storage, IsLocal)):
        root = Path(config.checkpoint_dir).absolute()
        local = root if storage is None else storage.local_path(root)
        unwritable = _refusal(
            "checkpoint_dir",
            local,
            "Set checkpoint_dir to a directory that this user may write to, or set enabled to false in a program that "
            "only restores.",
        )
        if unwritable is not None:
            if not is_directory(local) or not any(parse_checkpoint_name(name) for name in names_in(local)):
                raise unwritable
            _LOG.warning("no checkpoint can be saved: %s", unwritable)
    if trace_dir is not None:
        hint = f"Name another directory in the setting trace or in {TRACE_VARIABLE}."
        if (no_trace := _refusal("trace", trace_dir, hint)) is not None:
            raise no_trace


def _refusal(setting: str, directory: Path, hint: str) -> StorageError | None:
    reason = why_not_writable(directory)
    if reason is None:
        return None
    error = StorageError(f"{setting} is {directory}, and {reason.strerror}", path=directory, hint=hint)
    error.errno = reason.errno
    return error
