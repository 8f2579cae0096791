"""Describes a checkpoint: files, tensors, and how it was saved. Reads manifests and headers, never tensor data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shardwise.disk.names import files_under, is_directory, is_file
from shardwise.engine.verify import files_below, load_manifest
from shardwise.errors import CheckpointNotFoundError
from shardwise.format.manifest import Manifest
from shardwise.geometry import TensorSpec
from shardwise.lifecycle.names import parse_checkpoint_name
from shardwise.lifecycle.resolve import read_metrics
from shardwise.ops.targets import Target, find_targets
from shardwise.ops.tensor_listing import DCP_SUFFIX, read_contents

__all__ = ["CheckpointDescription", "FileDescription", "TensorDescription", "inspect"]


@dataclass(frozen=True, slots=True)
class FileDescription:
    """A file: path relative to the checkpoint, bytes, and how many tensors have a part in it."""

    path: str
    size: int
    tensors: int


@dataclass(frozen=True, slots=True)
class TensorDescription:
    """A tensor: component, what it is, and the files that hold it."""

    component: str
    spec: TensorSpec
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CheckpointDescription:
    """A checkpoint.

    Attributes:
        path: Its directory, or the part of it that was named.
        verifiable: It has a manifest.
        epoch: From its name or its manifest.
        step: Likewise.
        world_size: Number of ranks that saved it, where known.
        version: Release of shardwise that saved it, where known.
        metrics: Metrics it was saved with; only finite ones.
        files: Every file that belongs to it.
        tensors: Every tensor. Of a directory without a manifest the component is the folder that the files are in,
            since each model of a pipeline has one of its own; ``model`` at the top.
        unread: Files whose tensors could not be listed, and why.
        tools: Other tools that wrote it, as far as it is in a layout of their own.
    """

    path: Path
    verifiable: bool
    epoch: int | None
    step: int | None
    world_size: int | None
    version: str | None
    metrics: Mapping[str, float] = field(hash=False)
    files: tuple[FileDescription, ...] = ()
    tensors: tuple[TensorDescription, ...] = ()
    unread: tuple[tuple[str, str], ...] = ()
    tools: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def dtypes(self, component: str) -> dict[str, int]:
        """Number of elements by dtype code, of one component."""
        found: Counter[str] = Counter()
        for tensor in self.tensors:
            if tensor.component == component:
                found[tensor.spec.dtype] += tensor.spec.numel
        return dict(found)

    @property
    def components(self) -> tuple[str, ...]:
        """Components that have tensors, in order of appearance."""
        return tuple(dict.fromkeys(tensor.component for tensor in self.tensors))


def inspect(path: str | os.PathLike[str]) -> CheckpointDescription:
    """Describe a checkpoint, a part of one, or the newest checkpoint of a root.

    Raises:
        CheckpointNotFoundError: There is nothing there.
        FormatError: The manifest or, without one, a header is damaged; `verify` says what else is.
    """
    targets = find_targets(path)
    parts = [_describe(target) for target in targets]
    if len(parts) == 1:
        return parts[0]
    names = [target.directory.name for target in targets]
    return CheckpointDescription(
        targets[0].directory.parent,
        all(part.verifiable for part in parts),
        None,
        None,
        parts[0].world_size,
        parts[0].version,
        {},
        tuple(
            FileDescription(f"{name}/{file.path}", file.size, file.tensors)
            for name, part in zip(names, parts, strict=True)
            for file in part.files
        ),
        tuple(
            TensorDescription(tensor.component, tensor.spec, tuple(f"{name}/{file}" for file in tensor.files))
            for name, part in zip(names, parts, strict=True)
            for tensor in part.tensors
        ),
        tuple((f"{name}/{file}", why) for name, part in zip(names, parts, strict=True) for file, why in part.unread),
    )


def _describe(target: Target) -> CheckpointDescription:
    manifest = load_manifest(target.directory)
    if manifest is None:
        return _from_headers(target)
    return _from_manifest(target, manifest)


def _from_manifest(target: Target, manifest: Manifest) -> CheckpointDescription:
    files = files_below(manifest, (target.under,) if target.under else ())
    wanted = {file.path for file in files}
    tensors = []
    counts: Counter[str] = Counter()
    for tensor in manifest.tensors:
        places = tuple(dict.fromkeys(chunk.file for chunk in tensor.chunks if chunk.file in wanted))
        if places or not target.under:
            tensors.append(TensorDescription(tensor.component, tensor.spec, places))
            counts.update(places)
    # A manifest has the bytes of DCP's files; their tensors are in DCP's own metadata.
    described = read_contents(
        target.directory, [f.path for f in files if f.path.endswith(DCP_SUFFIX)], target.directory.name
    )
    for (component, _), (spec, held) in described.tensors.items():
        tensors.append(TensorDescription(component, spec, tuple(held)))
        counts.update(held)
    named = parse_checkpoint_name(target.directory.name) or (None, None)
    info = manifest.info
    version = info.get("shardwise")
    return CheckpointDescription(
        target.directory / target.under,
        True,
        named[0] if named[0] is not None else _count(info.get("epoch")),
        named[1] if named[1] is not None else _count(info.get("step")),
        _count(info.get("world_size")),
        version if isinstance(version, str) else None,
        read_metrics(target.directory),
        tuple(FileDescription(file.path, file.size, counts[file.path]) for file in files),
        tuple(tensors),
        tuple(described.unread.items()),
    )


def _count(value: object) -> int | None:
    return value if type(value) is int else None


def _from_headers(target: Target) -> CheckpointDescription:
    top = target.directory / target.under
    listed = _listed(target.directory, top)
    found = read_contents(target.directory, listed, target.directory.name, whole=not is_file(top))
    if not found.files:
        raise CheckpointNotFoundError("the directory holds no file", path=top, hint="Name a checkpoint's directory.")
    epoch, step = parse_checkpoint_name(target.directory.name) or (None, None)
    return CheckpointDescription(
        top,
        False,
        epoch,
        step,
        found.world_size,
        None,
        read_metrics(target.directory),
        tuple(FileDescription(path, size, found.counts[path]) for path, size in found.files.items()),
        tuple(
            TensorDescription(component, spec, tuple(files)) for (component, _), (spec, files) in found.tensors.items()
        ),
        tuple(found.unread.items()),
        tuple(found.tools),
    )


def _listed(root: Path, top: Path) -> list[str]:
    """Every file and link to a file, such as those of a hub cache's snapshots."""
    if is_file(top):
        return [top.relative_to(root).as_posix()]
    # Of a hub cache the snapshots' links are listed, and not their targets.
    files = files_under(top, lambda where: where.name != "blobs" or not is_directory(where.with_name("snapshots")))
    return [path.relative_to(root).as_posix() for path in files]
