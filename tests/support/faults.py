"""Storage and file systems that fail when they are told to: real files, and one operation that is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch.distributed as dist

from shardwise.disk.storage import Buffer, LocalStorage
from shardwise.errors import StorageError
from shardwise.lifecycle import LocalFileSystem


class FaultyStorage(LocalStorage):
    """Fails the ``nth`` call of one operation on one rank, and every later one.

    Args:
        operation: Name of the method.
        rank: On which rank.
        code: The operating system's error.
        nth: Which call is the first to fail.
    """

    def __init__(self, operation: str, rank: int, code: int = errno.ENOSPC, nth: int = 1) -> None:
        self._operation, self._rank, self._code, self._left = operation, rank, code, nth

    def _maybe(self, operation: str, path: Path | None = None) -> None:
        if operation == self._operation and dist.get_rank() == self._rank:
            self._left -= 1
            if self._left <= 0:
                raise StorageError.from_os(OSError(self._code, os.strerror(self._code)), path=path)

    def make_directory(self, path: Path) -> None:
        self._maybe("make_directory", path)
        super().make_directory(path)

    def check_space(self, path: Path, nbytes: int) -> None:
        self._maybe("check_space", path)
        super().check_space(path, nbytes)

    def create(self, path: Path, size: int, head: Buffer) -> None:
        self._maybe("create", path)
        super().create(path, size, head)

    def open(self, path: Path, *, writable: bool) -> int:
        self._maybe("open", path)
        return super().open(path, writable=writable)

    def write(self, handle: int, data: Buffer, offset: int) -> None:
        self._maybe("write")
        super().write(handle, data, offset)

    def read(self, handle: int, into: memoryview, offset: int) -> int:
        self._maybe("read")
        return super().read(handle, into, offset)

    def read_rows(
        self, handle: int, into: memoryview, rows: int, width: int, pitch: int, period: int, offset: int
    ) -> int:
        self._maybe("read")
        return super().read_rows(handle, into, rows, width, pitch, period, offset)

    def sync(self, handle: int) -> None:
        self._maybe("sync")
        super().sync(handle)

    def close(self, handle: int) -> None:
        super().close(handle)
        self._maybe("close")

    def sync_directory(self, path: Path) -> None:
        self._maybe("sync_directory", path)
        super().sync_directory(path)


class FaultyFileSystem(LocalFileSystem):
    """Fails every call of one operation."""

    def __init__(self, operation: str, code: int = errno.EROFS) -> None:
        self._operation, self._code = operation, code

    def _maybe(self, operation: str, path: Path) -> None:
        if operation == self._operation:
            raise OSError(self._code, os.strerror(self._code), str(path))

    def make_directory(self, path: Path) -> None:
        self._maybe("make_directory", path)
        super().make_directory(path)

    def write_file(self, path: Path, data: bytes) -> None:
        self._maybe("write_file", path)
        super().write_file(path, data)

    def rename_new(self, source: Path, target: Path) -> None:
        self._maybe("rename_new", source)
        super().rename_new(source, target)

    def fsync_path(self, path: Path) -> None:
        self._maybe("fsync_path", path)
        super().fsync_path(path)

    def remove_tree(self, path: Path) -> None:
        self._maybe("remove_tree", path)
        super().remove_tree(path)
