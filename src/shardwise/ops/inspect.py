"""Describes a checkpoint: files, tensors, and how it was saved. Reads manifests and headers, never tensor data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from shardwise.disk.names import files_under, is_directory, is_file
from shardwise.disk.storage import Storage, current, using
from shardwise.engine.verify import check_files, files_below, load_manifest
from shardwise.errors import FormatError
from shardwise.format.manifest import Manifest
from shardwise.format.sniff import what_is_file
from shardwise.format.strict_json import JsonValue
from shardwise.lifecycle.names import parse_checkpoint_name
from shardwise.lifecycle.resolve import read_metrics
from shardwise.ops.modules import ModuleDescription, describe_modules
from shardwise.ops.targets import Target, find_targets, is_unfinished, nothing_in
from shardwise.ops.tensor_listing import (
    DCP_SUFFIX,
    MODEL,
    FileDescription,
    Listing,
    Piece,
    TensorDescription,
    add_dcp,
    format_name,
    read_contents,
    tools_named,
    writer_of,
)

__all__ = ["CheckpointDescription", "FileDescription", "Piece", "TensorDescription", "inspect"]


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
    def ranks(self) -> str | None:
        """How many ranks saved it, for people; ``None`` where nothing tells."""
        if self.world_size is not None:
            return str(self.world_size)
        return f"not recorded; writers by the files' names: {len(self.writers)}" if self.writers else None

    @property
    def saved_by(self) -> str | None:
        """What wrote it, for people; ``None`` where nothing tells."""
        return ", ".join([*([] if self.version is None else [f"shardwise {self.version}"]), *self.tools]) or None

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
        targets = find_targets(path)
        root = targets[0].directory if len(targets) == 1 else targets[0].directory.parent
        found, info = Listing(), dict[str, JsonValue]()
        manifests = [load_manifest(target.directory) for target in targets]
        for target, manifest in zip(targets, manifests, strict=True):
            if manifest is None:
                _from_headers(found, root, target)
            else:
                _from_manifest(found, root, target, manifest)
                info = info or dict(manifest.info)
        epoch, step = parse_checkpoint_name(root.name) or (_count(info.get("epoch")), _count(info.get("step")))
        version, verifiable = info.get("shardwise"), None not in manifests
        return CheckpointDescription(
            root / targets[0].under,
            verifiable,
            epoch,
            step,
            _count(info.get("world_size")) if verifiable else found.world_size,
            version if isinstance(version, str) else None,
            read_metrics(root) or {},
            tuple(replace(file, tensors=found.counts[path]) for path, file in found.files.items()),
            tuple(found.tensors.values()),
            tuple(found.unread.items()),
            tuple(found.tools),
            tuple(found.damaged),
        )


def _from_manifest(found: Listing, root: Path, target: Target, manifest: Manifest) -> None:
    below = "" if target.directory == root else f"{target.directory.relative_to(root).as_posix()}/"
    files = files_below(manifest, (target.under,) if target.under else ())
    wanted = {file.path for file in files}
    damages = check_files(target.directory, files, {})
    for damage in damages:
        found.leave_out(below + damage.file, damage.message, damaged=True)
    # A link that leads out of the checkpoint is not looked behind.
    apart = {damage.file for damage in damages if damage.kind != "size"}
    own = [file.path for file in files if file.path not in apart]
    ranks = _count(manifest.info.get("world_size"))
    for file in files:
        what = what_is_file(target.directory / file.path) if file.path not in apart else None
        found.files[below + file.path] = FileDescription(
            below + file.path,
            file.size,
            0,
            format_name(file.path, what),
            file.header_bytes,
            writer_of(file.path, ranks),
            file.crc32c,
        )
    for component, spec, crc, chunks in manifest.tensors:
        pieces = tuple([Piece(below + c.file, c.offset, c.nbytes, c.crc32c) for c in chunks if c.file in wanted])
        if pieces or not target.under:
            found.add(component, spec, pieces, crc=crc)
    # A manifest has the bytes of DCP's files; their tensors are in DCP's own metadata.
    for path in own:
        if path.endswith(DCP_SUFFIX):
            try:
                component = PurePosixPath(below + path).parent.as_posix()
                add_dcp(root, below + path, MODEL if component == "." else component, found)
            except FormatError as error:
                found.leave_out(below + path, error, damaged=True)
    found.tools |= dict.fromkeys(tools_named(root, [below + path for path in own]))


def _count(value: object) -> int | None:
    return value if type(value) is int else None


def _from_headers(found: Listing, root: Path, target: Target) -> None:
    top = target.directory / target.under
    if is_file(top):
        listed = [top.relative_to(root).as_posix()]
    else:
        # Of a hub cache the snapshots' links are listed, and not their targets.
        files = files_under(top, lambda where: where.name != "blobs" or not is_directory(where.with_name("snapshots")))
        listed = [each for path in files if not is_unfinished(each := path.relative_to(root).as_posix())]
    if not listed:
        raise nothing_in(top)
    # The name of a component that stands alone says what its tensors are.
    own = root.name if root.name == "optim" else MODEL
    read_contents(found, root, listed, own, whole=not is_file(top))
    found.tools |= dict.fromkeys(tools_named(root, found.files))
