"""States and other small files: what a state is on disk, written durably, read with a bound.

A state is JSON, with the tensors in it in a safetensors file beside. No pickle.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from shardwise.disk.storage import Storage, locating
from shardwise.errors import CheckpointNotFoundError, StateFormatError, StorageError
from shardwise.format.state_json import decode_state, encode_state

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


def write_plain(storage: Storage, path: Path, content: bytes) -> None:
    """Write a small file and make it durable."""
    storage.create(path, len(content), content)
    handle = storage.open(path, writable=True)
    with locating(path):
        try:
            storage.sync(handle)
        finally:
            storage.close(handle)


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
    # Looked at before Python makes a file object, which refuses a directory with an error of its own.
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise StateFormatError("not a regular file", path=path, hint="Remove it or choose another checkpoint.")
        if info.st_size > MAX_STATE_FILE_BYTES:
            raise StateFormatError(f"has {info.st_size} bytes, too many for a state", path=path)
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)
