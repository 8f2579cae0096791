"""States and other small files: what a state is on disk, read with a bound.

A state is JSON, with the tensors in it in a safetensors file beside. No pickle.
"""

from __future__ import annotations

from pathlib import Path

from shardwise.disk.guarded import read_whole
from shardwise.disk.names import is_there
from shardwise.errors import ShardwiseError, StateFormatError
from shardwise.format.state_json import decode_state, encode_state

#: No state file of ours comes near this; a larger one is damaged or hostile.
MAX_STATE_FILE_BYTES = 4 * 2**30


def pack_state(value: object) -> dict[str, bytes]:
    """Encode a state: file name suffix -> content (``.json``, and ``.safetensors`` where it holds tensors).

    `StateFormatError` names the key path of what cannot be stored.
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


def joined(packed: dict[str, bytes]) -> bytes:
    """A packed state as one byte string."""
    return b"".join(len(v).to_bytes(8, "little") + k.encode().ljust(16) + v for k, v in sorted(packed.items()))


def split(raw: bytes) -> dict[str, bytes]:
    """The packed state that `joined` was given."""
    found: dict[str, bytes] = {}
    position = 0
    while position < len(raw):
        size = int.from_bytes(raw[position : position + 8], "little")
        key = raw[position + 8 : position + 24].decode().strip()
        found[key] = raw[position + 24 : position + 24 + size]
        position += 24 + size
    return found


def read_file(path: Path) -> bytes:
    """Read a small regular file; a FIFO, a device or a directory in its place is a typed error at once."""
    return read_whole(path, MAX_STATE_FILE_BYTES, StateFormatError)


def read_packed(text: Path, tensors: Path) -> object:
    """Read a state from its two files; the second may be absent."""
    packed = {".json": read_file(text)}
    if is_there(tensors):
        packed[".safetensors"] = read_file(tensors)
    try:
        return unpack_state(packed)
    except ShardwiseError as error:
        error.path = error.path or str(text)
        raise


def read_state(stem: Path) -> object:
    """Read a state from ``stem.json`` and ``stem.safetensors``; see `read_packed`."""
    return read_packed(stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".safetensors"))


def has_state(stem: Path) -> bool:
    """Whether a state stands at ``stem``."""
    return is_there(stem.with_name(stem.name + ".json"))
