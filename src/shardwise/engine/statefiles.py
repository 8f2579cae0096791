"""A state of a checkpoint, which is not a sharded tensor: written with its record for the manifest, and read."""

from __future__ import annotations

from pathlib import Path

from shardwise.disk.crc import crc32c
from shardwise.disk.storage import Storage
from shardwise.engine.records import ComponentRecord
from shardwise.errors import ShardwiseError
from shardwise.format.manifest import FileRecord
from shardwise.sources.state_files import read_file, unpack_state, write_plain


def write_state(storage: Storage, stem: Path, packed: dict[str, bytes]) -> ComponentRecord:
    """Write a packed state as ``stem.json`` (and ``stem.safetensors``), durable; paths in the record are names only."""
    files = []
    for suffix, content in packed.items():
        path = stem.with_name(stem.name + suffix)
        write_plain(storage, path, content)
        files.append(FileRecord(path.name, len(content), crc32c(content), None))
    return ComponentRecord(tuple(files))


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
