"""What is in a checkpoint: files, tensors, and how it was saved. Reads manifests and headers, never tensor data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shardwise.engine.verify import files_below, load_manifest
from shardwise.errors import CheckpointNotFoundError, FormatError
from shardwise.format.header import read_header
from shardwise.format.manifest import Manifest
from shardwise.format.sharding import saved_offsets
from shardwise.lifecycle.names import parse_checkpoint_name
from shardwise.lifecycle.resolve import read_metrics
from shardwise.ops.targets import Target, find_targets
from shardwise.types import TensorSpec

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
        tensors: Every tensor.
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
    )


def _count(value: object) -> int | None:
    return value if type(value) is int else None


def _from_headers(target: Target) -> CheckpointDescription:
    top = target.directory / target.under
    files = []
    found: dict[str, TensorDescription] = {}
    places = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file() and not p.is_symlink())
    for place in places:
        relative = place.relative_to(target.directory).as_posix()
        entries: tuple[TensorSpec, ...] = ()
        if place.suffix == ".safetensors":
            header = read_header(place)
            offsets = saved_offsets(header) or {}
            entries = tuple(_placed(entry.spec, offsets.get(entry.spec.name)) for entry in header.entries)
        files.append(FileDescription(relative, place.stat().st_size, len(entries)))
        for spec in entries:
            known = found.get(spec.name)
            found[spec.name] = TensorDescription(
                "model",
                spec if known is None else _joined(known.spec, spec),
                (relative,) if known is None else (*known.files, relative),
            )
    if not files:
        raise CheckpointNotFoundError("the directory holds no file", path=top, hint="Name a checkpoint's directory.")
    epoch, step = parse_checkpoint_name(target.directory.name) or (None, None)
    metrics = read_metrics(target.directory)
    return CheckpointDescription(top, False, epoch, step, None, None, metrics, tuple(files), tuple(found.values()))


def _placed(spec: TensorSpec, offsets: tuple[int, ...] | None) -> TensorSpec:
    """The least tensor that a piece at ``offsets`` can belong to."""
    if offsets is None:
        return spec
    return TensorSpec(spec.name, tuple(o + n for o, n in zip(offsets, spec.shape, strict=True)), spec.dtype)


def _joined(a: TensorSpec, b: TensorSpec) -> TensorSpec:
    if len(a.shape) != len(b.shape):
        raise FormatError(
            "two files disagree about this tensor's dimensions",
            tensor=a.name,
            hint="The directory mixes files of different checkpoints; separate them.",
        )
    return TensorSpec(a.name, tuple(max(m, n) for m, n in zip(a.shape, b.shape, strict=True)), a.dtype)
