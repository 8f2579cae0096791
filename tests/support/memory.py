"""A `Storage` in memory, which can be told to fail, and one that keeps a tree elsewhere than it says."""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass, field
from pathlib import Path

from shardwise.disk.storage import Buffer, Entry, LocalStorage, Status
from shardwise.errors import CheckpointNotFoundError, StorageError


@dataclass
class MemoryStorage:
    """Files as byte arrays; no links, no locks, and every directory that a file or another directory is in.

    Attributes:
        files: By path.
        directories: Those that were made.
        log: Every operation with its file's name, in order.
        fail: Name of an operation that fails, with ENOSPC.
    """

    files: dict[Path, bytearray] = field(default_factory=dict)
    directories: set[Path] = field(default_factory=lambda: {Path("/")})
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
        if new and self.status(path) is not None:
            raise StorageError.from_os(FileExistsError(errno.EEXIST, "File exists"), path=path)
        self.directories.update([path, *path.parents])

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

    def status_of(self, handle: int) -> Status:
        return Status("file", len(self.files[self._handles[handle]]))

    def status(self, path: Path, *, follows: bool = True) -> Status | None:
        if path in self.files:
            return Status("file", len(self.files[path]))
        return Status("directory", 0) if path in self.directories else None

    def entries(self, path: Path) -> list[Entry]:
        if path not in self.directories:
            raise CheckpointNotFoundError("no such directory", path=path)
        found = [Entry(each.name, "file") for each in self.files if each.parent == path]
        return sorted([*found, *(Entry(each.name, "directory") for each in self.directories if each.parent == path)])

    def read_link(self, path: Path) -> str:
        raise StorageError.from_os(OSError(errno.EINVAL, "Invalid argument"), path=path)

    def real_path(self, path: Path) -> Path:
        return path

    def rename(self, source: Path, target: Path) -> None:
        self._did("rename", target)
        self.files[target] = self.files.pop(source)

    def rename_new(self, source: Path, target: Path) -> None:
        self._did("rename_new", target)
        if self.status(target) is not None:
            raise FileExistsError(errno.EEXIST, "File exists", str(target))
        moved = {path: target / path.relative_to(source) for path in self._below(source)}
        for path, place in moved.items():
            if path in self.files:
                self.files[place] = self.files.pop(path)
            else:
                self.directories.remove(path)
                self.directories.add(place)

    def exchange(self, one: Path, other: Path) -> bool:
        return False

    def symlink(self, target: str, path: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def remove_file(self, path: Path) -> None:
        self._did("remove_file", path)
        self.files.pop(path, None)

    def remove_tree(self, path: Path) -> None:
        self._did("remove_tree", path)
        for each in self._below(path):
            self.files.pop(each, None)
            self.directories.discard(each)

    def remove_empty(self, path: Path) -> None:
        if len(self._below(path)) == 1:
            self.directories.discard(path)

    def make_executable(self, path: Path) -> None:
        self._did("make_executable", path)

    def _below(self, top: Path) -> list[Path]:
        return [path for path in [*self.files, *self.directories] if path.is_relative_to(top)]


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


class MovedStorage(LocalStorage):
    """The local file system, but that one tree is elsewhere.

    Args:
        shown: Where callers believe the tree to be.
        kept: Where it is.
    """

    def __init__(self, shown: Path, kept: Path) -> None:
        self._shown, self._kept = shown, kept

    def local_path(self, path: Path) -> Path:
        return self._kept / path.relative_to(self._shown) if path.is_relative_to(self._shown) else path

    def make_directory(self, path: Path, *, new: bool = False) -> None:
        super().make_directory(self.local_path(path), new=new)

    def check_space(self, path: Path, nbytes: int) -> None:
        super().check_space(self.local_path(path), nbytes)

    def create(self, path: Path, size: int, head: Buffer) -> None:
        super().create(self.local_path(path), size, head)

    def open(self, path: Path, *, writable: bool) -> int:
        return super().open(self.local_path(path), writable=writable)

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(self.local_path(path))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(self.local_path(source), self.local_path(target))

    def rename_new(self, source: Path, target: Path) -> None:
        super().rename_new(self.local_path(source), self.local_path(target))

    def exchange(self, one: Path, other: Path) -> bool:
        return super().exchange(self.local_path(one), self.local_path(other))

    def symlink(self, target: str, path: Path) -> None:
        super().symlink(target, self.local_path(path))

    def remove_file(self, path: Path) -> None:
        super().remove_file(self.local_path(path))

    def remove_tree(self, path: Path) -> None:
        super().remove_tree(self.local_path(path))

    def remove_empty(self, path: Path) -> None:
        super().remove_empty(self.local_path(path))

    def make_executable(self, path: Path) -> None:
        super().make_executable(self.local_path(path))

    def status(self, path: Path, *, follows: bool = True) -> Status | None:
        return super().status(self.local_path(path), follows=follows)

    def entries(self, path: Path) -> list[Entry]:
        return super().entries(self.local_path(path))

    def read_link(self, path: Path) -> str:
        return super().read_link(self.local_path(path))

    def real_path(self, path: Path) -> Path:
        found = super().real_path(self.local_path(path))
        kept = super().real_path(self._kept)
        return self._shown / found.relative_to(kept) if found.is_relative_to(kept) else found
