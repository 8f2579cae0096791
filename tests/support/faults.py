"""A storage that fails when it is told to: real files, and one operation that is refused."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch.distributed as dist

from shardwise.disk.storage import Buffer, LocalStorage
from shardwise.errors import StorageError


def is_tensor_data(path: Path, offset: int) -> bool:
    """Whether the byte at ``offset`` is one of a tensor, not of a header or of a small file that is read whole."""
    if path.suffix != ".safetensors":
        return path.suffix in (".distcp", ".bin")
    with path.open("rb") as file:
        return offset >= 8 + int.from_bytes(file.read(8), "little")


class NamedHandles(LocalStorage):
    """Knows which file a handle is of."""

    def __init__(self) -> None:
        self.paths: dict[int, Path] = {}

    def open(self, path: Path, *, writable: bool) -> int:
        handle = super().open(path, writable=writable)
        self.paths[handle] = path
        return handle


class FaultyStorage(NamedHandles):
    """Fails the ``nth`` call of one operation on one rank, and every later one.

    Args:
        operation: Name of the method; of reads only those of tensors' bytes count.
        rank: On which rank.
        code: The operating system's error.
        nth: Which call is the first to fail.
        folder: Only calls for files in folders of this name count.
    """

    def __init__(
        self, operation: str, rank: int, code: int = errno.ENOSPC, nth: int = 1, folder: str | None = None
    ) -> None:
        super().__init__()
        self._operation, self._rank, self._code, self._left = operation, rank, code, nth
        self._folder = folder

    def _maybe(self, operation: str, path: Path | None = None) -> None:
        if self._folder is not None and (path is None or self._folder not in path.parts):
            return
        if operation == self._operation and dist.get_rank() == self._rank:
            self._left -= 1
            if self._left <= 0:
                raise StorageError.from_os(OSError(self._code, os.strerror(self._code)), path=path)

    def make_directory(self, path: Path, *, new: bool = False) -> None:
        self._maybe("make_directory", path)
        super().make_directory(path, new=new)

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
        self._maybe("write", self.paths.get(handle))
        super().write(handle, data, offset)

    def read(self, handle: int, into: memoryview, offset: int) -> int:
        if is_tensor_data(self.paths[handle], offset):
            self._maybe("read", self.paths[handle])
        return super().read(handle, into, offset)

    def read_rows(
        self, handle: int, into: memoryview, rows: int, width: int, pitch: int, period: int, offset: int
    ) -> int:
        self._maybe("read", self.paths.get(handle))
        return super().read_rows(handle, into, rows, width, pitch, period, offset)

    def sync(self, handle: int) -> None:
        self._maybe("sync", self.paths.get(handle))
        super().sync(handle)

    def close(self, handle: int) -> None:
        super().close(handle)
        self._maybe("close", self.paths.get(handle))

    def sync_directory(self, path: Path) -> None:
        self._maybe("sync_directory", path)
        super().sync_directory(path)

    def rename_new(self, source: Path, target: Path) -> None:
        self._maybe("rename_new", target)
        super().rename_new(source, target)

    def symlink(self, target: str, path: Path) -> None:
        self._maybe("symlink", path)
        super().symlink(target, path)
