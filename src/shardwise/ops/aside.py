"""Writing a directory beside its place and renaming it there as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardwise.disk.names import exists, is_there, walk
from shardwise.disk.storage import Storage, storage_errors
from shardwise.errors import CheckpointExistsError, ShardwiseError
from shardwise.lifecycle import temporary_name
from shardwise.lifecycle.ownership import claim


def refuse_existing(target: Path) -> None:
    """Raise `CheckpointExistsError` where something is at the place already."""
    if is_there(target):
        raise CheckpointExistsError(
            "there is something at this place already, which is never overwritten",
            path=target,
            hint="Use it, delete it, or choose another place.",
        )


@contextmanager
def written_aside(target: Path, storage: Storage, *, resumes: bool = False) -> Iterator[Path]:
    """The directory to write into, which becomes ``target`` at the end; a failure leaves nothing.

    Files in it have to be durable by then. It is empty, or with ``resumes`` has what a process that was killed left.

    Raises:
        CheckpointExistsError: There is something at ``target``.
        CheckpointBusyError: Another process is writing it.
        StorageError: The file system refused.
    """
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
                refuse_existing(target)
                storage.rename_new(aside, target)
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
