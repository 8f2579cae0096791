"""Lists the tensors of files without a manifest, from headers, DCP's metadata and torch's archives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from shardwise.disk.names import file_size
from shardwise.errors import CheckpointNotFoundError, FormatError, ShardwiseError, TensorError, UnsafePickleError
from shardwise.format.header import read_header
from shardwise.format.sharding import saved_offsets
from shardwise.format.sniff import Kind, Recognised, what_is_file
from shardwise.geometry import TensorSpec
from shardwise.ops.torch_archives import TORCH_SUFFIXES, check_torch_file
from shardwise.sources.directory_contents import kept_beside_models

#: Suffix of the name of DCP's metadata file.
DCP_SUFFIX = ".metadata"

_TORCH_WEIGHTS = re.compile(r"(pytorch_model|diffusion_pytorch_model|adapter_model|model)([-.].*)?\.(bin|pt|pth|ckpt)")
#: The component of files at the top; a folder is another component, or a pipeline's model.
_TOP = "model"


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


@dataclass
class Described:
    """The files and their tensors.

    Attributes:
        files: Path -> bytes.
        formats: Path -> the format of the file, by its first bytes; without those of an unknown one.
        headers: Path -> bytes before the first tensor, of safetensors files.
        counts: Path -> how many tensors have a part in it.
        tensors: (component, name) -> the tensor's spec, and the files that hold it.
        pieces: (component, name) -> where the tensor lies, as far as that is known.
        unread: Path -> why its tensors could not be listed.
        damaged: Those of ``unread`` that are not what their format promises, in order.
        tools: Who wrote the files, where that is known and it was another tool.
        world_size: The number of ranks that wrote them, where that tool's files say so.
    """

    files: dict[str, int] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    headers: dict[str, int] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    tensors: dict[tuple[str, str], tuple[TensorSpec, list[str]]] = field(default_factory=dict)
    pieces: dict[tuple[str, str], list[Piece]] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, None] = field(default_factory=dict)
    tools: dict[str, None] = field(default_factory=dict)
    world_size: int | None = None

    def leave_out(self, path: str, error: ShardwiseError, *, damaged: bool) -> None:
        """Note why the tensors of a file or directory cannot be listed: that is no reason for `inspect` to fail."""
        error.rank = None  # it is this one process
        self.unread[path] = str(error)
        if damaged:
            self.damaged[path] = None

    def add(self, component: str, spec: TensorSpec, files: Sequence[str], pieces: Sequence[Piece] = ()) -> None:
        """Add a tensor, or another piece of one."""
        if pieces:
            self.pieces.setdefault((component, spec.name), []).extend(pieces)
        known = self.tensors.get((component, spec.name))
        if known is None:
            self.tensors[component, spec.name] = (spec, list(files))
        else:
            self.tensors[component, spec.name] = (_joined(known[0], spec), [*known[1], *files])
        self.counts.update(files)


def read_contents(root: Path, listed: Sequence[str], top: str, *, whole: bool = False) -> Described:
    """Describe files.

    Args:
        root: The directory.
        listed: The files, relative to it (POSIX).
        top: The directory's own name: that of a component by itself says what its tensors are.
        whole: Whether these are all files of a directory: those of other tools are looked for, and one that is
            damaged does not keep the others from being described.

    Raises:
        FormatError: A safetensors header or DCP's metadata is damaged, and it is not ``whole``.
    """
    found = Described()
    own = top if top == "optim" else _TOP
    dcp = {PurePosixPath(name).parent for name in listed if PurePosixPath(name).name == DCP_SUFFIX}
    laid_out = _add_layouts(root, listed, own, found) if whole else frozenset()
    for relative in listed:
        path = PurePosixPath(relative)
        found.files[relative] = file_size(root / relative)
        what = what_is_file(root / relative)
        if what is not None:
            found.formats[relative] = format_name(relative, what)
        if path.suffix == ".distcp" and path.parent in dcp:
            continue  # .metadata describes it
        if relative in laid_out:
            continue
        component = path.parent.as_posix() if len(path.parts) > 1 else own
        try:
            _add_file(root, relative, component, what, found)
        except (FormatError, TensorError) as error:
            if not whole:
                raise
            found.leave_out(relative, error, damaged=True)
    return found


def _add_layouts(root: Path, listed: Sequence[str], own: str, found: Described) -> frozenset[str]:
    """Add the tensors of other tools that write per rank, or in flat partitions; returns the files that hold them."""
    torch = [path for each in listed if (path := PurePosixPath(each)).suffix in TORCH_SUFFIXES]
    files: set[str] = set()
    for directory in dict.fromkeys(path.parent.as_posix() for path in torch):
        files |= _add_layout(root, directory, own if directory == "." else directory, found)
    return frozenset(files)


def _add_layout(root: Path, directory: str, component: str, found: Described) -> set[str]:
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
        found.add(component, tensor.spec, tuple(dict.fromkeys(piece.file for piece in pieces)), pieces)
    return set(names)


def format_name(relative: str, what: Recognised) -> str:
    """What a file is, without an article."""
    if PurePosixPath(relative).name == DCP_SUFFIX:
        return "metadata of torch.distributed.checkpoint"
    # What a text begins with helps where weights were expected, and not beside every settings file.
    return what.name.removeprefix("a ").removeprefix("an ").partition(", which begins")[0]


def _add_file(root: Path, relative: str, component: str, what: Recognised | None, found: Described) -> None:
    path = PurePosixPath(relative)
    kind = None if what is None else what.kind
    if path.suffix == ".safetensors":
        _add_safetensors(root, relative, component, found)
    elif path.name == DCP_SUFFIX:
        _add_dcp(root, relative, component, found)
    elif kind is Kind.SAFETENSORS:
        try:
            _add_safetensors(root, relative, component, found)
        except FormatError as error:
            found.unread[relative] = str(error)  # only its first bytes say that it is such a file
    elif path.suffix == ".distcp":
        found.unread[relative] = "one file of a DCP directory, whose .metadata is absent"
        found.damaged[relative] = None
    elif kept_beside_models(path.name):
        found.unread[relative] = "what a training loop keeps beside a model; its tensors are not listed"
    elif kind is Kind.TORCH or _TORCH_WEIGHTS.fullmatch(path.name):
        _add_torch(root, relative, component, found)
    elif what is not None and kind in (Kind.GGUF, Kind.FOREIGN, Kind.POINTER):
        found.unread[relative] = f"it is {what.name}, whose tensors are not listed"


def _add_safetensors(root: Path, relative: str, component: str, found: Described) -> None:
    header = read_header(root / relative)
    offsets = saved_offsets(header) or {}
    start = found.headers[relative] = header.data_start
    for entry in header.entries:
        piece = Piece(relative, start + entry.begin, entry.end - entry.begin)
        found.add(component, _placed(entry.spec, offsets.get(entry.spec.name)), (relative,), (piece,))


def _add_dcp(root: Path, relative: str, component: str, found: Described) -> None:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from shardwise.dtypes import dtype_code
    from shardwise.format.dcp_metadata import read_dcp_metadata

    metadata = read_dcp_metadata(root / relative)
    directory = PurePosixPath(relative).parent
    places: dict[str, list[Piece]] = {}
    for index, info in (metadata.storage_data or {}).items():
        file = (directory / str(info.relative_path)).as_posix()
        places.setdefault(index.fqn, []).append(Piece(file, info.offset, info.length))
    for name, item in metadata.state_dict_metadata.items():
        if isinstance(item, TensorStorageMetadata):
            spec = TensorSpec(name, tuple(item.size), dtype_code(item.properties.dtype, name))
            pieces = places.get(name, [])
            found.add(component, spec, tuple(dict.fromkeys(piece.file for piece in pieces)), pieces)


def _add_torch(root: Path, relative: str, component: str, found: Described) -> None:
    from shardwise.comm import Group
    from shardwise.sources.torch_files import open_bin

    try:
        opened = open_bin(root / relative, Group(None))
    except ShardwiseError as error:
        # As `verify` judges: one that is whole may hold something else than a state dict.
        found.leave_out(relative, error, damaged=check_torch_file(root / relative).damage is not None)
        return
    for tensor in opened.source.tensors.values():
        pieces = [Piece(relative, chunk.offset, tensor.spec.nbytes) for chunk in tensor.chunks]
        found.add(component, tensor.spec, (relative,), pieces)
    for spec, _ in opened.loose.values():
        found.add(component, spec, (relative,))


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
