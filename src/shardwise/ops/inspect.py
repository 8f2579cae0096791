"""Describes a checkpoint: files, tensors, and how it was saved. Reads manifests and headers, never tensor data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from shardwise.disk.guarded import is_followed, is_made_of_links, resolve_inside
from shardwise.disk.names import files_under, is_directory, is_file
from shardwise.disk.storage import Storage, current, using
from shardwise.engine.verify import files_below, load_manifest
from shardwise.errors import CheckpointNotFoundError, ShardwiseError
from shardwise.format.manifest import Manifest
from shardwise.format.sniff import what_is_file
from shardwise.geometry import TensorSpec
from shardwise.lifecycle.names import parse_checkpoint_name
from shardwise.lifecycle.resolve import read_metrics
from shardwise.ops.modules import ModuleDescription, describe_modules
from shardwise.ops.origin import tools_named, writer_of
from shardwise.ops.targets import Target, find_targets, is_unfinished
from shardwise.ops.tensor_listing import DCP_SUFFIX, Piece, format_name, read_contents

__all__ = ["CheckpointDescription", "FileDescription", "Piece", "TensorDescription", "inspect"]


@dataclass(frozen=True, slots=True)
class FileDescription:
    """A file.

    Attributes:
        path: Relative to the checkpoint.
        size: Its bytes.
        tensors: How many tensors have a part in it.
        format: What it is, by its first bytes; ``None`` for an unknown format and for a file that is absent.
        header_bytes: Bytes before the first tensor, where that is known.
        writer: Who wrote it, where its name says so: ``rank 0``, or ``shard 1`` where nothing tells how many ranks
            there were.
        crc32c: Of the header of a tensor file, else of the whole file; where a manifest has it.
    """

    path: str
    size: int
    tensors: int
    format: str | None = None
    header_bytes: int | None = None
    writer: str | None = None
    crc32c: int | None = None


@dataclass(frozen=True, slots=True)
class TensorDescription:
    """A tensor.

    Attributes:
        component: What it belongs to.
        spec: What it is.
        files: The files that hold it.
        pieces: Where it lies in them, as far as that is known.
        crc32c: CRC-32C of the whole tensor, where a manifest has it.
    """

    component: str
    spec: TensorSpec
    files: tuple[str, ...]
    pieces: tuple[Piece, ...] = ()
    crc32c: int | None = None


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
        damaged: Those of ``unread`` that are not what their format promises; `verify` says what else is.
        tools: Other tools that wrote it, as far as it is in a layout of their own, and libraries that wrote a part of
            it, as configurations say: ``transformers 5.18.0 (config.json)``.
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
    damaged: tuple[str, ...] = ()

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

    def modules(self, component: str) -> tuple[ModuleDescription, ...]:
        """The modules of one component, those of one kind in all layers together."""
        return describe_modules(tensor.spec for tensor in self.tensors if tensor.component == component)

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats of the files that hold tensors, in order of appearance."""
        return tuple(dict.fromkeys(file.format for file in self.files if file.tensors and file.format))

    @property
    def writers(self) -> tuple[str, ...]:
        """Who wrote files, where their names say so; in order of appearance."""
        return tuple(dict.fromkeys(file.writer for file in self.files if file.writer))

    @property
    def components(self) -> tuple[str, ...]:
        """Components that have tensors, in order of appearance."""
        return tuple(dict.fromkeys(tensor.component for tensor in self.tensors))


def inspect(path: str | os.PathLike[str], *, storage: Storage | None = None) -> CheckpointDescription:
    """Describe a checkpoint, a part of one, or the newest checkpoint of a root.

    Args:
        path: Where it is.
        storage: The storage that holds it; the mounted file systems by default.

    Raises:
        CheckpointNotFoundError: There is nothing there.
        FormatError: The manifest is damaged, or the one file that ``path`` names. Of a directory such a file is in
            ``damaged``.
    """
    with using(storage or current()):
        return _inspect(path)


def _inspect(path: str | os.PathLike[str]) -> CheckpointDescription:
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
            replace(file, path=f"{name}/{file.path}")
            for name, part in zip(names, parts, strict=True)
            for file in part.files
        ),
        tuple(_below(tensor, name) for name, part in zip(names, parts, strict=True) for tensor in part.tensors),
        tuple((f"{name}/{file}", why) for name, part in zip(names, parts, strict=True) for file, why in part.unread),
        tuple(dict.fromkeys(tool for part in parts for tool in part.tools)),
        tuple(f"{name}/{file}" for name, part in zip(names, parts, strict=True) for file in part.damaged),
    )


def _below(tensor: TensorDescription, name: str) -> TensorDescription:
    return replace(
        tensor,
        files=tuple(f"{name}/{file}" for file in tensor.files),
        pieces=tuple(piece._replace(file=f"{name}/{piece.file}") for piece in tensor.pieces),
    )


def _describe(target: Target) -> CheckpointDescription:
    manifest = load_manifest(target.directory)
    if manifest is None:
        return _from_headers(target)
    return _from_manifest(target, manifest)


def _from_manifest(target: Target, manifest: Manifest) -> CheckpointDescription:
    root = target.directory
    files = files_below(manifest, (target.under,) if target.under else ())
    wanted = {file.path for file in files}
    linked = is_made_of_links(root)
    own = [file.path for file in files if _is_own(root, file.path, linked)]
    formats = {path: what for path in own if (what := what_is_file(root / path)) is not None}
    tensors = []
    counts: Counter[str] = Counter()
    for component, spec, crc, chunks in manifest.tensors:
        pieces = tuple([Piece(c.file, c.offset, c.nbytes, c.crc32c) for c in chunks if c.file in wanted])
        places = tuple(dict.fromkeys(piece.file for piece in pieces))
        if places or not target.under:
            tensors.append(TensorDescription(component, spec, places, pieces, crc))
            counts.update(places)
    # A manifest has the bytes of DCP's files; their tensors are in DCP's own metadata.
    described = read_contents(root, [f.path for f in files if f.path.endswith(DCP_SUFFIX)], root.name, whole=True)
    for (component, name), (spec, held) in described.tensors.items():
        found = tuple(described.pieces.get((component, name), ()))
        tensors.append(TensorDescription(component, spec, tuple(held), found))
        counts.update(held)
    named = parse_checkpoint_name(root.name) or (None, None)
    info = manifest.info
    version, ranks = info.get("shardwise"), _count(info.get("world_size"))
    return CheckpointDescription(
        root / target.under,
        True,
        named[0] if named[0] is not None else _count(info.get("epoch")),
        named[1] if named[1] is not None else _count(info.get("step")),
        ranks,
        version if isinstance(version, str) else None,
        read_metrics(root),
        tuple(
            FileDescription(
                file.path,
                file.size,
                counts[file.path],
                format_name(file.path, formats[file.path]) if file.path in formats else None,
                file.header_bytes,
                writer_of(file.path, ranks),
                file.crc32c,
            )
            for file in files
        ),
        tuple(tensors),
        tuple(described.unread.items()),
        tuple(tools_named(root, own)),
        tuple(described.damaged),
    )


def _is_own(root: Path, relative: str, linked: bool) -> bool:
    """Whether a file may be looked into: a link leads out of a checkpoint only where all are links, or into a store."""
    try:
        resolve_inside(root, relative)
    except ShardwiseError:
        return is_followed(root / relative, linked)
    return True


def _count(value: object) -> int | None:
    return value if type(value) is int else None


def _from_headers(target: Target) -> CheckpointDescription:
    top = target.directory / target.under
    listed = _listed(target.directory, top)
    found = read_contents(target.directory, listed, target.directory.name, whole=not is_file(top))
    if not found.files:
        raise CheckpointNotFoundError(
            "the directory holds no file, or those of interrupted saves alone",
            path=top,
            hint="Name a checkpoint's directory.",
        )
    epoch, step = parse_checkpoint_name(target.directory.name) or (None, None)
    return CheckpointDescription(
        top,
        False,
        epoch,
        step,
        found.world_size,
        None,
        read_metrics(target.directory),
        tuple(
            FileDescription(
                path,
                size,
                found.counts[path],
                found.formats.get(path),
                found.headers.get(path),
                writer_of(path, None),
            )
            for path, size in found.files.items()
        ),
        tuple(
            TensorDescription(key[0], spec, tuple(files), tuple(found.pieces.get(key, ())))
            for key, (spec, files) in found.tensors.items()
        ),
        tuple(found.unread.items()),
        (*found.tools, *tools_named(target.directory, found.files)),
        tuple(found.damaged),
    )


def _listed(root: Path, top: Path) -> list[str]:
    """Every file and link to a file, such as those of a hub cache's snapshots; none of an interrupted save."""
    if is_file(top):
        return [top.relative_to(root).as_posix()]
    # Of a hub cache the snapshots' links are listed, and not their targets.
    files = files_under(top, lambda where: where.name != "blobs" or not is_directory(where.with_name("snapshots")))
    listed = [path.relative_to(root).as_posix() for path in files]
    return [each for each in listed if not is_unfinished(each)]
