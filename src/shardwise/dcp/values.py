"""The values of a DCP state dict that are not tensors: numbers, text, lists. One JSON file, no pickle.

DCP would pickle every such value. Here the rank that DCP chose for it encodes the object itself and sends the text to
the coordinator, which writes all of them as one state (`shardwise.format.state_json`): a table from DCP's names
(``optim.param_groups.0.lr``) to values. Tensors inside a value, in a tuple say, which DCP does not look into, go to a
second file; its name does not end in ``.safetensors``, so that nobody takes them for tensors of the model.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from shardwise.disk.names import is_there
from shardwise.disk.sequential import write_file
from shardwise.disk.storage import Storage, storage_errors
from shardwise.errors import MisuseError, NameCollisionError, StateFormatError
from shardwise.format.manifest import FileRecord
from shardwise.sources.state_files import pack_state, read_packed, unpack_state

#: The values, and the tensors inside them, if any.
VALUES_NAME = "dcp_values.json"
VALUES_TENSORS_NAME = "dcp_values.tensors"

_NAMES = {".json": VALUES_NAME, ".safetensors": VALUES_TENSORS_NAME}


@dataclass(frozen=True)
class PackedValue:
    """A value as a rank sends it to the coordinator: a state, a table of it alone under its name; see `pack_state`."""

    packed: Mapping[str, bytes]

    @property
    def nbytes(self) -> int:
        """Bytes of the encoded value."""
        return sum(map(len, self.packed.values()))


def pack_value(item: WriteItem, planner: SavePlanner) -> PackedValue:
    """Encode the object that DCP would pickle.

    `MisuseError` where the planner gives none out; `StateFormatError`, with item and place, where it cannot be stored.
    """
    name = item.index.fqn
    look_up: Callable[[MetadataIndex], object] | None = getattr(planner, "lookup_object", None)
    if look_up is None:
        what = f"{type(planner).__name__} has no lookup_object, so that this value could only be saved as a pickle"
        hint = "Derive the planner from DCP's DefaultSavePlanner, or keep the value out of the state dict."
        raise MisuseError(what, tensor=name, hint=hint)
    try:
        return PackedValue(pack_state({name: look_up(item.index)}))
    except StateFormatError as error:
        error.tensor = name
        raise


def merge_values(parts: Iterable[tuple[str, PackedValue]]) -> dict[str, object]:
    """The values of all ranks, in one table; `NameCollisionError` where they sent different ones under one name."""
    seen: dict[str, PackedValue] = {}
    for name, part in parts:
        if seen.setdefault(name, part) != part:
            hint = "Put the rank into the name, or keep what differs between ranks out of the state dict."
            raise NameCollisionError("ranks saved different values under this name", tensor=name, hint=hint)
    return {name: _table(unpack_state(dict(part.packed)))[name] for name, part in seen.items()}


def write_values(storage: Storage, directory: Path, values: Mapping[str, object]) -> list[FileRecord]:
    """Write the values, durable; no file where there are none."""
    records = []
    for suffix, content in (pack_state(dict(values)) if values else {}).items():
        write_file(storage, directory / _NAMES[suffix], content)
        records.append(FileRecord.plain(_NAMES[suffix], content))
    return records


def read_values(directory: Path) -> dict[str, object]:
    """The values of a directory; none where it has no such file, `StateFormatError` if that is damaged or forged."""
    path = directory / VALUES_NAME
    return _table(read_packed(path, directory / VALUES_TENSORS_NAME), path) if is_there(path) else {}


def remove_values(storage: Storage, directory: Path) -> None:
    """Remove what an earlier save left, so that it is never read with new tensors."""
    for name in _NAMES.values():
        remove(storage, directory / name)


def remove(storage: Storage, path: Path) -> None:
    """Remove a file if it is there."""
    with storage_errors(path):
        storage.remove_file(path)


def as_stream(value: object) -> io.BytesIO:
    """A value as DCP's load planners take it: they unpickle it. Made here and now; nothing of it comes from a file."""
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


def _table(table: object, path: Path | None = None) -> dict[str, object]:
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table):
        raise StateFormatError(
            "the values are not a table from names to values",
            path=path,
            hint="The file is damaged or forged: restore it from a copy, or resume from another checkpoint.",
        )
    return table
