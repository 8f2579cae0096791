"""Finds in the manifest why tensors do not fit a model: a missing file, or a tensor saved under another name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shardwise.disk.names import exists, is_directory
from shardwise.engine.verify import load_manifest
from shardwise.errors import CheckpointNotFoundError, MissingTensorError, ShapeMismatchError, ShardwiseError
from shardwise.format.manifest import Manifest
from shardwise.sources.sources import Source

_MAX_LEVELS = 3


@contextmanager
def missing_files_named(source: Source) -> Iterator[None]:
    """Give errors about tensors their path, and name the absent file where a manifest lists one.

    Raises:
        CheckpointNotFoundError: A tensor file that belongs to what is loaded is absent, in place of the error about the
            tensor that it leaves incomplete.
    """
    try:
        yield
    except (MissingTensorError, ShapeMismatchError) as error:
        if error.path is None:
            error.path = str(source.path)
        absent = _missing_file(source.path)
        if absent is None:
            raise
        what = "this file of the checkpoint, which its manifest lists, is absent"
        hint = "Restore it from a copy, or choose another checkpoint; `shardwise verify` lists all that is missing."
        raise CheckpointNotFoundError(what, path=absent, tensor=error.tensor, hint=hint) from error


def saved_aliases(source: Source) -> dict[str, str]:
    """Aliases of the model's tensors -> the names that they are saved under, by the nearest manifest.

    Local. Empty where no manifest lists a file of the source, or where it cannot be read: the error about the tensor
    that is then missing says more.
    """
    with suppress(OSError, ShardwiseError):
        for directory, manifest in _manifests(source.path):
            if not {directory / file.path for file in manifest.files}.isdisjoint(source.files):
                return {name: kept for of, name, kept in manifest.aliases if of == "model"}
    return {}


def _missing_file(path: Path) -> Path | None:
    """A tensor file at or below ``path`` that the nearest manifest lists and that does not exist."""
    with suppress(OSError, ShardwiseError):  # the error about the tensor says more than one about the manifest
        for directory, manifest in _manifests(path):
            for file in manifest.files:
                found = directory / file.path
                if found.suffix == ".safetensors" and found.is_relative_to(path) and not exists(found):
                    return found
    return None


def _manifests(path: Path) -> Iterator[tuple[Path, Manifest]]:
    """The manifests of a directory and of those around it, the nearest first."""
    for directory in [path, *path.parents][:_MAX_LEVELS]:
        manifest = load_manifest(directory) if is_directory(directory) else None
        if manifest is not None:
            yield directory, manifest
