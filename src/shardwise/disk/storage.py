"""What a checkpoint is written to and read from, as one interface, and the local file system's implementation.

Everything that a call does to a disk goes through a `Storage`, so that another one (remote, faulty, recording) can
stand in its place; `shardwise.disk.names` has functions for looking at names. A call has one storage: whoever begins
it says which (`using`), what looks at names or reads a small file asks for it (`current`), and what keeps handles is
given it. A save calls it in this order, on the ranks named:

1. rank 0: ``make_directory(..., new=True)`` for the temporary directory, after ``remove_tree`` of an interrupted
   predecessor;
2. rank 0, or each rank for files of its own: ``make_directory``, ``check_space``, ``create``;
3. every rank: ``open`` for writing, ``write`` at offsets, ``sync``, ``close``; then ``sync_directory``;
4. rank 0: ``create``, ``sync`` of the manifest, ``sync_directory`` of every directory;
5. rank 0: ``create``, ``sync``, ``rename``, ``sync_directory`` for the announcement;
6. rank 0: ``rename_new`` of the directory to its published name, then ``sync_directory`` of the root;
7. rank 0: ``symlink`` (or ``create``), ``rename``, ``sync_directory`` for each pointer;
8. rank 0: ``rename_new``, ``sync_directory``, ``remove_tree`` for each checkpoint that retention gives up.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from shardwise.disk.scatter import read_all, read_rows
from shardwise.errors import CheckpointNotFoundError, FormatError, ShardwiseError, StorageError

Buffer = bytes | bytearray | memoryview

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_NOT_SUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
#: What says that a name leads to nothing, and not that it could not be followed.
_NOTHING_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
# renameat2 exists but this kernel, C library or file system (NFS among them) does not take the flag.
_NO_FLAG = _NOT_SUPPORTED | {errno.ENOSYS}


Kind = Literal[
    "file", "directory", "symbolic link", "named pipe", "socket", "character device", "block device", "special file"
]

_KINDS: dict[int, Kind] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


@dataclass(frozen=True, slots=True)
class Status:
    """What stands under a name; the size is a file's, in bytes.

    Attributes:
        identity: What distinguishes it from everything else in the storage, whatever name it has; ``None`` where the
            storage knows no such thing.
        changed: When its content changed last, in seconds since 1970; ``None`` where the storage does not say. For
            people, and for whether a save of another machine is long over; nothing else is decided by it.
    """

    kind: Kind
    size: int
    identity: tuple[int, int] | None = None
    changed: float | None = field(default=None, compare=False)


class Entry(NamedTuple):
    """A name in a directory, and what it is itself: a link is a link."""

    name: str
    kind: Kind


class Storage(Protocol):
    """All that a checkpoint needs of a file system.

    A call hands one storage every absolute path, those of a base model and of the staging directory too: a storage for
    one tree leaves the others to `LOCAL`. Offsets and sizes are in bytes.

    Every failure is a typed error that names the path; those of operations on a handle do not know it (`locating`), and
    what changes names raises ``OSError``. Any rank calls, but for what changes names.
    """

    # --- bytes of files -------------------------------------------------------------------------------------------

    def create(self, path: Path, size: int, head: Buffer) -> None:
        """Create a file of ``size`` bytes with its space reserved, beginning with ``head``; replaces an old one."""

    def open(self, path: Path, *, writable: bool) -> int:
        """Open an existing regular file; returns a handle."""

    def write(self, handle: int, data: Buffer, offset: int) -> None:
        """Write all of ``data``."""

    def read(self, handle: int, into: memoryview, offset: int) -> int:
        """Fill ``into``; returns how many bytes there were, fewer only at the end of the file."""

    def status_of(self, handle: int) -> Status:
        """The open file: its size now, and the identity that `status` gives under its name."""

    def sync(self, handle: int) -> None:
        """Make the file's bytes durable."""

    def close(self, handle: int) -> None:
        """Release a handle."""

    # --- directories, as places for files -------------------------------------------------------------------------

    def make_directory(self, path: Path, *, new: bool = False) -> None:
        """Create a directory and its parents; fine if it exists, unless it has to be ``new``."""

    def check_space(self, path: Path, nbytes: int) -> None:
        """Raise `StorageError` (ENOSPC) unless ``nbytes`` are free below ``path``, which exists."""

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""

    # --- changing names: one rank at a time, the coordinating one, calls these for a root. Each raises ``OSError`` on
    # failure, with the system's ``errno``, which callers use to choose an alternative.

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or link atomically, replacing a file or link at ``target``."""

    def rename_new(self, source: Path, target: Path) -> None:
        """Rename atomically; ``FileExistsError`` where ``target`` exists."""

    def exchange(self, one: Path, other: Path) -> bool:
        """Swap two existing names in one atomic step; ``False``, with nothing done, where the system has no such step.

        Only what replaces a component that stands alone, or a checkpoint that was abandoned, calls it.
        """

    def symlink(self, target: str, path: Path) -> None:
        """Create a symbolic link at ``path``, which must not exist, to ``target`` (relative to the link)."""

    def remove_file(self, path: Path) -> None:
        """Delete a file or link, never a directory; nothing happens where there is none."""

    def remove_tree(self, path: Path) -> None:
        """Delete a file, link or directory tree; nothing happens where there is none."""

    def remove_empty(self, path: Path) -> None:
        """Delete an empty directory; nothing happens where there is none, or something in it."""

    def make_executable(self, path: Path) -> None:
        """Let those run a file who may read it; nothing happens where a storage has no such right."""

    # --- looking at names, which opens nothing --------------------------------------------------------------------

    def status(self, path: Path, *, follows: bool = True) -> Status | None:
        """What is at ``path``, or ``None``: nothing, or a name that can never be.

        If ``follows``, a link stands for what it leads to (if that is nowhere, or a circle, for nothing), else for
        itself.
        """

    def entries(self, path: Path) -> list[Entry]:
        """All that is in a directory, by name."""

    def read_link(self, path: Path) -> str:
        """The text of a link."""

    def real_path(self, path: Path) -> Path:
        """Where ``path`` is when every link in it is followed; where nothing is there, where it would be.

        A storage without links gives ``path``. A link in a circle raises ``StorageError``.
        """


@runtime_checkable
class IsLocal(Protocol):
    """An optional capability of a `Storage`: its files are this machine's, for what needs more than bytes and names.

    Locks of processes, memory-mapped files, and libraries that write files by themselves need it. A storage without it
    has no locks; the files of libraries are copied.
    """

    def local_path(self, path: Path) -> Path:
        """Where this machine has what the storage has at ``path``."""


@runtime_checkable
class ReadsRows(Protocol):
    """An optional capability of a `Storage`: rows with gaps between them, many in one operation."""

    def read_rows(
        self, handle: int, into: memoryview, rows: int, width: int, pitch: int, period: int, offset: int
    ) -> int:
        """Read rows of ``width`` bytes, ``period`` apart from ``offset`` on, to places ``pitch`` apart in ``into``.

        The gaps are read along. Returns how many rows there were, fewer only at the end of the file.
        """


#: File systems on which reserving space costs nothing: an allocation of extents, no write of zeros.
_CHEAP_RESERVATION = frozenset({"ext4", "xfs", "btrfs", "f2fs"})


class LocalStorage:
    """`Storage` on a mounted file system; what a method is for, is said there."""

    def make_directory(self, path: Path, *, new: bool = False) -> None:  # noqa: D102
        with _typed(path):
            path.mkdir(parents=True, exist_ok=not new)

    def check_space(self, path: Path, nbytes: int) -> None:
        """Compare with what an unprivileged user may still allocate."""
        with _typed(path):
            info = os.statvfs(path)
        free = info.f_bavail * info.f_frsize
        if free < nbytes:
            error = OSError(errno.ENOSPC, f"{nbytes:,} bytes are needed and {free:,} are free")
            raise StorageError.from_os(error, path=path)

    def create(self, path: Path, size: int, head: Buffer) -> None:
        """Create, reserve (where that is cheap) and write the head."""
        with _typed(path):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                if size and _reserves_cheaply(os.fstat(handle).st_dev, path.parent):
                    os.posix_fallocate(handle, 0, size)
                else:
                    os.ftruncate(handle, size)
                _write_all(handle, head, 0)
            finally:
                os.close(handle)

    def open(self, path: Path, *, writable: bool) -> int:
        """Open without blocking on FIFOs, and refuse everything that is not a regular file."""
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
        with _typed(path):
            handle = os.open(path, flags)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise FormatError("not a regular file", path=path, hint="Remove it or choose another checkpoint.")
        return handle

    def write(self, handle: int, data: Buffer, offset: int) -> None:
        """Write until all is written."""
        try:  # as in _typed(), without the cost of a context manager for every block
            _write_all(handle, data, offset)
        except OSError as error:
            raise StorageError.from_os(error) from error

    def read(self, handle: int, into: memoryview, offset: int) -> int:
        """Read until the buffer is full or the file ends."""
        try:
            return read_all(handle, into, offset)
        except OSError as error:
            raise StorageError.from_os(error) from error

    def read_rows(
        self, handle: int, into: memoryview, rows: int, width: int, pitch: int, period: int, offset: int
    ) -> int:
        """``preadv`` of hundreds of rows at once."""
        with _typed(None):
            return read_rows(handle, into, rows, width, pitch, period, offset)

    def status_of(self, handle: int) -> Status:  # noqa: D102
        with _typed(None):
            return _status(os.fstat(handle))

    def sync(self, handle: int) -> None:  # noqa: D102
        with _typed(None):
            os.fsync(handle)

    def close(self, handle: int) -> None:
        """``close``; some file systems report a failed write only here."""
        with _typed(None):
            os.close(handle)

    def sync_directory(self, path: Path) -> None:
        """``fsync``. Some network file systems cannot sync a directory and say so; their renames are durable."""
        with _typed(path):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    raise
            finally:
                os.close(handle)

    def rename(self, source: Path, target: Path) -> None:  # noqa: D102
        os.replace(source, target)

    def rename_new(self, source: Path, target: Path) -> None:
        """``renameat2``.

        Without it this is a look followed by a rename. A root has one coordinating rank, so nobody creates
        ``target`` in between; and a non-empty directory would not be replaced even then.
        """
        code = _rename_with(_RENAME_NOREPLACE, source, target)
        if code in _NO_FLAG and not os.path.lexists(target):
            os.rename(source, target)
        elif code:
            code = errno.EEXIST if code in _NO_FLAG else code
            raise OSError(code, os.strerror(code), str(source), None, str(target))

    def exchange(self, one: Path, other: Path) -> bool:  # noqa: D102
        code = _rename_with(_RENAME_EXCHANGE, one, other)
        if code and code not in _NO_FLAG:
            raise OSError(code, os.strerror(code), str(one), None, str(other))
        return not code

    def symlink(self, target: str, path: Path) -> None:  # noqa: D102
        path.symlink_to(target)

    def remove_file(self, path: Path) -> None:  # noqa: D102
        path.unlink(missing_ok=True)

    def remove_tree(self, path: Path) -> None:
        """Links inside the tree are deleted, never followed."""
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(os.lstat(path).st_mode):
                shutil.rmtree(path)
            else:
                os.unlink(path)

    def remove_empty(self, path: Path) -> None:
        """``rmdir``."""
        try:
            path.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                raise

    def make_executable(self, path: Path) -> None:
        """``chmod``."""
        mode = stat.S_IMODE(os.stat(path).st_mode)
        os.chmod(path, mode | (mode & 0o444) >> 2)

    def status(self, path: Path, *, follows: bool = True) -> Status | None:  # noqa: D102
        try:
            return _status(os.stat(path, follow_symlinks=follows))
        except ValueError:  # a NUL character, or half of a surrogate pair
            return None
        except OSError as error:
            if error.errno in _NOTHING_THERE:
                return None
            raise StorageError.from_os(error, path=path) from error

    def entries(self, path: Path) -> list[Entry]:  # noqa: D102
        with _typed(path), os.scandir(path) as found:
            return sorted(Entry(each.name, _kind_of(each)) for each in found)

    def read_link(self, path: Path) -> str:  # noqa: D102
        with _typed(path):
            return os.readlink(path)

    def real_path(self, path: Path) -> Path:  # noqa: D102
        with _typed(path):
            try:
                return Path(os.path.realpath(path, strict=True))
            except (FileNotFoundError, NotADirectoryError):
                return Path(os.path.realpath(path))

    def local_path(self, path: Path) -> Path:  # noqa: D102
        return path


LOCAL: Storage = LocalStorage()


def why_not_writable(directory: Path) -> OSError | None:
    """The error of making files in a directory of this machine, or of making the directory; ``None`` if that may be.

    Asked of the nearest directory above that exists; nothing is made.
    """
    there = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    if not os.path.isdir(there):
        return OSError(errno.ENOTDIR, f"{there} is not a directory")
    if os.access(there, os.W_OK | os.X_OK):
        return None
    if os.statvfs(there).f_flag & os.ST_RDONLY:
        return OSError(errno.EROFS, f"{there} is on a read-only file system")
    return OSError(errno.EACCES, f"this process may not write to {there}")


_current: contextvars.ContextVar[Storage] = contextvars.ContextVar("shardwise_storage", default=LOCAL)


def current() -> Storage:
    """The storage of the call that this is part of: the innermost `using`, or the mounted file systems."""
    return _current.get()


@contextlib.contextmanager
def using(storage: Storage) -> Iterator[None]:
    """Let everything in the ``with`` block look at names and read small files in ``storage``.

    A thread that is started inside does not know of it, unless it is run in a copy of the context (``contextvars``).
    """
    token = _current.set(storage)
    try:
        yield
    finally:
        _current.reset(token)


def local_path(path: Path) -> Path | None:
    """Where this machine has what the call's storage has at ``path``; ``None`` where it is on no disk of it."""
    storage = current()
    return storage.local_path(path) if isinstance(storage, IsLocal) else None


def _status(info: os.stat_result) -> Status:
    kind = _KINDS.get(stat.S_IFMT(info.st_mode), "special file")
    return Status(kind, info.st_size, (info.st_dev, info.st_ino), info.st_mtime)


def _kind_of(entry: os.DirEntry[str]) -> Kind:
    if entry.is_symlink():
        return "symbolic link"
    if entry.is_dir(follow_symlinks=False):
        return "directory"
    if entry.is_file(follow_symlinks=False):
        return "file"
    return _status(entry.stat(follow_symlinks=False)).kind


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
    failed = call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag)
    return ctypes.get_errno() if failed else 0


def _write_all(handle: int, data: Buffer, offset: int) -> None:
    # Nearly always one call takes all: the views are for the rest.
    done = os.pwrite(handle, data, offset)
    if done < memoryview(data).nbytes:
        view = memoryview(data).cast("B")
        while done < len(view):
            done += os.pwrite(handle, view[done:], offset + done)


@contextlib.contextmanager
def _typed(path: Path | None) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(
            "no such file or directory",
            path=path,
            hint="Check that the path exists on every node and that the file system is mounted.",
        ) from error
    except OSError as error:
        raise StorageError.from_os(error, path=path) from error


@lru_cache(maxsize=64)
def _reserves_cheaply(device: int, directory: Path) -> bool:
    """Whether the file system ``device`` does, which is mounted above ``directory``."""
    return file_system_type(directory) in _CHEAP_RESERVATION


def file_system_type(path: Path) -> str:
    """Name of the file system that holds ``path`` ("ext4", "tmpfs"), or "" where the system does not report it."""
    target, best, kind = os.path.realpath(path), "", ""
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            left, _, right = line.partition(" - ")
            point = left.split()[4].replace("\\040", " ")
            inside = target == point or target.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):
                best, kind = point, right.split()[0]
    return kind


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the operating system into a `StorageError` that names ``path`` where it names none."""
    try:
        yield
    except ShardwiseError:
        raise
    except OSError as error:
        raise StorageError.from_os(error, path=error.filename or path) from error


def located(error: ShardwiseError, path: Path, tensor: str | None = None) -> ShardwiseError:
    """Add the path (and tensor) to an error of a handle-level operation, which does not know them."""
    error.path = error.path or str(path)
    error.tensor = error.tensor or tensor
    return error


@contextlib.contextmanager
def locating(path: Path, tensor: str | None = None) -> Iterator[None]:
    """Add the path (and tensor) to what handle-level operations inside raise."""
    try:
        yield
    except ShardwiseError as error:
        raise located(error, path, tensor) from None
