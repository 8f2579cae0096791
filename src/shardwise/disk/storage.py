"""The file operations that the writer and the reader use, as an interface, and the local file system's.

Everything that touches checkpoint data goes through a `Storage`, so that faults can be injected and every operation of
a save can be recorded. The sequence of a save: ``make_directory``, ``check_space``, ``create`` (one rank for each
file), then on every rank ``open`` for writing, ``write`` at offsets, ``sync``, ``close``; at the end
``sync_directory``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

from shardwise.errors import CheckpointNotFoundError, FormatError, ShardwiseError, StorageError

Buffer = bytes | bytearray | memoryview


class Storage(Protocol):
    """Positional file access. Paths are absolute; offsets and sizes in bytes; every failure is a typed error."""

    def make_directory(self, path: Path) -> None:
        """Create a directory and its parents; fine if it exists."""
        ...

    def check_space(self, path: Path, nbytes: int) -> None:
        """Raise `StorageError` (ENOSPC) unless ``nbytes`` are free below ``path``, which exists."""
        ...

    def create(self, path: Path, size: int, head: Buffer) -> None:
        """Create a file of ``size`` bytes with its space reserved, beginning with ``head``; replaces an old one."""
        ...

    def open(self, path: Path, *, writable: bool) -> int:
        """Open an existing regular file; returns a handle."""
        ...

    def write(self, handle: int, data: Buffer, offset: int) -> None:
        """Write all of ``data``."""
        ...

    def read(self, handle: int, into: memoryview, offset: int) -> int:
        """Fill ``into``; returns how many bytes there were, fewer only at the end of the file."""
        ...

    def sync(self, handle: int) -> None:
        """Make the file's bytes durable."""
        ...

    def close(self, handle: int) -> None:
        """Release a handle."""
        ...

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        ...


@runtime_checkable
class ReadsRows(Protocol):
    """What a `Storage` may offer besides: rows with gaps between them, many in one operation."""

    def read_rows(
        self, handle: int, into: memoryview, rows: int, width: int, pitch: int, period: int, offset: int
    ) -> int:
        """Read rows of ``width`` bytes, ``period`` apart from ``offset`` on, to places ``pitch`` apart in ``into``.

        The gaps are read along. Returns how many rows there were, fewer only at the end of the file.
        """
        ...


#: File systems on which reserving space costs nothing: an allocation of extents, no write of zeros.
_CHEAP_RESERVATION = frozenset({"ext4", "xfs", "btrfs", "f2fs"})


class LocalStorage:
    """`Storage` on a mounted file system."""

    def make_directory(self, path: Path) -> None:
        """Create a directory and its parents."""
        with _typed(path):
            path.mkdir(parents=True, exist_ok=True)

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
        # As in _typed(), without the cost of a context manager for every block.
        try:
            _write_all(handle, data, offset)
        except OSError as error:
            raise StorageError.from_os(error) from error

    def read(self, handle: int, into: memoryview, offset: int) -> int:
        """Read until the buffer is full or the file ends."""
        done = 0
        try:
            while done < len(into):
                got = os.preadv(handle, [into[done:] if done else into], offset + done)
                if got == 0:
                    break
                done += got
        except OSError as error:
            raise StorageError.from_os(error) from error
        return done

    def read_rows(
        self, handle: int, into: memoryview, rows: int, width: int, pitch: int, period: int, offset: int
    ) -> int:
        """``preadv`` of hundreds of rows at once."""
        from shardwise.disk import scatter  # numpy, which offline work does without

        with _typed(None):
            return scatter.read_rows(handle, into, rows, width, pitch, period, offset)

    def sync(self, handle: int) -> None:
        """``fsync``."""
        with _typed(None):
            os.fsync(handle)

    def close(self, handle: int) -> None:
        """``close``; some file systems report a failed write only here."""
        with _typed(None):
            os.close(handle)

    def sync_directory(self, path: Path) -> None:
        """``fsync`` of the directory."""
        with _typed(path):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


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
    """Name of the file system that holds ``path`` ("ext4", "tmpfs"), or "" where the system does not tell."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            lines = mounts.readlines()
    except OSError:
        return ""
    target = os.path.realpath(path)
    best, kind = "", ""
    for line in lines:
        left, _, right = line.partition(" - ")
        point = left.split()[4].replace("\\040", " ")
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind


def located(error: ShardwiseError, path: Path, tensor: str | None = None) -> ShardwiseError:
    """Add the path (and tensor) to an error of a handle-level operation, which does not know them."""
    error.path = error.path or str(path)
    error.tensor = error.tensor or tensor
    return error


@contextlib.contextmanager
def locating(path: Path) -> Iterator[None]:
    """Add the path to what handle-level operations inside raise."""
    try:
        yield
    except ShardwiseError as error:
        raise located(error, path) from None
