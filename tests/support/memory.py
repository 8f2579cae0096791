"""A `Storage` in memory, which can be told to fail."""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass, field
from pathlib import Path

from shardwise.disk.storage import Buffer
from shardwise.errors import CheckpointNotFoundError, StorageError


@dataclass
class MemoryStorage:
    """Files as byte arrays.

    Attributes:
        files: By path.
        log: Every operation with its file's name, in order.
        fail: Name of an operation that fails, with ENOSPC.
    """

    files: dict[Path, bytearray] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)
    fail: str | None = None
    _handles: dict[int, Path] = field(default_factory=dict)
    _next: int = 3
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def open_handles(self) -> int:
        """How many handles were not closed."""
        return len(self._handles)

    def _did(self, what: str, path: Path) -> None:
        with self._lock:
            self.log.append((what, path.name))
        if what == self.fail:
            raise StorageError.from_os(OSError(errno.ENOSPC, "No space left on device"))

    def make_directory(self, path: Path, *, new: bool = False) -> None:
        self._did("make_directory", path)

    def check_space(self, path: Path, nbytes: int) -> None:
        self._did("check_space", path)

    def create(self, path: Path, size: int, head: Buffer) -> None:
        self._did("create", path)
        self.files[path] = bytearray(size)
        self.files[path][: len(head)] = head

    def open(self, path: Path, *, writable: bool) -> int:
        self._did("open", path)
        if path not in self.files:
            raise CheckpointNotFoundError("no such file", path=path)
        with self._lock:
            self._next += 1
            self._handles[self._next] = path
            return self._next

    def write(self, handle: int, data: Buffer, offset: int) -> None:
        path = self._handles[handle]
        self._did("write", path)
        with self._lock:
            file = self.files[path]
            if len(file) < offset + len(data):
                file.extend(bytes(offset + len(data) - len(file)))
            file[offset : offset + len(data)] = data

    def read(self, handle: int, into: memoryview, offset: int) -> int:
        path = self._handles[handle]
        self._did("read", path)
        found = self.files[path][offset : offset + len(into)]
        into[: len(found)] = found
        return len(found)

    def sync(self, handle: int) -> None:
        self._did("sync", self._handles[handle])

    def close(self, handle: int) -> None:
        path = self._handles.pop(handle)
        self._did("close", path)

    def sync_directory(self, path: Path) -> None:
        self._did("sync_directory", path)


@dataclass
class RowsStorage(MemoryStorage):
    """The same, which also reads many rows at once."""

    def read_rows(
        self, handle: int, into: memoryview, rows: int, width: int, pitch: int, period: int, offset: int
    ) -> int:
        path = self._handles[handle]
        self._did("read", path)
        for row in range(rows):
            found = self.files[path][offset + row * period : offset + row * period + width]
            if len(found) < width:
                return row
            into[row * pitch : row * pitch + width] = found
        return rows
