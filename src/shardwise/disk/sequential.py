"""Files that are written or read from front to back, with the digests of what passes: no random write, one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from shardwise.disk.crc import combine, crc32c
from shardwise.disk.storage import Storage, locating

_BLOCK_BYTES = 8 * 2**20

Block = bytes | memoryview


class SequentialFile:
    """A file that is written from front to back, created, or replaced, with the first bytes. Local; one thread.

    As a context manager it is made durable at the end of the ``with`` block, and closed in any case. ``size`` bytes are
    reserved for it; 0 where the file system takes no write behind a file's end.
    """

    def __init__(self, storage: Storage, path: Path, size: int = 0) -> None:
        self._storage, self._path, self._reserved = storage, path, size
        self._handle: int | None = None
        #: Bytes so far.
        self.size = 0
        #: CRC-32C of them.
        self.crc32c = 0

    def append(self, blocks: Iterable[Block], tensor: str | None = None) -> int:
        """Append a part of the file; returns its CRC-32C. Errors, those of ``blocks`` too, name file and ``tensor``."""
        crc, nbytes = 0, 0
        with locating(self._path, tensor):
            for block in blocks:
                self._storage.write(self._open(), block, self.size + nbytes)
                crc = crc32c(block, crc)
                nbytes += len(block)
        self.crc32c = combine(self.crc32c, crc, nbytes) if nbytes else self.crc32c
        self.size += nbytes
        return crc

    def _open(self) -> int:
        if self._handle is None:
            self._storage.create(self._path, self._reserved, b"")
            self._handle = self._storage.open(self._path, writable=True)
        return self._handle

    def __enter__(self) -> SequentialFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            with locating(self._path):
                try:
                    if kind is None:
                        self._storage.sync(handle)
                finally:
                    self._storage.close(handle)


def write_file(storage: Storage, path: Path, content: bytes) -> None:
    """Write a small file and make it durable. Local."""
    storage.create(path, len(content), content)
    sync_file(storage, path, writable=True)


def copy_file(source: Path, target: Path, storage: Storage, origin: Storage | None = None) -> None:
    """Copy a file's bytes from ``origin`` to ``storage``, the same by default, making the directory. Local.

    The copy replaces what is there, and is not durable yet.
    """
    storage.make_directory(target.parent)
    storage.create(target, 0, b"")
    with opened(storage, target, writable=True) as handle:
        offset = 0
        for block in blocks_of(origin or storage, source):
            storage.write(handle, block, offset)
            offset += len(block)


def sync_file(storage: Storage, path: Path, *, writable: bool = False) -> None:
    """Make the bytes of a file durable, which may be another's, and read-only. Local."""
    with opened(storage, path, writable=writable) as handle:
        storage.sync(handle)


def blocks_of(storage: Storage, path: Path) -> Iterator[memoryview]:
    """The bytes of a file, in blocks that are valid until the next is asked for. Local."""
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with opened(storage, path) as handle:
        offset = 0
        while got := storage.read(handle, buffer, offset):
            yield buffer[:got]
            offset += got


@contextmanager
def opened(storage: Storage, path: Path, *, writable: bool = False) -> Iterator[int]:
    """Open a file and close it in the end; errors of the handle name the path. Local."""
    handle = storage.open(path, writable=writable)
    with locating(path):
        try:
            yield handle
        finally:
            storage.close(handle)


def digest_file(storage: Storage, path: Path) -> tuple[int, int]:
    """Size and CRC-32C of a file. Local."""
    size, crc = 0, 0
    for block in blocks_of(storage, path):
        crc = crc32c(block, crc)
        size += len(block)
    return size, crc
