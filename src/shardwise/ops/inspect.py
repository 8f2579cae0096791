"""Describes a checkpoint: files, tensors, and how it was saved. Reads manifests and headers, never tensor data.

Without a manifest it is told from headers, DCP's metadata and torch's archives, and by names of files.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from shardwise.disk.names import file_size, files_under, is_directory, is_file
from shardwise.disk.storage import Storage, current, using
from shardwise.engine.verify import check_files, files_below, load_manifest
from shardwise.errors import CheckpointNotFoundError, FormatError, ShardwiseError, TensorError, UnsafePickleError
from shardwise.format.header import read_header, saved_offsets
from shardwise.format.json_file import read_json
from shardwise.format.manifest import Manifest
from shardwise.format.sniff import Kind, Recognised, what_is_file
from shardwise.format.strict_json import JsonValue
from shardwise.geometry import TensorSpec
from shardwise.lifecycle.names import parse_checkpoint_name
from shardwise.lifecycle.resolve import read_metrics
from shardwise.ops.modules import ModuleDescription, describe_modules
from shardwise.ops.targets import Target, find_targets, is_unfinished, nothing_in
from shardwise.ops.verify import (
    INDEX_SUFFIXES,
    TORCH_SUFFIXES,
    WEIGHTS,
    absent_of_sets,
    check_index,
    check_torch_file,
)
from shardwise.sources.directory_contents import kept_beside_models

__all__ = ["CheckpointDescription", "FileDescription", "Piece", "TensorDescription", "inspect"]

#: Suffix of the name of DCP's metadata file.
_DCP_SUFFIX = ".metadata"
#: The component of what nothing calls otherwise.
_MODEL = "model"

#: File name -> entries that hold the release of the library that wrote it, by the library's name.
_RELEASES = {
    "config.json": {"transformers_version": "transformers", "_diffusers_version": "diffusers"},
    "model_index.json": {"_diffusers_version": "diffusers"},
}
#: As `shardwise.plan.layout.shard_name` and torch's Hugging Face writer name them; numbers count from 1.
_SHARD = re.compile(r"shard-(\d{5,})-.+")
#: As torch's FileSystemWriter names them: the rank, and a count.
_DCP_ITEM = re.compile(r"__(\d+)_\d+\.distcp")


class Piece(NamedTuple):
    """Where a tensor, or a part of one, lies.

    Attributes:
        file: Path of the file.
        offset: Where it begins in the file, in bytes.
        nbytes: Its length there.
        crc32c: CRC-32C of these bytes, where a manifest has it.
    """

    file: str
    offset: int
    nbytes: int
    crc32c: int | None = None


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
        found, info = _Listing(root), dict[str, JsonValue]()
        manifests = [load_manifest(target.directory) for target in targets]
        for target, manifest in zip(targets, manifests, strict=True):
            if manifest is None:
                _from_headers(found, target)
            else:
                _from_manifest(found, target, manifest)
                info = info or dict(manifest.info)
        epoch, step = parse_checkpoint_name(root.name) or (_count(info.get("epoch")), _count(info.get("step")))
        version, verifiable = info.get("shardwise"), None not in manifests
        counts = Counter(file for tensor in found.tensors.values() for file in tensor.files)
        return CheckpointDescription(
            root / targets[0].under,
            verifiable,
            epoch,
            step,
            _count(info.get("world_size")) if verifiable else found.world_size,
            version if isinstance(version, str) else None,
            read_metrics(root) or {},
            tuple(replace(file, tensors=counts[path]) for path, file in found.files.items()),
            tuple(found.tensors.values()),
            tuple(found.unread.items()),
            tuple(found.tools),
            tuple(found.damaged),
        )


def _from_manifest(found: _Listing, target: Target, manifest: Manifest) -> None:
    root = found.root
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
            _format_name(file.path, what),
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
        if path.endswith(_DCP_SUFFIX):
            try:
                component = PurePosixPath(below + path).parent.as_posix()
                _add_dcp(found, below + path, _MODEL if component == "." else component)
            except FormatError as error:
                found.leave_out(below + path, error, damaged=True)
    found.tools |= dict.fromkeys(_tools_named(root, [below + path for path in own]))


def _count(value: object) -> int | None:
    return value if type(value) is int else None


def _from_headers(found: _Listing, target: Target) -> None:
    root, top = found.root, target.directory / target.under
    whole = not is_file(top)
    if whole:
        # Of a hub cache the snapshots' links are listed, and not their targets.
        files = files_under(top, lambda where: where.name != "blobs" or not is_directory(where.with_name("snapshots")))
        listed = [each for path in files if not is_unfinished(each := path.relative_to(root).as_posix())]
    else:
        listed = [top.relative_to(root).as_posix()]
    if not listed:
        raise nothing_in(top)
    _read_contents(found, listed, whole=whole)
    found.tools |= dict.fromkeys(_tools_named(root, found.files))


# --- its tensors, file by file ---------------------------------------------------------------------------------------


@dataclass
class _Listing:
    """What becomes a `CheckpointDescription`, while it is found: by path, relative to ``root`` (POSIX).

    Attributes:
        tensors: (component, name) -> the tensor.
        files: Without the number of tensors in each.
        world_size: The number of ranks that wrote the files, where these say so.
    """

    root: Path
    files: dict[str, FileDescription] = field(default_factory=dict)
    tensors: dict[tuple[str, str], TensorDescription] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, None] = field(default_factory=dict)
    tools: dict[str, None] = field(default_factory=dict)
    world_size: int | None = None

    def leave_out(self, path: str, why: ShardwiseError | str, *, damaged: bool) -> None:
        """Note why the tensors of a file or directory cannot be listed: that is no reason for `inspect` to fail."""
        if isinstance(why, ShardwiseError):
            why.rank = None  # it is this one process
        self.unread[path] = str(why)
        if damaged:
            self.damaged[path] = None

    def add(
        self, component: str, spec: TensorSpec, pieces: Sequence[Piece], file: str | None = None, crc: int | None = None
    ) -> None:
        """Add a tensor, or more pieces of one; where its place is not known, the file that it is in."""
        files = tuple(dict.fromkeys(piece.file for piece in pieces)) if file is None else (file,)
        made = TensorDescription(component, spec, files, tuple(pieces), crc)
        known = self.tensors.setdefault((component, spec.name), made)
        if known is made:
            return
        if len(known.spec.shape) != len(spec.shape):
            raise FormatError(
                "two files disagree about this tensor's dimensions",
                tensor=spec.name,
                hint="The directory mixes files of different checkpoints; separate them.",
            )
        shape = tuple(max(ends) for ends in zip(known.spec.shape, spec.shape, strict=True))
        spec, files = known.spec._replace(shape=shape), (*known.files, *files)
        self.tensors[component, spec.name] = replace(known, spec=spec, files=files, pieces=(*known.pieces, *pieces))


def _read_contents(found: _Listing, listed: Sequence[str], *, whole: bool) -> None:
    """Add files without a manifest; a folder is a component, or a pipeline's model.

    Where the files are the ``whole`` of a directory, those of other tools are looked for, files that others name are
    missed, and one that is damaged is no error but noted.
    """
    root = found.root
    # The name of a component that stands alone says what its tensors are.
    own = root.name if root.name == "optim" else _MODEL
    dcp = {PurePosixPath(name).parent for name in listed if PurePosixPath(name).name == _DCP_SUFFIX}
    laid_out: set[str] = set()
    torch = [path.parent.as_posix() for each in listed if (path := PurePosixPath(each)).suffix in TORCH_SUFFIXES]
    for directory in dict.fromkeys(torch) if whole else ():
        laid_out |= _add_layout(found, directory, own if directory == "." else directory)
    for relative in listed:
        path = PurePosixPath(relative)
        what = what_is_file(root / relative)
        size, writer = file_size(root / relative), writer_of(relative, None)
        found.files[relative] = FileDescription(relative, size, 0, _format_name(relative, what), writer=writer)
        if (path.suffix == ".distcp" and path.parent in dcp) or relative in laid_out:
            continue  # .metadata, or the other tool's reader, describes it
        component = path.parent.as_posix() if len(path.parts) > 1 else own
        try:
            _add_tensors(found, relative, component, what)
        except (FormatError, TensorError) as error:
            if not whole:
                raise
            found.leave_out(relative, error, damaged=True)
    if not whole:
        return
    # The files that others name, and that a copy or download has not brought.
    damages = [each for name in listed if name.endswith(INDEX_SUFFIXES) for each in check_index(root, name)]
    for damage in (*damages, *absent_of_sets(root, listed)):
        if damage.file not in found.damaged:
            found.leave_out(damage.file, damage.message, damaged=True)


def _add_layout(found: _Listing, directory: str, component: str) -> set[str]:
    """Add the tensors of another tool that writes per rank, or in flat partitions; the files that hold them."""
    from shardwise.sources.others.recognise import recognise  # imports torch

    place = found.root / directory
    try:
        layout = recognise(place)
        if layout is None or layout.directory != place:
            return set()
        found.tools[layout.tool] = None
        if layout.dcp is not None:
            return set()
        opened = layout.open()
    except ShardwiseError as error:
        wrong = isinstance(error, (CheckpointNotFoundError, FormatError, TensorError))  # as `verify` judges
        found.leave_out(directory, error, damaged=wrong and not isinstance(error, UnsafePickleError))
        return set()
    found.world_size = opened.world_size
    names = [file.relative_to(found.root).as_posix() for file in opened.source.files]
    for tensor in opened.source.tensors.values():
        pieces = [Piece(names[c.file], c.offset, c.box.numel * tensor.spec.itemsize) for c in tensor.chunks]
        found.add(component, tensor.spec, pieces)
    return set(names)


def _format_name(relative: str, what: Recognised | None) -> str | None:
    """What a file is, without an article."""
    if what is not None and PurePosixPath(relative).name == _DCP_SUFFIX:
        return "metadata of torch.distributed.checkpoint"
    # What a text begins with helps where weights were expected, and not beside every settings file.
    return None if what is None else re.sub("^an? |, which begins.*", "", what.name)


def _add_tensors(found: _Listing, relative: str, component: str, what: Recognised | None) -> None:
    path = PurePosixPath(relative)
    kind = None if what is None else what.kind
    if path.suffix == ".safetensors":
        _add_safetensors(found, relative, component)
    elif path.name == _DCP_SUFFIX:
        _add_dcp(found, relative, component)
    elif kind is Kind.SAFETENSORS:
        try:
            _add_safetensors(found, relative, component)
        except FormatError as error:  # only its first bytes say that it is such a file
            found.leave_out(relative, error, damaged=False)
    elif path.suffix == ".distcp":
        found.leave_out(relative, "one file of a DCP directory, whose .metadata is absent", damaged=True)
    elif kept_beside_models(path.name):
        why = "what a training loop keeps beside a model; its tensors are not listed"
        found.leave_out(relative, why, damaged=False)
    elif kind is Kind.TORCH or WEIGHTS.fullmatch(path.name):
        _add_torch(found, relative, component)
    elif what is not None and kind in (Kind.GGUF, Kind.FOREIGN, Kind.POINTER):
        found.leave_out(relative, f"it is {what.name}, whose tensors are not listed", damaged=False)


def _add_safetensors(found: _Listing, relative: str, component: str) -> None:
    header = read_header(found.root / relative)
    offsets = saved_offsets(header) or {}
    start = header.data_start
    found.files[relative] = replace(found.files[relative], header_bytes=start)
    for spec, begin, end in header.entries:
        at = offsets.get(spec.name, (0,) * len(spec.shape))
        # Of a piece, the smallest tensor that it can belong to.
        least = spec._replace(shape=tuple(o + n for o, n in zip(at, spec.shape, strict=True)))
        found.add(component, least, (Piece(relative, start + begin, end - begin),))


def _add_dcp(found: _Listing, relative: str, component: str) -> None:
    """Add the tensors that a ``.metadata`` describes; a damaged one is a `FormatError`."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from shardwise.dtypes import dtype_code
    from shardwise.format.dcp_metadata import read_dcp_metadata
    from shardwise.sources.dcp_model import item_paths, mapping_beside

    metadata = read_dcp_metadata(found.root / relative)
    directory = PurePosixPath(relative).parent
    places: dict[str, list[Piece]] = {}
    for index, info in (metadata.storage_data or {}).items():
        file = (directory / str(info.relative_path)).as_posix()
        places.setdefault(index.fqn, []).append(Piece(file, info.offset, info.length))
    paths = item_paths(metadata)
    for name, item in metadata.state_dict_metadata.items():
        if isinstance(item, TensorStorageMetadata):
            spec = TensorSpec(name, tuple(item.size), dtype_code(item.properties.dtype, name))
            other = None if "optim" in component else mapping_beside(name, paths[name])
            below = component if other is None else other if component == _MODEL else f"{component}/{other}"
            found.add(below, spec, places.get(name, []))
    for file in sorted({piece.file for pieces in places.values() for piece in pieces} - found.files.keys()):
        if not is_file(found.root / file):
            found.leave_out(file, "the file is absent; .metadata says that it has tensors", damaged=True)


def _add_torch(found: _Listing, relative: str, component: str) -> None:
    from shardwise.comm import Group
    from shardwise.sources.torch_files import WRAPPERS, entries_of, open_bin

    path = found.root / relative
    try:
        entries = entries_of(path)
        if {"state", "param_groups"} <= entries.keys():
            found.leave_out(relative, "it is an optimizer's state, whose tensors are not listed", damaged=False)
            return
        opened = open_bin(path, Group(None))
    except ShardwiseError as error:
        # As `verify` judges: one that is whole may hold something else than a state dict.
        kind, message = check_torch_file(path) or (None, "")
        found.leave_out(relative, error if kind is None else message, damaged=kind is not None)
        return
    for tensor in opened.source.tensors.values():
        pieces = [Piece(relative, chunk.offset, tensor.spec.nbytes) for chunk in tensor.chunks]
        found.add(component, tensor.spec, pieces)
    for spec, _ in opened.loose.values():
        found.add(component, spec, (), relative)
    beside = [name for name, is_filled in entries.items() if is_filled and name not in WRAPPERS]
    if beside:
        found.leave_out(relative, f"beside the model it has {', '.join(beside)}, not listed here", damaged=False)


# --- who wrote it -----------------------------------------------------------------------------------------------------


def writer_of(path: str, world_size: int | None) -> str | None:
    """Who wrote a file, as its name says: ``rank 3``, or ``shard 4`` where nothing tells how many ranks there were.

    A rank whose pieces of one tensor do not touch puts the further ones into files that are numbered behind those of
    all ranks, so that a shard's rank is known only with their number. ``None`` where the name does not tell.
    """
    name = PurePosixPath(path).name
    item = _DCP_ITEM.fullmatch(name)
    if item is not None:
        return f"rank {int(item[1])}"
    shard = _SHARD.fullmatch(name)
    if shard is None:
        return None
    number = int(shard[1])
    return f"shard {number}" if not world_size or not number else f"rank {(number - 1) % world_size}"


def _tools_named(root: Path, listed: Iterable[str]) -> list[str]:
    """The libraries that configurations name as ``transformers 5.13.0 (model/config.json)``: each release once."""
    found: dict[str, str] = {}
    for relative in listed:
        entries = _RELEASES.get(PurePosixPath(relative).name, {})
        try:
            content = read_json(root / relative) if entries else None
        except ShardwiseError:
            continue  # a damaged configuration says nothing; what is wrong with it, `verify` tells
        for key, library in entries.items():
            release = content.get(key) if isinstance(content, dict) else None
            if isinstance(release, str):
                found.setdefault(f"{library} {release}", relative)
    return [f"{tool} ({relative})" for tool, relative in found.items()]
