"""Pointers of a root: ``LATEST`` and its like, replaced atomically.

A pointer is a relative symbolic link, or a text file ``NAME.txt`` where the file system has no links. If a crash leaves
both kinds, the text file decides: one that is new counts at once, one that is old until it is removed, and in either
case the pointer changes in a single step.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from shardwise.disk.guarded import read_small_file
from shardwise.disk.names import is_directory, is_link, is_there, real_path
from shardwise.disk.sequential import write_file
from shardwise.disk.storage import current, storage_errors
from shardwise.errors import CheckpointNotFoundError, MisuseError, StorageError
from shardwise.lifecycle.names import ANNOUNCEMENT_NAME, DRAFT, LATEST, is_plain, parse_checkpoint_name

_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_TEXT_LIMIT = 4096


def set_pointer(root: Path, name: str, target: str) -> None:
    """Let the pointer ``name`` lead to the checkpoint directory ``target``; one rank calls.

    At every moment, a crash included, the pointer leads to the old target or to the new one. Setting ``LATEST`` also
    ends the publication that `announce` began.
    """
    if not is_plain(name) or name.endswith(".txt") or parse_checkpoint_name(name) is not None:
        raise MisuseError(f"{name!r} cannot be the name of a pointer", hint="Use letters, digits and underscores.")
    if not is_plain(target):
        raise MisuseError(f"{target!r} is not the name of a checkpoint", hint="Name a directory of the root.")
    if not is_directory(root / target):
        raise CheckpointNotFoundError(
            f"The pointer {name} cannot lead to {target!r}", path=root / target, hint="Publish the checkpoint first."
        )
    link, text = root / name, root / f"{name}.txt"
    with storage_errors(root):
        if _replace_link(root, link.name, target):
            stale = text
        else:
            _replace_text(root, text.name, target)
            stale = link
        leftovers = [stale] if is_there(stale) and not is_directory(stale, follows=False) else []
        if name == LATEST and is_there(root / ANNOUNCEMENT_NAME):
            leftovers.append(root / ANNOUNCEMENT_NAME)
        for path in leftovers:
            current().remove_tree(path)
        if leftovers:
            current().sync_directory(root)


def read_pointer(root: Path, name: str) -> str | None:
    """Name of the directory, which need not exist, in the root that a pointer leads to; ``None`` for no pointer.

    One that leads outside the root or in a circle, or is unreadable, is a `CheckpointNotFoundError`.
    """
    if not is_plain(name):
        return None
    path = root / f"{name}.txt"
    with storage_errors(root / name):
        if is_there(path):
            target = _read_text(path)
        elif is_link(root / name):
            path = root / name
            target = current().read_link(path)
        else:
            return None
    inside = None if target is None else _inside(root, target)
    if inside is None:
        what = "cannot be read" if target is None else f"leads to {target!r}, which is not in its root"
        raise CheckpointNotFoundError(
            f"The pointer {name} {what}", path=path, hint="Name the checkpoint directory, or pass its path."
        )
    return inside


def pointers(root: Path) -> dict[str, str]:
    """Every pointer of the root that leads to something in it, by name; the target need not exist."""
    found: dict[str, str] = {}
    with storage_errors(root):
        entries = current().entries(root) if is_directory(root) else []
        links = [each.name for each in entries if each.kind == "symbolic link" or each.name.endswith(".txt")]
        for name in dict.fromkeys(name.removesuffix(".txt") for name in links):
            # One that cannot be read protects nothing in this root; naming it to resolve() is what reports it.
            with contextlib.suppress(CheckpointNotFoundError):
                target = read_pointer(root, name)
                if target is not None:
                    found[name] = target
    return found


def announce(root: Path, name: str, known_as: str = "") -> None:
    """Record durably that the checkpoint ``name`` is about to be published; one rank calls.

    Publication is one rename and moving ``LATEST`` another. A crash between the two would resume from the older
    checkpoint, and the next save of the same step would then find its name taken. With the record, `announced`
    distinguishes that case from a ``LATEST`` that somebody set back on purpose; ``known_as``, its id, distinguishes the
    checkpoint from one that it replaces.
    """
    with storage_errors(root):
        _replace_text(root, ANNOUNCEMENT_NAME, f"{name} {known_as}".rstrip())


def announced(root: Path) -> tuple[str, str] | None:
    """Name and id of the checkpoint whose publication began and whose ``LATEST`` was not set; it may not exist."""
    with storage_errors(root):
        text = _read_text(root / ANNOUNCEMENT_NAME)
    name, _, known_as = (text or "").partition(" ")
    return (name, known_as) if is_plain(name) else None


def _replace_link(root: Path, name: str, target: str) -> bool:
    if is_directory(root / name, follows=False):
        # A copy that followed the link. It may be somebody's only one, so the text file takes over beside it.
        return False
    draft, storage = root / (DRAFT + name), current()
    storage.remove_tree(draft)
    try:
        storage.symlink(target, draft)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    storage.rename(draft, root / name)
    storage.sync_directory(root)
    return True


def _replace_text(root: Path, name: str, target: str) -> None:
    draft, storage = root / (DRAFT + name), current()
    storage.remove_tree(draft)
    write_file(storage, draft, f"{target}\n".encode())
    storage.rename(draft, root / name)
    storage.sync_directory(root)


def _read_text(path: Path) -> str | None:
    data = read_small_file(path, _TEXT_LIMIT)
    if data is None:
        return None
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        return None
    return text if text and text.isprintable() else None


def linked_checkpoint(root: Path, name: str) -> bool:
    """Whether ``name`` in the root is a link to a checkpoint directory elsewhere (an archive).

    A link within the root is a pointer, and so is one to a checkpoint with another number.
    """
    path = root / name
    if parse_checkpoint_name(name) is None or not is_link(path):
        return False
    try:
        real = real_path(path)
        if not is_directory(real) or real.is_relative_to(real_path(root)):
            return False
    except StorageError:
        return False
    return real.name == name or parse_checkpoint_name(real.name) is None


def _inside(root: Path, target: str) -> str | None:
    """First component below the root of what ``target`` finally is; a circle or a way out gives ``None``."""
    if linked_checkpoint(root, target.rstrip(os.sep)):
        return target.rstrip(os.sep)
    base = real_path(root)
    try:
        full = real_path(base / target)
    except OSError:
        return None
    relative = os.path.relpath(full, base)
    first = relative.split(os.sep, 1)[0]
    return first if is_plain(first) else None
