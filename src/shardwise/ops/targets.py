"""Finds the directories to verify or inspect for a path given by a user."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from shardwise.disk.names import is_link, is_there, names_in, real_path, status
from shardwise.disk.storage import storage_errors
from shardwise.errors import CheckpointNotFoundError, IncompleteCheckpointError, ManifestError, MisuseError
from shardwise.format.manifest import MANIFEST_NAME
from shardwise.lifecycle import LATEST, list_checkpoints, read_pointer, resolve
from shardwise.lifecycle.names import is_doomed, is_temporary

#: Directories of a checkpoint that may exist alone, each with a manifest of its own.
COMPONENTS = ("model", "optim")
_EXPORTS = ("model/consolidated", "consolidated")
_CLIMB = 4


@dataclass(frozen=True, slots=True)
class Target:
    """A directory to verify or inspect.

    Attributes:
        directory: The directory that the manifest, if there is one, describes.
        under: The requested part, as a path relative to ``directory``; "" for all of it.
        nested: Directories below it that have manifests of their own and are targets of their own.
    """

    directory: Path
    under: str = ""
    nested: tuple[str, ...] = ()

    @property
    def has_manifest(self) -> bool:
        """Whether an entry with the manifest's name exists."""
        return is_there(self.directory / MANIFEST_NAME)


def find_targets(path: str | os.PathLike[str]) -> tuple[Target, ...]:
    """Find what ``path`` names: a checkpoint, a part of one, components by themselves, or a root's ``LATEST``.

    Returns:
        One target, or one for each component of a directory whose components have manifests of their own.

    Raises:
        CheckpointNotFoundError: Nothing is there, or a root in which nothing was published.
        IncompleteCheckpointError: An interrupted save.
        MisuseError: It is neither a directory nor a file.
        StorageError: The file system refused.
    """
    given = Path(path).absolute()
    with storage_errors(given):
        if not is_there(given):
            found = resolve(given.parent, given)
            assert found is not None  # only LATEST of an empty root resolves to nothing
            return find_targets(found.path)
        real = real_path(given)
        _refuse_unfinished(real)
        there = status(real)
        if there is None:
            raise CheckpointNotFoundError("the link leads to nothing", path=given, hint=f"It leads to {real}.")
        if there.kind not in ("file", "directory"):
            raise MisuseError(
                f"this is a {there.kind}, and neither a directory nor a file",
                path=real,
                hint="Name a checkpoint or a model.",
            )
        if there.kind == "file":
            # A hub cache's snapshot consists of links to files whose names say nothing.
            named = given if is_link(given) and _above(real) is None else real
            return (_above(real) or Target(real_path(named.parent), named.name),)
        names_in(real)  # an unreadable directory is the caller's mistake, not damage
        return _in_directory(real)


def with_nested(targets: tuple[Target, ...]) -> tuple[Target, ...]:
    """The targets, and exports that `consolidate` put inside them later, which have manifests of their own."""
    found: list[Target] = []
    for target in targets:
        own = [
            Target(target.directory / name)
            for name in _EXPORTS
            if not target.under and target.has_manifest and Target(target.directory / name).has_manifest
        ]
        names = tuple(each.directory.relative_to(target.directory).as_posix() for each in own)
        found += [Target(target.directory, target.under, names), *own]
    return tuple(found)


def is_unfinished(relative: str) -> bool:
    """Whether a file belongs to a directory that is being written or deleted, and is not read."""
    return any(is_temporary(part) or is_doomed(part) for part in PurePosixPath(relative).parts)


def _refuse_unfinished(real: Path) -> None:
    """Refuse an interrupted save, and what is in one."""
    for place in (real, *list(real.parents)[:_CLIMB]):
        if is_temporary(place.name) or is_doomed(place.name):
            raise IncompleteCheckpointError(
                "this is an interrupted save"
                if place == real
                else f"this is part of an interrupted save, {place.name}",
                path=real,
                hint="Name a published checkpoint, or the root.",
            )


def _in_directory(real: Path) -> tuple[Target, ...]:
    if Target(real).has_manifest:
        return (Target(real),)
    above = _above(real)
    if above is not None:
        return (above,)
    alone = tuple(Target(real / name) for name in COMPONENTS if Target(real / name).has_manifest)
    if alone:
        return alone
    if list_checkpoints(real) or read_pointer(real, LATEST) is not None:
        found = resolve(real)
        if found is None:
            raise CheckpointNotFoundError(
                "no checkpoint was published in this root", path=real, hint="Name a checkpoint's directory."
            )
        return (Target(found.path),)
    return (Target(real),)


def _above(real: Path) -> Target | None:
    """The checkpoint that ``real`` is a part of."""
    from shardwise.engine.verify import files_below, load_manifest

    for parent in list(real.parents)[:_CLIMB]:
        if Target(parent).has_manifest:
            under = real.relative_to(parent).as_posix()
            try:
                manifest = load_manifest(parent)
            except ManifestError:
                return Target(parent, under)
            if manifest is not None and files_below(manifest, (under,)):
                return Target(parent, under)
    return None
