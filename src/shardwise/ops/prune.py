"""Deletes the checkpoints of a root that a retention policy gives up: the same one, with the same code, as saves."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shardwise.disk.guarded import read_note
from shardwise.disk.storage import Storage, current, storage_errors, using
from shardwise.errors import ConfigError
from shardwise.lifecycle import Retention, list_checkpoints, prunable, prune, publishing
from shardwise.lifecycle.resolve import newest
from shardwise.ops.beside import CONFIG_NAME, settings_in
from shardwise.ops.listing import real_root

__all__ = ["PruneReport", "Retention", "prune_checkpoints", "recorded_policy"]


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What a policy keeps and gives up.

    Attributes:
        root: The directory of the checkpoints.
        policy: The policy.
        names: The checkpoints that it gives up, oldest first.
        kept: The other complete ones.
        deleted: Whether ``names`` were deleted; else they are still there.
    """

    root: Path
    policy: Retention
    names: tuple[str, ...]
    kept: tuple[str, ...]
    deleted: bool


def prune_checkpoints(
    root: str | os.PathLike[str],
    policy: Retention | None = None,
    *,
    delete: bool = False,
    storage: Storage | None = None,
) -> PruneReport:
    """Find the checkpoints that a policy gives up, and delete them if asked to.

    What a pointer leads to, the newest checkpoint and whatever else `shardwise.lifecycle.select_doomed` protects stays.
    While it deletes, nobody else publishes in the root.

    Args:
        root: The directory of the checkpoints.
        policy: By default that of the settings with which the newest checkpoint was saved.
        delete: Delete them; otherwise nothing is changed.
        storage: Where the root is; the mounted file systems by default.

    Raises:
        CheckpointNotFoundError: There is nothing at the path.
        MisuseError: It is a checkpoint itself.
        ConfigError: There is no policy: none is given, and the newest checkpoint was saved without one.
        CheckpointBusyError: Another process has been publishing in the root for minutes.
        StorageError: The file system refused.
    """
    given = Path(root).absolute()
    with using(storage or current()), storage_errors(given):
        place = real_root(given)
        chosen = policy or recorded_policy(place)
        if chosen is None or chosen.max_recent is None:
            raise ConfigError(
                "no policy says how many of the newest checkpoints to keep"
                + ("" if policy else ": the newest one was saved without max_recent_checkpoints"),
                path=place,
                hint="Pass --keep-last N (max_recent).",
            )
        if not delete:
            names = prunable(place, chosen)
        else:
            with publishing(place):
                names = prune(place, chosen)
        kept = tuple(info.name for info in list_checkpoints(place) if info.complete and info.name not in names)
    return PruneReport(place, chosen, names, kept, delete)


def recorded_policy(root: Path) -> Retention | None:
    """The policy in the settings with which the newest checkpoint was saved; ``None`` where it has no such file.

    Raises:
        ConfigError: The file has values that cannot be a policy's.
        StateFormatError: The file is damaged.
    """
    last = newest(list_checkpoints(root))
    data = None if last is None else read_note(last.path, CONFIG_NAME, 2**24)
    if last is None or data is None:
        return None
    settings = settings_in(data, last.path / CONFIG_NAME, "Pass a policy (--keep-last N).")
    if settings is None:
        return None
    return Retention(
        settings.get("max_recent_checkpoints"),
        settings.get("keep_every_k_steps"),
        settings.get("keep_best"),
        settings.get("best_metric_mode", "min"),
        settings.get("best_metric_key", "default"),
    )
