"""Writing a directory beside its place and renaming it there as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardwise.disk.names import exists, is_there, walk
from shardwise.disk.storage import Storage, storage_errors
from shardwise.engine.verify import load_manifest
from shardwise.errors import CheckpointExistsError, ManifestError, MisuseError, ShardwiseError, StorageError
from shardwise.format.manifest import MANIFEST_NAME
from shardwise.lifecycle import temporary_name
from shardwise.lifecycle.ownership import claim

#: What may be written into a published checkpoint, with a manifest of its own: its export, made later.
EXPORTS = ("model/consolidated", "consolidated")


def refuse_existing(target: Path) -> None:
    """Raise `CheckpointExistsError` where something is at the place already, and see `refuse_inside`."""
    refuse_inside(target)
    if is_there(target):
        raise _existing(target)


def _existing(target: Path) -> CheckpointExistsError:
    return CheckpointExistsError(
        "something is already there, and is never overwritten",
        path=target,
        hint="Use it, delete it, or choose another place.",
    )


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


@contextmanager
def written_aside(target: Path, storage: Storage, *, resumes: bool = False) -> Iterator[Path]:
    """The directory to write into, which becomes ``target`` at the end; a failure leaves nothing.

    Files in it have to be durable by then. It is empty, or with ``resumes`` has what a process that was killed left.
    """
    refuse_existing(target)
    aside = target.with_name(temporary_name(target.name))
    made = _absent_directories(target.parent)
    try:
        storage.make_directory(target.parent)
        mine = claim(target.parent, target.name)
        try:
            with storage_errors(target):
                there = storage.status(aside, follows=False)
                if not (resumes and there is not None and there.kind == "directory"):
                    storage.remove_tree(aside)
                storage.make_directory(aside)
                yield aside
                for directory, _ in walk(aside):
                    storage.sync_directory(directory)
                try:
                    storage.rename_new(aside, target)
                except FileExistsError as error:  # it was not there when this began
                    raise _existing(target) from error
                storage.sync_directory(target.parent)
        except BaseException as error:
            with storage_errors(target):
                storage.remove_tree(aside)
            if isinstance(error, ShardwiseError) and error.path is not None and Path(error.path).is_relative_to(aside):
                error.path = str(target / Path(error.path).relative_to(aside))  # what is beside it is gone
            raise
        finally:
            mine.release()
    except BaseException:
        with storage_errors(target):
            for directory in made:
                storage.remove_empty(directory)
        raise


def _absent_directories(directory: Path) -> list[Path]:
    """The directories that have to be made for this one to exist, the innermost first."""
    absent = []
    while not exists(directory):
        absent.append(directory)
        directory = directory.parent
    return absent
