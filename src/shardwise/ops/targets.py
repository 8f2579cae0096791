"""Finds the directories to verify or inspect for a path given by a user, and says where none may be written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

from shardwise.disk.names import exists, is_directory, is_link, is_there, names_in, real_path, status
from shardwise.disk.storage import storage_errors
from shardwise.engine.verify import files_below, load_manifest
from shardwise.errors import (
    CheckpointNotFoundError,
    IncompleteCheckpointError,
    ManifestError,
    MisuseError,
    ShardwiseError,
    StorageError,
)
from shardwise.format.manifest import MANIFEST_NAME
from shardwise.lifecycle import LATEST, list_checkpoints, read_pointer, resolve
from shardwise.lifecycle.names import is_doomed, is_temporary, parse_checkpoint_name
from shardwise.sources.directory_contents import found_instead, holds_model, models_below

#: Directories of a checkpoint that may exist alone, each with a manifest of its own.
COMPONENTS = ("model", "optim")
#: What may be written into a published checkpoint, with a manifest of its own: its export, made later.
EXPORTS = ("model/consolidated", "consolidated")
_CLIMB = 4
_SHOWN, _MOST_DIRECTORIES = 5, 200


@dataclass(frozen=True, slots=True)
class Target:
    """A directory to verify or inspect.

    Attributes:
        directory: The directory that the manifest, if there is one, describes.
        under: The requested part, as a path relative to ``directory``; "" for all of it.
    """

    directory: Path
    under: str = ""

    @property
    def has_manifest(self) -> bool:
        """Whether an entry with the manifest's name exists."""
        return is_there(self.directory / MANIFEST_NAME)


def find_targets(path: str | os.PathLike[str]) -> tuple[Target, ...]:
    """Find what ``path`` names: a checkpoint, a part of one, components by themselves, or a root's ``LATEST``.

    Returns:
        One target, or one for each component of a directory whose components have manifests of their own.
    """
    given = Path(path).absolute()
    with storage_errors(given):
        if not is_there(given) and read_pointer(given.parent, given.name) is not None:  # without links it is a file
            found = resolve(given.parent, given)
            assert found is not None  # only LATEST of an empty root resolves to nothing
            return find_targets(found.path)
        real = real_path(given)
        _refuse_unfinished(real)
        there = status(real)
        if there is None:
            raise nothing_at(given)
        if there.kind not in ("file", "directory"):
            raise MisuseError(
                f"this is a {there.kind}, and neither a directory nor a file",
                path=real,
                hint="Name a checkpoint or a model.",
            )
        if real.name == MANIFEST_NAME:
            return _in_directory(real.parent)
        if there.kind == "file":
            # A hub cache's snapshot consists of links to files whose names say nothing.
            named = given if is_link(given) and _above(real) is None else real
            return (_above(real) or Target(real_path(named.parent), named.name),)
        names_in(real)  # an unreadable directory is the caller's mistake, not damage
        return _in_directory(real)


def nothing_at(given: Path) -> CheckpointNotFoundError:
    """The error about an absolute path at which nothing is, with the name that may have been meant, or those there."""
    if is_link(given):
        return CheckpointNotFoundError("the link leads to nothing", path=given, hint=f"It leads to {real_path(given)}.")
    missing = given
    while not exists(missing.parent):
        missing = missing.parent
    names = _names(missing.parent)
    there = [info.name for info in list_checkpoints(missing.parent)] if names else []
    numbered = parse_checkpoint_name(missing.name) is not None  # the most alike number is not the one that was meant
    alike = [] if numbered else get_close_matches(missing.name, names, n=1, cutoff=0.8)
    hint = f"There is nothing called {missing.name} in {missing.parent}. "
    if alike:
        hint = f"Did you mean {str(missing.with_name(alike[0]) / given.relative_to(missing))!r}?"
    elif there:
        hint += (
            f"It has the checkpoints {', '.join(reversed(there[-_SHOWN:]))}{', ...' if len(there) > _SHOWN else ''}."
        )
    else:
        hint += "Check the path and that the file system is mounted."
    return CheckpointNotFoundError("there is nothing at this path", path=given, hint=hint)


def nothing_in(directory: Path) -> CheckpointNotFoundError:
    """The error about a directory in which no file is."""
    return CheckpointNotFoundError(
        "the directory holds no file, or those of interrupted saves alone",
        path=directory,
        hint="Name a checkpoint, a part of one, or a directory of checkpoints; `shardwise ls` lists interrupted saves.",
    )


def where_to_look(directory: Path) -> str:
    """A sentence about what a directory holds that is no root of checkpoints; empty where that is no model."""
    if holds_model(directory):
        return "It is a model's directory, or another tool's checkpoint: `shardwise inspect` shows it."
    roots = _roots_below(directory)
    if roots:
        return f"There are checkpoints in {_listed(roots)}."
    models = models_below(directory)
    if models:
        return f"What another tool saved is in {_listed(models)}: `shardwise inspect` shows it."
    return ""


def _roots_below(directory: Path) -> list[Path]:
    """Directories one or two levels below that hold checkpoints by their names."""
    found: list[Path] = []
    level = [directory]
    for _ in range(2):
        level = [
            parent / name
            for parent in level
            for name in _names(parent)
            if not name.startswith(".") and is_directory(parent / name, follows=False)
        ][:_MOST_DIRECTORIES]
        found += [each for each in level if any(map(parse_checkpoint_name, _names(each)))]
    return found


def _names(directory: Path) -> list[str]:
    """The names in a directory; none of one that cannot be read: a suggestion must not replace the error it is for."""
    try:
        return names_in(directory)
    except (ShardwiseError, OSError):
        return []


def _listed(places: Sequence[Path]) -> str:
    shown = ", ".join(str(place) for place in places[:_SHOWN])
    return shown + (f" and {len(places) - _SHOWN} more directories" if len(places) > _SHOWN else "")


def with_nested(targets: tuple[Target, ...]) -> tuple[Target, ...]:
    """The targets, and exports that `consolidate` put inside them later, which have manifests of their own."""
    found: list[Target] = []
    for target in targets:
        whole = not target.under and target.has_manifest
        own = [Target(target.directory / name) for name in EXPORTS if whole]
        found += [target, *(each for each in own if each.has_manifest)]
    return tuple(found)


def refuse_inside(target: Path) -> None:
    """Raise `MisuseError` where the place is in a published checkpoint, which would be damaged by a file too many."""
    for directory in target.parents:
        if target.relative_to(directory).as_posix() not in EXPORTS and _is_checkpoint(directory):
            raise MisuseError(
                f"the place is in the checkpoint {str(directory)!r}, whose manifest does not have it",
                path=target,
                hint="Choose a place outside of it.",
            )


def _is_checkpoint(directory: Path) -> bool:
    try:
        return is_there(directory / MANIFEST_NAME) and load_manifest(directory) is not None
    except (ManifestError, StorageError):  # many things are called so
        return False


def is_unfinished(relative: str) -> bool:
    """Whether a file belongs to a directory that is being written or deleted, and is not read."""
    return any(is_temporary(part) or is_doomed(part) for part in PurePosixPath(relative).parts)


def _refuse_unfinished(real: Path) -> None:
    """Refuse an interrupted save, and what is in one."""
    for place in (real, *list(real.parents)[:_CLIMB]):
        if is_temporary(place.name) or is_doomed(place.name):
            what = "an interrupted save" if place == real else f"part of an interrupted save, {place.name}"
            raise IncompleteCheckpointError(
                f"this is {what}", path=real, hint="Name a published checkpoint, or the root."
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
    below = () if found_instead(real) else _roots_below(real)
    if below:
        raise CheckpointNotFoundError(
            f"this is no checkpoint; there are some in {_listed(below)}",
            path=real,
            hint="Name one of these directories, whose newest checkpoint is taken, or a checkpoint in it.",
        )
    return (Target(real),)


def _above(real: Path) -> Target | None:
    """The checkpoint that ``real`` is a part of."""
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
