"""Writing a directory beside its place and renaming it there as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardwise.disk.names import exists, is_there, walk
from shardwise.disk.storage import Storage, storage_errors
from shardwise.errors import CheckpointExistsError
from shardwise.lifecycle import temporary_name


def refuse_existing(target: Path) -> None:
    """Raise `CheckpointExistsError` where something is at the place already."""
    if is_there(target):
        raise CheckpointExistsError(
            "there is something at this place already, which is never overwritten",
            path=target,
            hint="Use it, delete it, or choose another place.",
        )


@contextmanager
def written_aside(target: Path, storage: Storage) -> Iterator[Path]:
    """The empty directory to write into, which becomes ``target`` at the end; a failure leaves nothing.

    Files in it have to be durable by then.

    Raises:
        CheckpointExistsError: There is something at ``target``.
        StorageError: The file system refused.
    """
    aside = target.with_name(temporary_name(target.name))
    made = absent_directories(target.parent)
    with storage_errors(aside):
        storage.remove_tree(aside)
    try:
        storage.make_directory(aside)
        yield aside
        with storage_errors(target):
            for directory, _ in walk(aside):
                storage.sync_directory(directory)
            refuse_existing(target)
            storage.rename_new(aside, target)
            storage.sync_directory(target.parent)
    except BaseException:
        with storage_errors(aside):
            storage.remove_tree(aside)
            for directory in made:
                storage.remove_empty(directory)
        raise


def absent_directories(directory: Path) -> list[Path]:
    """The directories that have to be made for this one to exist, the innermost first."""
    absent = []
    while not exists(directory):
        absent.append(directory)
        directory = directory.parent
    return absent
