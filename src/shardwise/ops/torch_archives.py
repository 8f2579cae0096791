"""Checks that a file of ``torch.save`` is complete, by its zip archive's directory and without unpickling."""

from __future__ import annotations

import re
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from shardwise.disk.guarded import open_regular
from shardwise.disk.names import status
from shardwise.errors import FormatError, ShardwiseError
from shardwise.format.sniff import Kind, what_is_file

#: Names of such files.
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
#: Names under which libraries look for a model's weights, and nothing else stands.
WEIGHTS = re.compile(r"(pytorch_model|diffusion_pytorch_model|adapter_model|model)([-.].*)?\.(bin|pt|pth|ckpt)")
_ZIP = b"PK\x03\x04"
_LOCAL_BYTES = 30


class Outcome(NamedTuple):
    """Result of the check: a damage, why the file could not be checked, or neither."""

    damage: tuple[Literal["absent", "kind", "size", "header", "unreadable"], str] | None = None
    unchecked: str | None = None


def check_torch_file(path: Path) -> Outcome:
    """Compare a file with its archive's directory, which ``torch.save`` writes last. Imports no torch."""
    info = status(path)
    if info is None:
        return Outcome(damage=("absent", "the file is absent"))
    if info.kind != "file":
        return Outcome(damage=("kind", "not a regular file"))
    try:
        with open_regular(path, FormatError) as (stream, _):
            if stream.read(4) != _ZIP:
                return _no_archive(path)
            with zipfile.ZipFile(stream) as archive:
                return _check_entries(archive, stream)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, struct.error, ValueError, NotImplementedError) as error:
        message = (
            f"the archive's directory, with which such a file ends, is absent or damaged ({error}): it was cut short"
        )
        return Outcome(damage=("size", message))
    except ShardwiseError as error:
        return Outcome(damage=("unreadable", error.message))


def _no_archive(path: Path) -> Outcome:
    what = what_is_file(path)
    if what is not None and what.kind is Kind.TORCH:
        return Outcome(unchecked="of torch before 1.6, which does not say how long it is")
    if WEIGHTS.fullmatch(path.name) or (what is not None and what.kind is Kind.POINTER):
        name = "of no known format" if what is None else what.name
        return Outcome(damage=("header", f"the file is {name}; weights of torch were expected"))
    return Outcome(unchecked="of no known format")


def _check_entries(archive: zipfile.ZipFile, stream: BinaryIO) -> Outcome:
    end = archive.start_dir
    position = 0
    for entry in sorted(archive.infolist(), key=lambda each: each.header_offset):
        stream.seek(entry.header_offset)
        local = stream.read(_LOCAL_BYTES)
        if entry.header_offset < position or len(local) < _LOCAL_BYTES or local[:4] != _ZIP:
            return Outcome(damage=("header", f"no entry begins where the archive's directory puts {entry.filename}"))
        name, extra = struct.unpack("<HH", local[26:30])
        position = entry.header_offset + _LOCAL_BYTES + name + extra + entry.compress_size
        if position > end:
            return Outcome(damage=("size", f"{entry.filename} reaches beyond the archive's content"))
    return Outcome()
