"""Opening files that somebody else may have put there: regular files only, bounded reads, typed errors."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from shardwise.errors import CheckpointNotFoundError, FormatError, MisuseError, ShardwiseError, StorageError

#: The file that says what a save wrote.
MANIFEST_NAME = "manifest.json"

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def _check_regular(status: os.stat_result, path: str, error: type[ShardwiseError]) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kind = next((text for test, text in _KINDS if test(status.st_mode)), "a special file")
    raise error(f"{path!r} is {kind}, not a regular file", path=path, hint="Pass the path of the file itself.")


def _open_descriptor(path: str, error: type[ShardwiseError], follows: bool) -> int:
    # The type is checked before opening, because opening a device can have effects, and again on the descriptor,
    # because the name can be replaced in between; O_NONBLOCK keeps a pipe that slips in from blocking.
    _check_regular(os.stat(path, follow_symlinks=follows), path, error)
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    descriptor = os.open(path, flags if follows else flags | os.O_NOFOLLOW)
    try:
        _check_regular(os.fstat(descriptor), path, error)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def open_regular(
    path: str | os.PathLike[str], error: type[ShardwiseError], *, follows: bool = True
) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file for reading and give it with its size in bytes.

    Operating-system errors inside the ``with`` block become typed errors too.

    Args:
        path: The file.
        error: Type raised where the path is not a regular file.
        follows: Whether it may be a symbolic link to one.

    Raises:
        CheckpointNotFoundError: Nothing is there.
        StorageError: The file system refused.
        ShardwiseError: Of type ``error``; the path is a directory, pipe, socket or device.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise error(f"the path {text!r} holds a NUL character", hint="No file can have such a name.")
    try:
        descriptor = _open_descriptor(text, error, follows)
        with open(descriptor, "rb", buffering=0) as stream:
            yield stream, os.fstat(descriptor).st_size
    except (FileNotFoundError, NotADirectoryError) as cause:
        if isinstance(cause, CheckpointNotFoundError):
            raise
        raise CheckpointNotFoundError(
            f"no file {text!r}", path=text, hint="Check the path, and that it is mounted on every node."
        ) from cause
    except StorageError:
        raise
    except OSError as cause:
        raise StorageError.from_os(cause, path=text) from cause
    except UnicodeEncodeError as cause:
        raise error(f"the path {text!r} is not valid Unicode", hint="No file can have such a name.") from cause


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
    """Read a regular file of at most ``limit`` bytes. Arguments as for `open_regular`.

    Raises:
        CheckpointNotFoundError: Nothing is there.
        StorageError: The file system refused.
        ShardwiseError: Of type ``error``; not a regular file, or larger than ``limit``.
    """
    with open_regular(path, error, follows=follows) as (stream, size):
        data = b"" if size > limit else read_exactly(stream, limit + 1)
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
    if not manifest.is_symlink():
        return False
    if _leads_into_a_store(manifest) or os.path.basename(os.path.realpath(manifest)) == MANIFEST_NAME:
        return True
    paths = [os.path.join(where, name) for where, _, names in os.walk(directory) for name in names]
    return len(paths) > 1 and all(os.path.islink(path) for path in paths)


def is_followed(path: Path, made_of_links: bool) -> bool:
    """Whether a link in a file's place stands for the file: as all others do, or since it leads into a known store."""
    return made_of_links or _leads_into_a_store(path)


def _leads_into_a_store(path: Path) -> bool:
    try:
        target = os.readlink(path)
    except OSError:
        return False
    return any(part in _STORES for part in PurePosixPath(target).parts)


def resolve_inside(root: str | os.PathLike[str], relative: str, error: type[ShardwiseError] = FormatError) -> Path:
    """Return the real path of ``root/relative``, which need not exist, and make sure that it lies below ``root``.

    Args:
        root: A directory; it may itself be reached through symbolic links.
        relative: A POSIX path from an index or manifest.
        error: Type raised for a path that leads elsewhere.

    Raises:
        ShardwiseError: Of type ``error``; the path is absolute, holds "..", or a symbolic link leads out of ``root``.
        MisuseError: ``root`` holds a NUL character.
    """
    if "\0" in os.fspath(root):
        raise MisuseError("the directory's path holds a NUL character", hint="Pass another path.")
    reason = why_not_relative(relative)
    if reason is not None:
        raise error(
            f"the path {relative!r} {reason}", path=root, hint="Do not use this checkpoint: it is damaged or forged."
        )
    real_root = os.path.realpath(root)
    real = os.path.realpath(os.path.join(real_root, relative))
    if os.path.commonpath([real_root, real]) != real_root:
        raise error(
            f"the path {relative!r} leads through a symbolic link to {real!r}, outside the checkpoint",
            path=root,
            hint="Replace the link by the file that it points at, if you trust it.",
        )
    return Path(real)


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
