"""A zip archive of ``torch.save``, read as data: its pickle as a tree, and where each storage lies in the file.

Source: what torch writes since 1.6. ``data.pkl`` is a pickle in which a storage is a reference, and ``data/KEY`` is
that storage's content, stored uncompressed.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from shardwise.disk.guarded import open_regular, read_exactly
from shardwise.errors import FormatError
from shardwise.format.pickle_tree import PickledGlobal, read_pickle_tree
from shardwise.format.sniff import FIRST_BYTES, what_is

#: Largest pickle that is read, in bytes; storages are not in it.
MAX_PICKLE_BYTES = 2**28

_PICKLE = "data.pkl"
_LOCAL_HEADER = 30
_OTHER = "Restore it from a copy; or, if it is one of torch before 1.6, load it there and save it again."
_DAMAGED = "It was cut short or changed: fetch it again, or restore it from a copy."


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """The content of one storage.

    Attributes:
        offset: Where it begins in the file, in bytes.
        nbytes: Its length.
        crc32: The archive's own checksum of it (CRC-32); 0 where it was written without.
    """

    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class TorchArchive:
    """A file of ``torch.save``.

    Attributes:
        path: The file.
        tree: What it holds, see `read_pickle_tree`.
        storages: Key of each storage -> its content.
    """

    path: Path
    tree: object
    storages: Mapping[str, StoredBytes]


def read_torch_archive(
    path: Path, allowed: Collection[PickledGlobal], enums: Collection[PickledGlobal] = ()
) -> TorchArchive:
    """Read a file's pickle and its archive's directory; no code that it names is imported or run, no tensor read.

    It may name the globals ``allowed``, of which ``enums`` are enumerations.

    Raises:
        UnsafePickleError: It names another global.
        FormatError: It is no such archive, was cut short, or is of another byte order.
    """
    with open_regular(path, FormatError) as (stream, size):
        start = read_exactly(stream, FIRST_BYTES)
        found = None if start.startswith(b"PK") else what_is(start)
        if found is not None:
            raise FormatError(f"the file is {found.name}, and no zip archive of torch.save", path=path, hint=_OTHER)
        try:
            with zipfile.ZipFile(stream) as archive:
                front = _front(archive, path)
                _refuse_byte_order(archive, front, path)
                data = archive.read(f"{front}{_PICKLE}")
                storages = _storages(archive, f"{front}data/", stream, path)
        except FormatError:
            raise
        except (zipfile.BadZipFile, zipfile.LargeZipFile, struct.error, ValueError, RuntimeError, EOFError) as error:
            raise FormatError(
                f"the file of {size} bytes is no whole archive of torch.save: {error}", path=path, hint=_DAMAGED
            ) from error
    return TorchArchive(path, read_pickle_tree(data, allowed, str(path), enums, torch_file=True), storages)


def _fail(path: Path, reason: str) -> NoReturn:
    raise FormatError(f"the archive {reason}", path=path, hint=_DAMAGED)


def _front(archive: zipfile.ZipFile, path: Path) -> str:
    """What the names in the archive have in front: its pickle's directory."""
    pickles = [name for name in archive.namelist() if name == _PICKLE or name.endswith(f"/{_PICKLE}")]
    if len(pickles) != 1:
        _fail(path, f"has {len(pickles)} entries that are called {_PICKLE}, where torch.save writes one")
    entry = archive.getinfo(pickles[0])
    if entry.file_size > MAX_PICKLE_BYTES or entry.compress_type != zipfile.ZIP_STORED:
        _fail(path, f"has a pickle of more than {MAX_PICKLE_BYTES} bytes, or a compressed one")
    return pickles[0].removesuffix(_PICKLE)


def _refuse_byte_order(archive: zipfile.ZipFile, front: str, path: Path) -> None:
    name = f"{front}byteorder"
    if name in archive.namelist() and archive.read(name)[:16] != b"little":
        raise FormatError(
            "the file was written on a machine of another byte order",
            path=path,
            hint="Load it there, and save it as safetensors.",
        )


def _storages(archive: zipfile.ZipFile, front: str, stream: BinaryIO, path: Path) -> dict[str, StoredBytes]:
    found: dict[str, StoredBytes] = {}
    for entry in archive.infolist():
        if not entry.filename.startswith(front):
            continue
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            _fail(path, f"has the compressed entry {entry.filename}, which torch.save never writes")
        stream.seek(entry.header_offset)
        local = stream.read(_LOCAL_HEADER)
        if len(local) < _LOCAL_HEADER or local[:4] != b"PK\x03\x04":
            _fail(path, f"has no entry where its directory puts {entry.filename}")
        # The entry's own name and extra field may be longer than those in the directory (APPNOTE.TXT, 4.3.7).
        name, extra = struct.unpack("<HH", local[26:30])
        start = entry.header_offset + _LOCAL_HEADER + name + extra
        if start + entry.file_size > archive.start_dir:
            _fail(path, f"has the entry {entry.filename}, which reaches beyond its content")
        key = entry.filename.removeprefix(front)
        if key in found:
            _fail(path, f"has {entry.filename} twice")
        found[key] = StoredBytes(start, entry.file_size, entry.CRC)
    return found
