"""What ``torch.save`` wrote, read as data: a file, its pickle as a tree and where each storage lies; or one value.

Source: what torch writes since 1.6. ``data.pkl`` is a pickle in which a storage is a reference, and ``data/KEY`` is
that storage's content, stored uncompressed.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO

import torch

from shardwise.disk.guarded import open_regular, read_exactly
from shardwise.errors import FormatError, UnsafePickleError
from shardwise.format.pickle_tree import PLAIN_GLOBALS, PickledCall, PickledGlobal, read_pickle_tree
from shardwise.format.sniff import FIRST_BYTES, what_is

#: Largest pickle that is read, in bytes; storages are not in it.
MAX_PICKLE_BYTES = 2**28

_PICKLE = "data.pkl"
_LOCAL_HEADER = 30
_OTHER = "Restore it from a copy; or, if it is one of torch before 1.6, load it there and save it again."
_DAMAGED = "It was cut short or changed: fetch it again, or restore it from a copy."


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """Where the content of one storage lies, and the archive's own CRC-32 of it, 0 where it was written without."""

    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class TorchArchive:
    """A file of ``torch.save``: what it holds, see `read_pickle_tree`, and each storage by its key."""

    path: Path
    tree: object
    storages: Mapping[str, StoredBytes]


def read_torch_archive(
    path: Path, allowed: Collection[PickledGlobal], enums: Collection[PickledGlobal] = ()
) -> TorchArchive:
    """Read a file's pickle, see `read_pickle_tree`, and its archive's directory; no tensor is read.

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
                pickle = _pickle_of(archive, MAX_PICKLE_BYTES, partial(_torn, path))
                front = pickle.filename.removesuffix(_PICKLE)
                _refuse_byte_order(archive, front, path)
                data = archive.read(pickle)
                storages = _storages(archive, f"{front}data/", stream, path)
        except FormatError:
            raise
        except (zipfile.BadZipFile, zipfile.LargeZipFile, struct.error, ValueError, RuntimeError, EOFError) as error:
            raise FormatError(
                f"the file of {size} bytes is no whole archive of torch.save: {error}", path=path, hint=_DAMAGED
            ) from error
    return TorchArchive(path, read_pickle_tree(data, allowed, str(path), enums, torch_file=True), storages)


#: The error of something that is wrong in an archive.
_Wrong = Callable[[str], FormatError]


def _torn(path: Path, reason: str) -> FormatError:
    return FormatError(f"the archive {reason}", path=path, hint=_DAMAGED)


def _pickle_of(archive: zipfile.ZipFile, most: int, wrong: _Wrong) -> zipfile.ZipInfo:
    pickles = [entry for entry in archive.infolist() if entry.filename.rpartition("/")[2] == _PICKLE]
    if len(pickles) != 1:
        raise wrong(f"has {len(pickles)} entries that are called {_PICKLE}, where torch.save writes one")
    if pickles[0].file_size > most or pickles[0].compress_type != zipfile.ZIP_STORED:
        raise wrong(f"has a pickle of more than {most} bytes, or a compressed one")
    return pickles[0]


def _refuse_byte_order(archive: zipfile.ZipFile, front: str, path: Path) -> None:
    name = f"{front}byteorder"
    if name in archive.namelist() and archive.read(name)[:16] != b"little":
        what = "the file was written on a machine of another byte order"
        raise FormatError(what, path=path, hint="Load it there, and save it as safetensors.")


def _storages(archive: zipfile.ZipFile, front: str, stream: BinaryIO, path: Path) -> dict[str, StoredBytes]:
    found: dict[str, StoredBytes] = {}
    for entry in archive.infolist():
        if not entry.filename.startswith(front):
            continue
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise _torn(path, f"has the compressed entry {entry.filename}, which torch.save never writes")
        stream.seek(entry.header_offset)
        local = stream.read(_LOCAL_HEADER)
        if len(local) < _LOCAL_HEADER or local[:4] != b"PK\x03\x04":
            raise _torn(path, f"has no entry where its directory puts {entry.filename}")
        # The entry's own name and extra field may be longer than those in the directory (APPNOTE.TXT, 4.3.7).
        name, extra = struct.unpack("<HH", local[26:30])
        start = entry.header_offset + _LOCAL_HEADER + name + extra
        if start + entry.file_size > archive.start_dir:
            raise _torn(path, f"has the entry {entry.filename}, which reaches beyond its content")
        key = entry.filename.removeprefix(front)
        if key in found:
            raise _torn(path, f"has {entry.filename} twice")
        found[key] = StoredBytes(start, entry.file_size, entry.CRC)
    return found


#: No value beside tensors comes near this; a larger one is damaged or hostile.
MAX_VALUE_BYTES = 2**28

_MAX_VALUE_PICKLE_BYTES = 2**26
_MAX_DEPTH = 64


def read_torch_value(data: bytes, path: str, name: str, *, legacy: bool = False) -> object:
    """The value in ``data``, which ``torch.save`` wrote; ``path`` and ``name`` are for errors.

    Numbers, text, lists and dictionaries are interpreted as data. Other values, such as a tuple with a tensor in it,
    are left to torch's own unpickler with an allow-list (``weights_only=True``), or with ``legacy`` to one without
    restrictions, which runs code from the file.

    Raises:
        UnsafePickleError: It names something outside the allow-lists, and ``legacy`` is not set.
        FormatError: It is damaged.
    """

    def wrong(why: str) -> FormatError:
        hint = "The checkpoint is damaged: restore it from a copy."
        return FormatError(f"this value of the checkpoint {why}", path=path, tensor=name, hint=hint)

    try:
        return _Plain(wrong).of(read_pickle_tree(_pickle_in(data, wrong), PLAIN_GLOBALS, path), 0)
    except UnsafePickleError:
        return _by_torch(data, path, name, legacy, wrong)


def _pickle_in(data: bytes, wrong: _Wrong) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.read(_pickle_of(archive, min(len(data), _MAX_VALUE_PICKLE_BYTES), wrong))
    except FormatError:
        raise
    except (zipfile.BadZipFile, zipfile.LargeZipFile, ValueError, OSError, NotImplementedError, RuntimeError) as error:
        raise wrong(f"is not what torch.save writes ({error})") from error


class _Plain:
    """Turns a tree into plain values; what is shared stays shared, so that time is linear in its size."""

    def __init__(self, wrong: _Wrong) -> None:
        self._wrong = wrong
        self._done: dict[int, object] = {}
        self._kept: list[object] = []  # so that no number of `id` is used twice

    def of(self, tree: object, depth: int) -> object:
        if isinstance(tree, (PickledCall, PickledGlobal)):
            return self._torchs(tree)
        if not isinstance(tree, (dict, list, tuple)):
            return tree
        if depth > _MAX_DEPTH:
            raise self._wrong("is nested too deeply, or contains itself")
        known = self._done.get(id(tree))
        if known is not None:
            return known
        made: object
        if isinstance(tree, dict):
            made = {self.of(key, depth + 1): self.of(value, depth + 1) for key, value in tree.items()}
        else:
            made = type(tree)([self.of(item, depth + 1) for item in tree])
        self._kept.append(tree)
        self._done[id(tree)] = made
        return made

    def _torchs(self, tree: PickledCall | PickledGlobal) -> object:
        if isinstance(tree, PickledGlobal):
            found: object = getattr(torch, tree.name, None) if tree.module == "torch" else None
            if isinstance(found, torch.dtype):
                return found
        elif tree.function.name == "Size" and len(tree.args) == 1 and isinstance(tree.args[0], (list, tuple)):
            sizes = tree.args[0]
            if all(type(size) is int for size in sizes) and tree.state is None:
                return tuple(sizes)
        raise self._wrong("has something else where a plain value belongs")


def _by_torch(data: bytes, path: str, name: str, legacy: bool, wrong: _Wrong) -> object:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=not legacy)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise UnsafePickleError(
            f"this value is more than numbers, text and tensors: it names {named[1] if named else 'something else'}",
            path=path,
            tensor=name,
            hint="It is not loaded, because unpickling it runs code from the file. If you trust whoever wrote it, set "
            "allow_legacy_pickle_restore, which does that.",
        ) from error
    except Exception as error:
        raise wrong(f"cannot be read ({type(error).__name__}: {error})") from error
