"""Opening files that somebody else may have put there: regular files only, bounded reads, typed errors."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from shardwise.disk.names import absent, is_link, real_path, walk
from shardwise.disk.storage import current, locating, storage_errors
from shardwise.errors import CheckpointNotFoundError, FormatError, MisuseError, ShardwiseError, StorageError

#: The file that says what a save wrote.
MANIFEST_NAME = "manifest.json"


class RangeStream(io.RawIOBase):
    """Bytes at offsets, as Python's libraries read a file: ``read`` fills memory and says how many bytes there were."""

    def __init__(self, read: Callable[[memoryview, int], int], size: Callable[[], int]) -> None:
        self._read, self._size, self._position = read, size, 0

    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def readinto(self, buffer: object) -> int:  # noqa: D102
        got = self._read(memoryview(cast(bytearray, buffer)).cast("B"), self._position)
        self._position += got
        return got

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:  # noqa: D102
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence)
        position = offset + (self._size() if start is None else start)
        if position < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = position
        return position

    def tell(self) -> int:  # noqa: D102
        return self._position


def _open(path: Path, error: type[ShardwiseError], follows: bool) -> tuple[int, int]:
    """Open a regular file; returns the handle and its size."""
    storage = current()
    while True:
        # The kind is looked at before opening, because opening a device can have effects; `Storage.open` looks again.
        named = storage.status(path, follows=follows)
        if named is None:
            storage.real_path(path)  # a link in a circle is an error of its own
            raise absent(path)
        if named.kind != "file":
            what = f"{str(path)!r} is a {named.kind}, not a regular file"
            raise error(what, path=path, hint="Pass the path of the file itself.")
        handle = storage.open(path, writable=False)
        try:
            opened = storage.status_of(handle)
        except BaseException:
            storage.close(handle)
            raise
        if follows or opened.identity == named.identity:
            return handle, opened.size
        storage.close(handle)  # the name was given to another file in between, which may be a link


@contextmanager
def open_regular(
    path: str | os.PathLike[str], error: type[ShardwiseError], *, follows: bool = True
) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file, or if ``follows`` a link to one, for reading; gives it with its size in bytes.

    Operating-system errors inside the ``with`` block become typed errors too: `CheckpointNotFoundError` or
    `StorageError`. A directory, pipe, socket or device is one of type ``error``.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise error(f"the path {text!r} holds a NUL character", hint="No file can have such a name.")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as cause:
        raise error(f"the path {text!r} is not valid Unicode", hint="No file can have such a name.") from cause
    handle, size = _open(Path(text), error, follows)
    storage = current()
    read = partial(storage.read, handle)
    try:
        with storage_errors(Path(text)), locating(Path(text)):
            yield io.BufferedReader(RangeStream(read, lambda: storage.status_of(handle).size)), size
    finally:
        storage.close(handle)


def read_exactly(stream: BinaryIO, count: int) -> bytes:
    """Read ``count`` bytes, or fewer where the file ends first."""
    parts: list[bytes] = []
    while count > 0:
        part = stream.read(min(count, 1 << 26))
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_whole(path: str | os.PathLike[str], limit: int, error: type[ShardwiseError], *, follows: bool = True) -> bytes:
    """Read a regular file of at most ``limit`` bytes, more are an ``error`` too; for the rest see `open_regular`."""
    with open_regular(path, error, follows=follows) as (stream, size):
        data = b"" if size > limit else read_exactly(stream, size + 1)
    if size > limit or len(data) > limit:
        text = os.fspath(path)
        raise error(
            f"{text!r} has {max(size, len(data))} bytes; at most {limit} are read",
            path=text,
            hint="This cannot be the file that it is named as; fetch or save it again.",
        )
    return data


@lru_cache(maxsize=4096)
def why_not_relative(relative: str) -> str | None:
    """Say why ``relative`` is not a plain POSIX path below a directory, or return ``None`` where it is one."""
    if not relative:
        return "is empty"
    if any(ord(char) < 32 or ord(char) == 127 or 0xD800 <= ord(char) <= 0xDFFF for char in relative):
        return "holds a control character or an unpaired surrogate"
    if "\\" in relative:
        return "holds a backslash"
    if relative.startswith("/"):
        return "is absolute"
    parts = relative.split("/")
    if ".." in parts:
        return "leads out of the directory"
    if "" in parts or "." in parts:
        return "is not in its shortest form"
    if len(relative) > 4096 or any(len(part.encode()) > 255 for part in parts):
        return "is longer than file systems take"
    return None


#: Directories of tools that keep content by its digest and put links in the files' places: git-annex, hub caches.
_STORES = ("annex", "blobs")


def is_made_of_links(directory: Path) -> bool:
    """Whether a directory's files are links to what keeps their content, as its manifest is one.

    git-annex, hub caches and archives put links in the files' places. There a link is as good as a file; in a directory
    whose manifest is a file, one link among files is something that no save wrote. Nor did any write a manifest that
    alone is a link, to a file that neither is called so nor lies in a known store.
    """
    manifest = directory / MANIFEST_NAME
    if not is_link(manifest):
        return False
    if _leads_into_a_store(manifest) or real_path(manifest).name == MANIFEST_NAME:
        return True
    paths = [where / name for where, names in walk(directory) for name in names]
    return len(paths) > 1 and all(map(is_link, paths))


def is_followed(path: Path, made_of_links: bool) -> bool:
    """Whether a link in a file's place stands for the file: as all others do, or since it leads into a known store."""
    return made_of_links or _leads_into_a_store(path)


def _leads_into_a_store(path: Path) -> bool:
    return is_link(path) and any(part in _STORES for part in PurePosixPath(current().read_link(path)).parts)


def resolve_inside(root: str | os.PathLike[str], relative: str, error: type[ShardwiseError] = FormatError) -> Path:
    """Return the real path of ``root/relative``, which need not exist, and make sure that it lies below ``root``.

    ``root`` may itself be reached through symbolic links; ``relative`` is a POSIX path from an index or manifest. It is
    an ``error`` if that is absolute, holds "..", or a symbolic link leads out of ``root``.
    """
    if "\0" in os.fspath(root):
        raise MisuseError("the directory's path holds a NUL character", hint="Pass another path.")
    reason = why_not_relative(relative)
    if reason is not None:
        hint = "Do not use this checkpoint: it is damaged or forged."
        raise error(f"the path {relative!r} {reason}", path=root, hint=hint)
    real_root = real_path(Path(root))
    real = real_path(real_root / relative)
    if not real.is_relative_to(real_root):
        what = f"the path {relative!r} leads through a symbolic link to {str(real)!r}, outside the checkpoint"
        raise error(what, path=root, hint="Replace the link by the file that it points at, if you trust it.")
    return real


def read_small_file(path: Path, limit: int, *, follows: bool = False) -> bytes | None:
    """As `read_whole`, of a file that need not be there; ``None`` for anything else in its place, too.

    A link is not followed unless ``follows``.
    """
    try:
        return read_whole(path, limit, FormatError, follows=follows)
    except (CheckpointNotFoundError, FormatError):
        return None
    except StorageError as error:
        if error.errno == errno.ELOOP:
            return None
        raise


def read_note(directory: Path, name: str, limit: int) -> bytes | None:
    """As `read_small_file`, of a file of a checkpoint; a link is followed where the checkpoint is made of links."""
    path = directory / name
    return read_small_file(path, limit, follows=is_followed(path, is_made_of_links(directory)))
