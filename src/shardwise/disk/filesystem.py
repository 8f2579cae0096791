"""The few operations that change a checkpoint root, behind an interface so that faults can be put between them."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Protocol

from shardwise.disk.guarded import is_followed, is_made_of_links
from shardwise.errors import ShardwiseError, StorageError

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
# renameat2 exists but this kernel, C library or file system (NFS among them) does not take the flag.
_NO_FLAG = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


class FileSystem(Protocol):
    """What the lifecycle changes on disk; reading needs no interface, it leaves nothing behind.

    One process at a time (the coordinating rank) calls these for a root. Each raises ``OSError`` on failure. A save
    that is published calls, in this order:

    1. `make_directory` for the temporary directory, after `remove_tree` of an interrupted predecessor;
    2. `fsync_path` for every directory in it once the writers are done;
    3. `write_file`, `rename`, `fsync_path` for the announcement;
    4. `rename_new` of the directory to its published name, then `fsync_path` of the root;
    5. `symlink` (or `write_file`), `rename`, `fsync_path` for each pointer;
    6. `rename_new`, `fsync_path`, `remove_tree` for each checkpoint that retention gives up.
    """

    def make_directory(self, path: Path) -> None:
        """Create the directory; it must not exist, its parent must."""

    def write_file(self, path: Path, data: bytes) -> None:
        """Create the file with ``data`` and make its content durable; it must not exist."""

    def symlink(self, target: str, path: Path) -> None:
        """Create a symbolic link at ``path``, which must not exist, to ``target`` (relative to the link)."""

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or link atomically, replacing a file or link at ``target``."""

    def rename_new(self, source: Path, target: Path) -> None:
        """Rename atomically; ``FileExistsError`` where ``target`` exists."""

    def exchange(self, one: Path, other: Path) -> bool:
        """Swap two existing names in one atomic step; ``False``, with nothing done, where the system has no such step.

        Only what replaces a component that stands alone, or a checkpoint that was abandoned, calls it.
        """
        ...

    def fsync_path(self, path: Path) -> None:
        """Make a file's content, or a directory's entries, durable."""

    def remove_tree(self, path: Path) -> None:
        """Delete a file, link or directory tree; nothing happens where there is none."""


class LocalFileSystem:
    """`FileSystem` on what the operating system has mounted."""

    def make_directory(self, path: Path) -> None:
        """See `FileSystem`."""
        path.mkdir()

    def write_file(self, path: Path, data: bytes) -> None:
        """See `FileSystem`."""
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def symlink(self, target: str, path: Path) -> None:
        """See `FileSystem`."""
        path.symlink_to(target)

    def rename(self, source: Path, target: Path) -> None:
        """See `FileSystem`."""
        os.replace(source, target)

    def rename_new(self, source: Path, target: Path) -> None:
        """See `FileSystem`.

        Without ``renameat2`` this is a look followed by a rename. A root has one coordinating rank, so nobody creates
        ``target`` in between; and a non-empty directory would not be replaced even then.
        """
        code = _rename_with(_RENAME_NOREPLACE, source, target)
        if code in _NO_FLAG:
            if os.path.lexists(target):
                code = errno.EEXIST
            else:
                os.rename(source, target)
                return
        if code:
            raise OSError(code, os.strerror(code), str(source), None, str(target))

    def exchange(self, one: Path, other: Path) -> bool:
        """See `FileSystem`."""
        code = _rename_with(_RENAME_EXCHANGE, one, other)
        if code and code not in _NO_FLAG:
            raise OSError(code, os.strerror(code), str(one), None, str(other))
        return not code

    def fsync_path(self, path: Path) -> None:
        """See `FileSystem`. Some network file systems cannot sync a directory and say so; their renames are durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            if not (is_directory and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)):
                raise
        finally:
            os.close(descriptor)

    def remove_tree(self, path: Path) -> None:
        """See `FileSystem`. Links inside the tree are deleted, never followed."""
        with suppress(FileNotFoundError):
            if stat.S_ISDIR(os.lstat(path).st_mode):
                shutil.rmtree(path)
            else:
                os.unlink(path)


LOCAL: FileSystem = LocalFileSystem()


@cache
def _renameat2() -> Callable[..., int] | None:
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None


def _rename_with(flag: int, source: Path, target: Path) -> int:
    """Rename in a way that only the kernel can; return the error number, 0 for success."""
    call = _renameat2()
    if call is None:
        return errno.ENOSYS
    failed = call(
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(source)),
        ctypes.c_int(_AT_FDCWD),
        ctypes.c_char_p(os.fsencode(target)),
        ctypes.c_uint(flag),
    )
    return ctypes.get_errno() if failed else 0


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the operating system into a `StorageError` that names ``path`` where it names none."""
    try:
        yield
    except ShardwiseError:
        raise
    except OSError as error:
        raise StorageError.from_os(error, path=error.filename or path) from error


def read_small_file(path: Path, limit: int, *, follows: bool = False) -> bytes | None:
    """Content of a regular file of at most ``limit`` bytes; ``None`` for anything else or nothing.

    A FIFO or device in its place is never opened for reading, and a link is not followed unless ``follows``.
    """
    try:
        if follows and not stat.S_ISREG(os.stat(path).st_mode):
            return None
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follows else os.O_NOFOLLOW)
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(limit + 1)
    return data if len(data) <= limit else None


def read_note(directory: Path, name: str, limit: int) -> bytes | None:
    """As `read_small_file`, of a file of a checkpoint; a link is followed where the checkpoint is made of links."""
    path = directory / name
    return read_small_file(path, limit, follows=is_followed(path, is_made_of_links(directory)))
