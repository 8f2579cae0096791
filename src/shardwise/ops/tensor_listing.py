"""Lists the tensors of files without a manifest, and who wrote them, from headers, DCP's metadata, torch's archives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from shardwise.disk.names import file_size, is_file
from shardwise.errors import CheckpointNotFoundError, FormatError, ShardwiseError, TensorError, UnsafePickleError
from shardwise.format.header import read_header, saved_offsets
from shardwise.format.json_file import read_json
from shardwise.format.sniff import Kind, Recognised, what_is_file
from shardwise.geometry import TensorSpec
from shardwise.ops.contents import (
    INDEX_SUFFIXES,
    TORCH_SUFFIXES,
    WEIGHTS,
    absent_of_sets,
    check_index,
    check_torch_file,
)
from shardwise.sources.directory_contents import kept_beside_models

#: Suffix of the name of DCP's metadata file.
DCP_SUFFIX = ".metadata"
#: The component of what nothing calls otherwise.
MODEL = "model"

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


@dataclass
class Listing:
    """What becomes a `CheckpointDescription`, while it is found: by path, relative to one directory (POSIX).

    Attributes:
        tensors: (component, name) -> the tensor.
        counts: Path -> how many tensors have a part in it, which ``files`` do not say yet.
        world_size: The number of ranks that wrote the files, where these say so.
    """

    files: dict[str, FileDescription] = field(default_factory=dict)
    tensors: dict[tuple[str, str], TensorDescription] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
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
        self,
        component: str,
        spec: TensorSpec,
        pieces: Sequence[Piece],
        *,
        file: str | None = None,
        crc: int | None = None,
    ) -> None:
        """Add a tensor, or more pieces of one; where its place is not known, the file that it is in."""
        files = tuple(dict.fromkeys(piece.file for piece in pieces)) if file is None else (file,)
        self.counts.update(files)
        made = TensorDescription(component, spec, files, tuple(pieces), crc)
        known = self.tensors.setdefault((component, spec.name), made)
        if known is not made:
            spec, files = _joined(known.spec, spec), (*known.files, *files)
            self.tensors[component, spec.name] = replace(known, spec=spec, files=files, pieces=(*known.pieces, *pieces))


def read_contents(found: Listing, root: Path, listed: Sequence[str], own: str, *, whole: bool) -> None:
    """Add files without a manifest.

    ``own`` is the component of tensors at the top; a folder is another component, or a pipeline's model. Where the
    files are the ``whole`` of a directory, those of other tools are looked for, files that others name are missed, and
    one that is damaged is no error but noted.
    """
    dcp = {PurePosixPath(name).parent for name in listed if PurePosixPath(name).name == DCP_SUFFIX}
    laid_out = _add_layouts(root, listed, own, found) if whole else frozenset()
    for relative in listed:
        path = PurePosixPath(relative)
        what = what_is_file(root / relative)
        size, writer = file_size(root / relative), writer_of(relative, None)
        found.files[relative] = FileDescription(relative, size, 0, format_name(relative, what), writer=writer)
        if (path.suffix == ".distcp" and path.parent in dcp) or relative in laid_out:
            continue  # .metadata, or the other tool's reader, describes it
        component = path.parent.as_posix() if len(path.parts) > 1 else own
        try:
            _add_tensors(root, relative, component, what, found)
        except (FormatError, TensorError) as error:
            if not whole:
                raise
            found.leave_out(relative, error, damaged=True)
    if whole:
        _add_absent(root, listed, found)


def _add_absent(root: Path, listed: Sequence[str], found: Listing) -> None:
    """Add the files that others name, and that a copy or download has not brought."""
    names: dict[str, set[str]] = {}
    for tensor in found.tensors.values():
        for file in tensor.files:
            names.setdefault(file, set()).add(tensor.spec.name)
    damages = [each for name in listed if name.endswith(INDEX_SUFFIXES) for each in check_index(root, name, names)]
    for damage in (*damages, *absent_of_sets(root, listed)):
        if damage.file not in found.damaged:
            found.leave_out(damage.file, damage.message, damaged=True)


def _add_layouts(root: Path, listed: Sequence[str], own: str, found: Listing) -> frozenset[str]:
    """Add the tensors of other tools that write per rank, or in flat partitions; returns the files that hold them."""
    torch = [path.parent.as_posix() for each in listed if (path := PurePosixPath(each)).suffix in TORCH_SUFFIXES]
    files = (_add_layout(root, each, own if each == "." else each, found) for each in dict.fromkeys(torch))
    return frozenset().union(*files)


def _add_layout(root: Path, directory: str, component: str, found: Listing) -> set[str]:
    from shardwise.sources.others.recognise import recognise  # imports torch

    place = root / directory
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
    names = [file.relative_to(root).as_posix() for file in opened.source.files]
    for tensor in opened.source.tensors.values():
        pieces = [Piece(names[c.file], c.offset, c.box.numel * tensor.spec.itemsize) for c in tensor.chunks]
        found.add(component, tensor.spec, pieces)
    return set(names)


def format_name(relative: str, what: Recognised | None) -> str | None:
    """What a file is, without an article."""
    if what is not None and PurePosixPath(relative).name == DCP_SUFFIX:
        return "metadata of torch.distributed.checkpoint"
    # What a text begins with helps where weights were expected, and not beside every settings file.
    return None if what is None else re.sub("^an? |, which begins.*", "", what.name)


def _add_tensors(root: Path, relative: str, component: str, what: Recognised | None, found: Listing) -> None:
    path = PurePosixPath(relative)
    kind = None if what is None else what.kind
    if path.suffix == ".safetensors":
        _add_safetensors(root, relative, component, found)
    elif path.name == DCP_SUFFIX:
        add_dcp(root, relative, component, found)
    elif kind is Kind.SAFETENSORS:
        try:
            _add_safetensors(root, relative, component, found)
        except FormatError as error:  # only its first bytes say that it is such a file
            found.leave_out(relative, error, damaged=False)
    elif path.suffix == ".distcp":
        found.leave_out(relative, "one file of a DCP directory, whose .metadata is absent", damaged=True)
    elif kept_beside_models(path.name):
        why = "what a training loop keeps beside a model; its tensors are not listed"
        found.leave_out(relative, why, damaged=False)
    elif kind is Kind.TORCH or WEIGHTS.fullmatch(path.name):
        _add_torch(root, relative, component, found)
    elif what is not None and kind in (Kind.GGUF, Kind.FOREIGN, Kind.POINTER):
        found.leave_out(relative, f"it is {what.name}, whose tensors are not listed", damaged=False)


def _add_safetensors(root: Path, relative: str, component: str, found: Listing) -> None:
    header = read_header(root / relative)
    offsets = saved_offsets(header) or {}
    start = header.data_start
    found.files[relative] = replace(found.files[relative], header_bytes=start)
    for entry in header.entries:
        piece = Piece(relative, start + entry.begin, entry.end - entry.begin)
        found.add(component, _placed(entry.spec, offsets.get(entry.spec.name)), (piece,))


def add_dcp(root: Path, relative: str, component: str, found: Listing) -> None:
    """Add the tensors that a ``.metadata`` describes; a damaged one is a `FormatError`."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from shardwise.dtypes import dtype_code
    from shardwise.format.dcp_metadata import read_dcp_metadata
    from shardwise.sources.dcp_model import item_paths, mapping_beside

    metadata = read_dcp_metadata(root / relative)
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
            below = component if other is None else other if component == MODEL else f"{component}/{other}"
            found.add(below, spec, places.get(name, []))
    for file in sorted({piece.file for pieces in places.values() for piece in pieces} - found.files.keys()):
        if not is_file(root / file):
            found.leave_out(file, "the file is absent; .metadata says that it has tensors", damaged=True)


def _add_torch(root: Path, relative: str, component: str, found: Listing) -> None:
    from shardwise.comm import Group
    from shardwise.sources.torch_files import entries_of, open_bin
    from shardwise.sources.torch_state import WRAPPERS

    try:
        entries = entries_of(root / relative)
        if {"state", "param_groups"} <= entries.keys():
            found.leave_out(relative, "it is an optimizer's state, whose tensors are not listed", damaged=False)
            return
        opened = open_bin(root / relative, Group(None))
    except ShardwiseError as error:
        # As `verify` judges: one that is whole may hold something else than a state dict.
        kind, message = check_torch_file(root / relative) or (None, "")
        found.leave_out(relative, error if kind is None else message, damaged=kind is not None)
        return
    for tensor in opened.source.tensors.values():
        pieces = [Piece(relative, chunk.offset, tensor.spec.nbytes) for chunk in tensor.chunks]
        found.add(component, tensor.spec, pieces)
    for spec, _ in opened.loose.values():
        found.add(component, spec, (), file=relative)
    beside = [name for name, is_filled in entries.items() if is_filled and name not in WRAPPERS]
    if beside:
        found.leave_out(relative, f"beside the model it has {', '.join(beside)}, not listed here", damaged=False)


def _placed(spec: TensorSpec, offsets: tuple[int, ...] | None) -> TensorSpec:
    """The smallest tensor that a piece at ``offsets`` can belong to."""
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


def tools_named(root: Path, listed: Iterable[str]) -> Iterator[str]:
    """The libraries that configurations say they were written by: ``transformers 5.13.0 (model/config.json)``.

    Each release once, with the first file that names it.
    """
    seen: set[tuple[str, str]] = set()
    for relative in listed:
        entries = _RELEASES.get(PurePosixPath(relative).name)
        if entries is None:
            continue
        try:
            found = read_json(root / relative)
        except ShardwiseError:
            continue  # a damaged configuration says nothing; what is wrong with it, `verify` tells
        for key, library in entries.items():
            release = found.get(key) if isinstance(found, dict) else None
            if isinstance(release, str) and (library, release) not in seen:
                seen.add((library, release))
                yield f"{library} {release} ({relative})"
