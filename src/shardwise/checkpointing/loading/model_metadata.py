"""Reads the metadata that a save wrote beside a model for later loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from shardwise.checkpointing.module_state_files import find_module_state
from shardwise.comm import Group, JsonValue
from shardwise.disk.names import is_file
from shardwise.engine.per_rank import saved_ranks
from shardwise.errors import StateFormatError
from shardwise.format.json_file import read_json
from shardwise.format.notes import METADATA_DIR, NATIVE_DTYPES, PASSED_THROUGH


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """The metadata; empty for other tools' checkpoints.

    Attributes:
        exact: Name in the file -> dtype in memory, where the export has another dtype.
        passed: Names of the base model's tensors that were carried over.
        ranks: Number of ranks that saved per-rank tensors; 0 where there are none.
        module_state: Stems of the files of module state.
    """

    exact: Mapping[str, str]
    passed: tuple[str, ...]
    ranks: int = 0
    module_state: tuple[str, ...] = ()


def read_model_metadata(path: Path, group: Group) -> ModelMetadata:
    """Read the metadata beside a model on rank 0 and broadcast it. All ranks of the group call.

    Raises:
        StateFormatError: A file is damaged.
    """
    found = group.broadcast_result(lambda: _noted(path), "reading what was noted beside the model")
    exact, passed, ranks, module_state = cast(tuple[dict[str, str], list[str], int, list[str]], found)
    return ModelMetadata(exact, tuple(passed), ranks, tuple(module_state))


def _noted(path: Path) -> JsonValue:
    exact = {str(name): str(dtype) for name, dtype in _read(path, NATIVE_DTYPES, dict[str, str]()).items()}
    passed = [str(name) for name in _read(path, PASSED_THROUGH, list[str]())]
    return [
        cast(JsonValue, exact),
        cast(JsonValue, passed),
        saved_ranks(path),
        cast(JsonValue, find_module_state(path)),
    ]


_Note = TypeVar("_Note", dict[str, str], list[str])


def _read(path: Path, name: str, absent: _Note) -> _Note:
    """The note called ``name``; ``absent`` where there is none."""
    for directory in (path / METADATA_DIR, path.parent / METADATA_DIR):
        file = directory / name
        if not is_file(file):
            continue
        found = read_json(file, StateFormatError)
        if not isinstance(found, type(absent)):
            raise StateFormatError(f"not a {type(absent).__name__}", path=file, hint="Restore the file.")
        return found
    return absent
