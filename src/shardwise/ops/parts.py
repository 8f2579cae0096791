"""Which tensors a path given by a user has: one model, or the components of a checkpoint or pipeline."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shardwise.disk.names import is_directory, is_file, names_in
from shardwise.engine.verify import load_manifest
from shardwise.errors import IntegrityError
from shardwise.format.manifest import TensorRecord
from shardwise.format.notes import METADATA_DIR
from shardwise.ops.run_config import CONFIG_NAME
from shardwise.ops.targets import COMPONENTS, find_targets, with_nested
from shardwise.sources.directory_contents import holds_model

_COMPONENTS = (*COMPONENTS, "model_ema")
_ADAPTER = "adapter_model.safetensors"
_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json", "model_index.json")


@dataclass(frozen=True, slots=True)
class Parts:
    """The places of tensors below a path.

    Attributes:
        path: What the path means: of a root, its newest checkpoint.
        is_checkpoint: It is a whole checkpoint of shardwise's form; else a model, or one component.
        places: Component -> what to open.
        recorded: (component, name) -> the records of the manifests; empty where there are none.
        configs: Name -> configuration file.
    """

    path: Path
    is_checkpoint: bool
    places: Mapping[str, Path] = field(default_factory=dict)
    recorded: Mapping[tuple[str, str], tuple[TensorRecord, ...]] = field(default_factory=dict)
    configs: Mapping[str, Path] = field(default_factory=dict)


def find_parts(path: str | os.PathLike[str]) -> Parts:
    """Find what is to be opened for a path.

    Raises:
        CheckpointNotFoundError: Nothing is there.
        IncompleteCheckpointError: An interrupted save.
        IntegrityError: A directory is absent that a manifest lists files of.
        ManifestError: A manifest is damaged.
        StorageError: The file system refused.
    """
    targets = find_targets(path)
    first = targets[0]
    place = first.directory / first.under
    if len(targets) > 1:  # components that stand alone, side by side
        place = first.directory.parent
    whole = not first.under and any(is_directory(place / name) for name in _COMPONENTS)
    recorded: dict[tuple[str, str], tuple[TensorRecord, ...]] = {}
    for target in with_nested(targets):
        manifest = load_manifest(target.directory)
        for tensor in () if manifest is None else manifest.tensors:
            key = (tensor.component, tensor.spec.name)
            recorded[key] = (*recorded.get(key, ()), tensor)
    places = _places(place, whole)
    lost = sorted({component for component, _ in recorded} & set(_COMPONENTS) - places.keys()) if whole else ()
    if lost:
        raise IntegrityError(
            f"the checkpoint is damaged: its manifest lists files of {lost[0]}, and that directory is absent",
            path=place / lost[0],
            hint="Restore the checkpoint from a copy.",
        )
    configs = {CONFIG_NAME: place / CONFIG_NAME} if is_file(place / CONFIG_NAME) else {}
    for component, where in places.items():
        below = "" if component == "model" else f"{component}/"
        configs |= {f"{below}{name}": found for name, found in _configs(where).items()}
    return Parts(place, whole, places, recorded, configs)


def _places(place: Path, whole: bool) -> dict[str, Path]:
    if is_file(place):
        return {"model": place}
    if whole:
        return {name: _openable(place / name) for name in _COMPONENTS if is_directory(place / name)}
    if is_file(place / "model_index.json"):
        return {name: place / name for name in names_in(place) if holds_model(place / name)}
    return {place.name if place.name in _COMPONENTS else "model": _openable(place)}


def _openable(directory: Path) -> Path:
    """The directory, or an adapter's file in it, which no directory is opened for."""
    return directory / _ADAPTER if is_file(directory / _ADAPTER) and not holds_model(directory) else directory


def _configs(where: Path) -> dict[str, Path]:
    directory = where.parent if is_file(where) else where
    found: dict[str, Path] = {}
    for name in _CONFIGS:
        for place in (directory, directory / "consolidated", directory / METADATA_DIR):
            if name not in found and is_file(place / name):
                found[name] = place / name
    return found
