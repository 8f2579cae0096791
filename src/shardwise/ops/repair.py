"""Puts a root in order: removes what interrupted saves and deletions left, and mends pointers that lead nowhere."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shardwise import lifecycle
from shardwise.disk.names import exists, is_directory
from shardwise.disk.storage import Storage, current, storage_errors, using
from shardwise.lifecycle.resolve import is_complete, newest, publication_begun
from shardwise.ops.listing import ListedCheckpoint, list_checkpoints, real_root
from shardwise.ops.prune import recorded_policy

__all__ = ["PointerRepair", "RepairReport", "repair"]


@dataclass(frozen=True, slots=True)
class PointerRepair:
    """A pointer that is to lead elsewhere.

    Attributes:
        name: The pointer.
        old: The name that it leads to, where nothing that could be resumed from is; ``None`` where there is no pointer.
        new: The checkpoint that it is to lead to.
    """

    name: str
    old: str | None
    new: str


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What is out of order in a root.

    Attributes:
        root: The directory of the checkpoints.
        leftovers: Names that interrupted saves and deletions left: removed, or to be removed.
        pointers: Pointers that were set, or are to be.
        left: What a person has to decide, one sentence each; nothing is done about it.
        done: Whether it was done; else nothing was changed.
        checkpoints: How many checkpoints there are, or what there is of some.
    """

    root: Path
    leftovers: tuple[str, ...] = ()
    pointers: tuple[PointerRepair, ...] = ()
    left: tuple[str, ...] = ()
    done: bool = False
    checkpoints: int = 0


def repair(root: str | os.PathLike[str], *, apply: bool = False, storage: Storage | None = None) -> RepairReport:
    """Find what interrupted saves left in a root and which pointers lead nowhere, and mend it if asked to.

    What a live process is writing stays, and so does everything that has a checkpoint's own name.

    Args:
        root: The directory of the checkpoints.
        apply: Do it; otherwise nothing is changed.
        storage: Where the root is; the mounted file systems by default.

    Raises:
        CheckpointNotFoundError: There is nothing at the path.
        MisuseError: It is a checkpoint itself.
        CheckpointBusyError: Another process has been publishing in the root for minutes.
        StorageError: The file system refused.
    """
    given = Path(root).absolute()
    with using(storage or current()), storage_errors(given):
        place = real_root(given)
        listed = list_checkpoints(place)
        if not apply:
            gone = tuple(
                each.path.name
                for each in listed
                if each.path.name != each.name
                and each.state in ("interrupted", "being deleted")
                and not (each.writer and each.writer.alive)
            )
            wrong = _wrong_pointers(place)
            return RepairReport(place, gone, wrong, _left(place, listed, wrong), checkpoints=len(listed))
        # Of a claim of another machine nobody here knows whether its lock could be seen.
        gone = lifecycle.remove_leftovers(place, active=[each.path for each in listed if each.state == "claimed"])
        with lifecycle.publishing(place):
            wrong = _wrong_pointers(place)
            for each in wrong:
                lifecycle.set_pointer(place, each.name, each.new)
        listed = list_checkpoints(place)
        return RepairReport(place, gone, wrong, _left(place, listed, wrong), done=True, checkpoints=len(listed))


def _wrong_pointers(root: Path) -> tuple[PointerRepair, ...]:
    """``LATEST`` and the best-metric pointer where they lead to nothing that may be resumed from."""
    checkpoints = lifecycle.list_checkpoints(root)
    last = newest(checkpoints)
    if last is None:
        return ()
    found = []
    leading, begun = lifecycle.pointers(root), publication_begun(root)
    latest, best = leading.get(lifecycle.LATEST), leading.get(lifecycle.BEST)
    leads = is_directory(root / lifecycle.LATEST) if latest is None else is_complete(root / latest)
    if begun not in (None, latest) or not leads:
        found.append(PointerRepair(lifecycle.LATEST, latest, begun or last.name))
    if best is not None and not is_complete(root / best):
        name = lifecycle.best_checkpoint(checkpoints, recorded_policy(root) or lifecycle.Retention())
        if name is not None:
            found.append(PointerRepair(lifecycle.BEST, best, name))
    return tuple(found)


def _left(root: Path, listed: tuple[ListedCheckpoint, ...], wrong: tuple[PointerRepair, ...]) -> tuple[str, ...]:
    found = []
    for each in listed:
        if each.state == "damaged":
            found.append(f"{each.path.name} is damaged: restore its files from a copy, or delete it")
        elif each.state == "claimed" and each.writer is not None:
            found.append(
                f"{each.path.name} was claimed by process {each.writer.pid} on {each.writer.host}: if that has ended, "
                "run repair there, or delete it; a run's first save removes it too once it is a day old"
            )
        elif each.state == "interrupted" and each.path.name == each.name:
            found.append(f"{each.name} has neither a manifest nor a model: look at it, and delete it if it is nothing")
    mended = {each.name for each in wrong}
    for name, target in lifecycle.pointers(root).items():
        if name not in mended and lifecycle.parse_checkpoint_name(name) is None and not exists(root / target):
            found.append(f"the pointer {name} leads to {target}, which is not there: set it, or delete it")
    return tuple(found)
