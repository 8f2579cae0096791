"""State that is not a sharded tensor: JSON, with the tensors in it in a safetensors file beside. No pickle."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from shardwise.engine.records import ComponentRecord
from shardwise.errors import CheckpointNotFoundError, ShardwiseError, StateFormatError, StorageError
from shardwise.format.crc import crc32c
from shardwise.format.manifest import FileRecord
from shardwise.format.state_json import decode_state, encode_state
from shardwise.io.storage import Storage
from shardwise.io.writer import locating

#: No state file of ours comes near this; a larger one is damaged or hostile.
MAX_STATE_FILE_BYTES = 4 * 2**30


def pack_state(value: object) -> dict[str, bytes]:
    """Encode a state: file name suffix -> content (``.json``, and ``.safetensors`` where it holds tensors).

    Raises:
        StateFormatError: The state holds something that cannot be stored; names the key path.
    """
    from safetensors.torch import save

    text, tensors = encode_state(value)
    packed = {".json": text}
    if tensors:
        packed[".safetensors"] = save(tensors)
    return packed


def unpack_state(packed: dict[str, bytes]) -> object:
    """Decode what `pack_state` made."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(packed[".safetensors"]) if ".safetensors" in packed else {}
    except SafetensorError as error:
        raise StateFormatError(f"the tensors of this state are damaged: {error}", hint="Restore the file.") from error
    return decode_state(packed[".json"], tensors)


def write_state(storage: Storage, stem: Path, packed: dict[str, bytes]) -> ComponentRecord:
    """Write a packed state as ``stem.json`` (and ``stem.safetensors``), durable; paths in the record are names only."""
    files = []
    for suffix, content in packed.items():
        path = stem.with_name(stem.name + suffix)
        write_plain(storage, path, content)
        files.append(FileRecord(path.name, len(content), crc32c(content), None))
    return ComponentRecord(tuple(files))


def write_plain(storage: Storage, path: Path, content: bytes) -> None:
    """Write a small file and make it durable."""
    storage.create(path, len(content), content)
    handle = storage.open(path, writable=True)
    with locating(path):
        try:
            storage.sync(handle)
        finally:
            storage.close(handle)


def read_state(stem: Path) -> object:
    """Read what `write_state` wrote.

    Raises:
        CheckpointNotFoundError: There is no such state.
        StateFormatError: It is damaged.
    """
    packed = {".json": read_file(stem.with_name(stem.name + ".json"))}
    tensors = stem.with_name(stem.name + ".safetensors")
    if tensors.exists():
        packed[".safetensors"] = read_file(tensors)
    try:
        return unpack_state(packed)
    except ShardwiseError as error:
        error.path = error.path or str(stem) + ".json"
        raise


def has_state(stem: Path) -> bool:
    """Whether a state stands at ``stem``."""
    return stem.with_name(stem.name + ".json").exists()


def read_file(path: Path) -> bytes:
    """Read a small regular file; a FIFO, a device or a directory in its place is a typed error at once."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(
            "this file of the checkpoint is absent", path=path, hint="Restore it or choose another checkpoint."
        ) from error
    except OSError as error:
        raise StorageError.from_os(error, path=path) from error
    with os.fdopen(handle, "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise StateFormatError("not a regular file", path=path, hint="Remove it or choose another checkpoint.")
        if info.st_size > MAX_STATE_FILE_BYTES:
            raise StateFormatError(f"has {info.st_size} bytes, too many for a state", path=path)
        return file.read()
