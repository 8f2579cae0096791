"""Lists the tensors of files without a manifest, from headers, DCP's metadata and torch's archives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from shardwise.disk.names import file_size
from shardwise.errors import FormatError, ShardwiseError
from shardwise.format.header import read_header
from shardwise.format.sharding import saved_offsets
from shardwise.geometry import TensorSpec
from shardwise.ops.torch_archives import TORCH_SUFFIXES

#: Suffix of the name of DCP's metadata file.
DCP_SUFFIX = ".metadata"

_TORCH_WEIGHTS = re.compile(r"(pytorch_model|diffusion_pytorch_model|adapter_model|model)([-.].*)?\.(bin|pt|pth|ckpt)")
#: The component of files at the top; a folder is another component, or a pipeline's model.
_TOP = "model"


@dataclass
class Described:
    """The files and their tensors.

    Attributes:
        files: Path -> bytes.
        counts: Path -> how many tensors have a part in it.
        tensors: (component, name) -> the tensor's spec, and the files that hold it.
        unread: Path -> why its tensors could not be listed.
        tools: Who wrote the files, where that is known and it was another tool.
        world_size: The number of ranks that wrote them, where that tool's files say so.
    """

    files: dict[str, int] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    tensors: dict[tuple[str, str], tuple[TensorSpec, list[str]]] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    tools: dict[str, None] = field(default_factory=dict)
    world_size: int | None = None

    def add(self, component: str, spec: TensorSpec, files: Sequence[str]) -> None:
        """Add a tensor, or another piece of one."""
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
        whole: Whether these are all files of a directory, among which those of other tools are looked for.

    Raises:
        FormatError: A safetensors header or DCP's metadata is damaged.
    """
    found = Described()
    own = top if top == "optim" else _TOP
    for relative in listed:
        path = PurePosixPath(relative)
        found.files[relative] = file_size(root / relative)
        component = path.parent.as_posix() if len(path.parts) > 1 else own
        if path.suffix == ".safetensors":
            _add_safetensors(root, relative, component, found)
        elif path.name == DCP_SUFFIX:
            _add_dcp(root, relative, component, found)
        elif _TORCH_WEIGHTS.fullmatch(path.name):
            _add_torch(root, relative, component, found)
    if not whole:
        return found
    others = [path for each in listed if (path := PurePosixPath(each)).suffix in TORCH_SUFFIXES]
    for directory in dict.fromkeys(path.parent.as_posix() for path in others):
        _add_layout(root, directory, own if directory == "." else directory, found)
    return found


def _add_layout(root: Path, directory: str, component: str, found: Described) -> None:
    """Add the tensors of another tool that writes per rank, or in flat partitions."""
    from shardwise.sources.others.recognise import recognise  # imports torch

    place = root / directory
    try:
        layout = recognise(place)
        if layout is None or layout.directory != place:
            return
        found.tools[layout.tool] = None
        if layout.dcp is not None:
            return
        opened = layout.open()
    except ShardwiseError as error:
        # As of other torch files: what they contain is no reason for `inspect` to fail.
        found.unread[directory] = str(error)
        return
    found.world_size = opened.world_size
    names = [file.relative_to(root).as_posix() for file in opened.source.files]
    for tensor in opened.source.tensors.values():
        found.add(component, tensor.spec, tuple(dict.fromkeys(names[chunk.file] for chunk in tensor.chunks)))


def _add_safetensors(root: Path, relative: str, component: str, found: Described) -> None:
    header = read_header(root / relative)
    offsets = saved_offsets(header) or {}
    for entry in header.entries:
        found.add(component, _placed(entry.spec, offsets.get(entry.spec.name)), (relative,))


def _add_dcp(root: Path, relative: str, component: str, found: Described) -> None:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from shardwise.dtypes import dtype_code
    from shardwise.format.dcp_metadata import read_dcp_metadata

    metadata = read_dcp_metadata(root / relative)
    directory = PurePosixPath(relative).parent
    places: dict[str, dict[str, None]] = {}
    for index, info in (metadata.storage_data or {}).items():
        places.setdefault(index.fqn, {})[(directory / str(info.relative_path)).as_posix()] = None
    for name, item in metadata.state_dict_metadata.items():
        if isinstance(item, TensorStorageMetadata):
            spec = TensorSpec(name, tuple(item.size), dtype_code(item.properties.dtype, name))
            found.add(component, spec, tuple(places.get(name, ())))


def _add_torch(root: Path, relative: str, component: str, found: Described) -> None:
    from shardwise.comm import Group
    from shardwise.sources.torch_files import open_bin

    try:
        opened = open_bin(root / relative, Group(None))
    except ShardwiseError as error:
        # Other tools' files are shown as far as possible: what they contain is no reason for `inspect` to fail.
        found.unread[relative] = str(error)
        return
    for tensor in opened.source.tensors.values():
        found.add(component, tensor.spec, (relative,))
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
