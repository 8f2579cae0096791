"""From a reserved directory to a published checkpoint: one rename is the commit point."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from pathlib import Path

from shardwise.disk.names import is_directory, is_there, names_in, status, walk
from shardwise.disk.storage import current, local_path, storage_errors
from shardwise.errors import (
    CheckpointBusyError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    IncompleteCheckpointError,
    MisuseError,
    ShardwiseError,
)
from shardwise.lifecycle.names import (
    MANIFEST_NAME,
    OWNER,
    doomed_name,
    is_plain,
    leftover_of,
    parse_checkpoint_name,
    published_name,
    temporary_name,
)
from shardwise.lifecycle.ownership import claim, writer_of
from shardwise.lifecycle.pointers import announce
from shardwise.lifecycle.resolve import (
    Start,
    branch_point,
    is_complete,
    is_verifiable,
    list_checkpoints,
    next_lineage,
    read_lineage,
)

_LOG = logging.getLogger(__name__)

#: What another machine has claimed is a leftover once nothing in it has changed for so long.
_QUIET_SECONDS = 86400.0


def reserve(root: Path, name: str, start: Start | None = None) -> Path:
    """Make the empty temporary directory in which the checkpoint ``name`` is written; one rank calls.

    What an interrupted save of the same name left is removed: its temporary directory, and a directory of the published
    name that could not be resumed from. ``start`` is the checkpoint that the run was restored from or saved last, if
    that is known: one of this name that was abandoned when the run was rolled back is replaced on publication. Any
    other that is published is a `CheckpointExistsError`.
    """
    if not is_plain(name):
        raise MisuseError(f"{name!r} cannot be the name of a checkpoint", hint="Use checkpoint_name(epoch, step).")
    final, temp = root / name, root / temporary_name(name)
    make_root(root)
    storage = current()
    with storage_errors(root):
        if is_there(final) and not is_abandoned(root, name, start):
            if not is_directory(final, follows=False) or is_complete(final):
                _refuse(final)
            remove_checkpoint(root, name)
        storage.remove_tree(temp)
        storage.make_directory(temp, new=True)
        storage.sync_directory(root)
    return temp


def is_abandoned(root: Path, name: str, start: Start | None) -> bool:
    """Whether the complete checkpoint ``name`` was left behind when a run went back to ``start``.

    It came from a checkpoint that the run came from too, and is not itself one that the run came from. Where the start
    is not known, or the two have nothing in common, it is another run's and not abandoned.
    """
    checkpoints = {info.name: info for info in list_checkpoints(root) if info.complete}
    found = checkpoints.get(name)
    if found is None or start is None:
        return False
    lineage = next_lineage(root, list(checkpoints.values()), "", found.epoch, found.step, start)
    line = [each.name for each in lineage.ancestors]
    return bool(line) and name not in line and branch_point(found, line, checkpoints) is not None


def put_in_place(temp: Path, final: Path, start: Start | None = None) -> None:
    """Make the finished save in ``temp`` the checkpoint ``final``; one rank calls, when every rank is durable.

    When it returns the checkpoint is there, and when it raises it is not. The writers have synced the content of their
    files; this syncs the directories that list them, and then renames once. A crash before the rename leaves a
    temporary directory, one after it the whole checkpoint. `settle` comes next, then `set_pointer`; until ``LATEST`` is
    set, resolving it follows the announcement made here.

    One that the run left behind when it went back to ``start`` is replaced: the two directories swap their names in
    one step, and `settle` deletes the old one. Where the file system has no such step the old one is renamed away
    first; a crash between the two renames leaves neither under its name, and the run's line is whole without it.

    When it raises, ``temp`` is still there: a `CheckpointExistsError` where ``final`` exists, which is untouched.
    """
    if temp.parent != final.parent or published_name(temp.name) != final.name:
        raise MisuseError(
            f"{temp.name!r} was not reserved for {final.name!r}", path=temp, hint="Pass what reserve() returned."
        )
    with storage_errors(temp):
        if not is_directory(temp):
            raise CheckpointNotFoundError(
                "There is no unfinished save to publish", path=temp, hint="Call reserve() and write the checkpoint."
            )
        if not is_verifiable(temp):
            raise IncompleteCheckpointError(
                f"The save has no {MANIFEST_NAME}", path=temp, hint="Write the manifest last, then publish."
            )
        replaces = is_there(final)
        if replaces and not is_abandoned(final.parent, final.name, start):
            _refuse(final)
        storage = current()
        for directory, _ in walk(temp):
            storage.sync_directory(directory)
        lineage = read_lineage(temp)
        announce(final.parent, final.name, "" if lineage is None else lineage.own.id)
        if replaces:
            doomed = final.with_name(doomed_name(final.name))
            storage.remove_tree(doomed)
            if storage.exchange(temp, final):
                return
            storage.rename_new(final, doomed)
        try:
            storage.rename_new(temp, final)
        except FileExistsError:
            _refuse(final)


def settle(temp: Path, final: Path) -> None:
    """Sync the rename that `put_in_place` made, and delete the checkpoint that was replaced.

    Where the file system refuses the sync, ``final`` might not be there after a power failure. What could not be
    deleted is logged, and `remove_leftovers` deletes it later.
    """
    storage, doomed = current(), final.with_name(doomed_name(final.name))
    with storage_errors(final):
        storage.sync_directory(final.parent)
    try:
        if is_there(temp):
            storage.rename_new(temp, doomed)
        if is_there(doomed):
            _remove_doomed(doomed)
    except (OSError, ShardwiseError) as error:
        _LOG.warning("%s is published, but deleting what it replaced failed: %s", final, ShardwiseError.wrap(error))


def abandon(temp: Path) -> None:
    """Delete an unfinished save; one rank calls, when no rank writes to it any more. A second call does nothing."""
    published_name(temp.name)  # refuses any other directory
    with storage_errors(temp):
        current().remove_tree(temp)


def remove_leftovers(root: Path, *, active: Collection[Path] = ()) -> tuple[str, ...]:
    """Delete what interrupted saves and deletions left in the root; one rank calls, before its first save.

    A killed save of a step that is never saved again would otherwise hold its space for ever. A save that is under way
    (``active``), or whose lock is held by a live process, is no leftover; nor is one that another machine claimed and
    that changed within a day. Neither are components saved by themselves (``.saving-model``): their own next save
    removes what is left of them. Returns the names that were deleted.
    """
    if local_path(root) is None:
        return ()  # without locks nobody knows what is still being written
    busy = {published_name(path.name) for path in active}
    gone: list[str] = []
    with storage_errors(root):
        found: dict[str, list[str]] = {}
        for entry in names_in(root) if is_directory(root) else []:
            name = leftover_of(entry)
            if name is not None and name not in busy and parse_checkpoint_name(name) is not None:
                found.setdefault(name, []).append(entry)
        for name, entries in found.items():
            if _may_live_elsewhere(root, name):
                continue
            try:
                mine = claim(root, name)
            except CheckpointBusyError:
                continue
            try:
                for entry in entries:
                    if entry != mine.path.name:
                        current().remove_tree(root / entry)
                        gone.append(entry)
            finally:
                mine.release()
    return tuple(gone)


def _may_live_elsewhere(root: Path, name: str) -> bool:
    """Whether a process of another machine may be writing ``name``.

    Some file systems do not pass locks between machines: there, that a lock can be taken here proves nothing.
    """
    writer = writer_of(root, name)
    if writer is None or writer.alive is not None:
        return False
    temp = root / temporary_name(name)
    try:
        paths = [root / (OWNER + name), *(where / each for where, names in walk(temp) for each in ("", *names))]
    except CheckpointNotFoundError:  # somebody renames or deletes it at this moment
        return True
    changed = [found.changed for found in map(status, paths) if found is not None]
    return any(when is None or time.time() - when < _QUIET_SECONDS for when in changed)


def remove_checkpoint(root: Path, name: str) -> None:
    """Delete a directory so that a crash leaves it either whole under its name, or under none that resolves."""
    doomed = root / doomed_name(name)
    with storage_errors(root):
        current().remove_tree(doomed)
        current().rename_new(root / name, doomed)
        _remove_doomed(doomed)


def _remove_doomed(doomed: Path) -> None:
    # Durable before the first file goes, or a crash could bring back the name of a half-deleted directory.
    current().sync_directory(doomed.parent)
    current().remove_tree(doomed)


def make_root(root: Path) -> None:
    """Make the directory of the checkpoints, durably, where it does not exist; one rank calls."""
    with storage_errors(root):
        missing = []
        path = root
        while not is_there(path) and path != path.parent:
            missing.append(path)
            path = path.parent
        for directory in reversed(missing):
            current().make_directory(directory)
            current().sync_directory(directory.parent)


def _refuse(final: Path) -> None:
    what = f"{final.name} is already there and is never overwritten"
    hint = "Resume from it, delete it, or choose another checkpoint_dir."
    raise CheckpointExistsError(what, path=final, hint=hint)
