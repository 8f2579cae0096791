"""Looking at names in the storage of the call (`shardwise.disk.storage.current`): what is there, and of which kind.

Each raises ``StorageError`` where the storage refuses; what is absent is no failure unless a function says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from shardwise.disk.storage import Status, current
from shardwise.errors import CheckpointNotFoundError


def status(path: Path, *, follows: bool = True) -> Status | None:
    """What is at ``path``, see `Storage.status`."""
    return current().status(path, follows=follows)


def is_there(path: Path) -> bool:
    """Whether the name is taken, be it by a link that leads nowhere."""
    return status(path, follows=False) is not None


def exists(path: Path) -> bool:
    """Whether there is something, behind links."""
    return status(path) is not None


def is_file(path: Path) -> bool:
    """Whether there is a regular file, behind links."""
    found = status(path)
    return found is not None and found.kind == "file"


def file_size(path: Path) -> int:
    """The bytes of a file, behind links; `CheckpointNotFoundError` where nothing is there."""
    found = status(path)
    if found is None:
        raise absent(path)
    return found.size


def absent(path: Path) -> CheckpointNotFoundError:
    """The error of a file that is not there."""
    hint = "Check the path, and that it is mounted on every node."
    return CheckpointNotFoundError(f"no file {str(path)!r}", path=path, hint=hint)


def is_directory(path: Path, *, follows: bool = True) -> bool:
    """Whether there is a directory, behind links if ``follows``."""
    found = status(path, follows=follows)
    return found is not None and found.kind == "directory"


def is_link(path: Path) -> bool:
    """Whether the name is that of a symbolic link."""
    found = status(path, follows=False)
    return found is not None and found.kind == "symbolic link"


def real_path(path: Path) -> Path:
    """Where ``path`` is when every link in it is followed, see `Storage.real_path`."""
    return current().real_path(path)


def names_in(directory: Path) -> list[str]:
    """The names in a directory, sorted; `CheckpointNotFoundError` if absent, `StorageError` if it is no directory."""
    return [entry.name for entry in current().entries(directory)]


def walk(top: Path, enters: Callable[[Path], bool] = lambda directory: True) -> Iterator[tuple[Path, list[str]]]:
    """Every directory below ``top``, itself included, with the names in it that are no directories, sorted.

    Those inside a directory come before it, as for deleting and syncing. Links are not followed, nor directories that
    are not to be entered.
    """
    if not is_directory(top):
        return
    others = []
    for entry in current().entries(top):
        if entry.kind != "directory":
            others.append(entry.name)
        elif enters(top / entry.name):
            yield from walk(top / entry.name, enters)
    yield top, others


def files_under(top: Path, enters: Callable[[Path], bool] = lambda directory: True) -> list[Path]:
    """Every file below ``top`` and every link to one, sorted; see `walk`."""
    found = (where / name for where, names in walk(top, enters) for name in names)
    return sorted(path for path in found if is_file(path))
